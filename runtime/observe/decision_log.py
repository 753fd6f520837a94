"""Decisions as structured log lines: one JSON object per group of equal decisions of a step.

The logger is `qroam.decisions`, the level INFO; what becomes of the lines is the engine's choice.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from typing import Any

from .explain import DecisionLine, LastStep, explain_last

LOGGER = logging.getLogger("qroam.decisions")


def log_decisions(last: LastStep | None, *, step: int) -> None:
    """Log the decisions of the last `attend`, the `step`-th of this runtime."""
    if last is not None and LOGGER.isEnabledFor(logging.INFO):
        for group in decision_groups(explain_last(last), rank=last.rank, step=step):
            LOGGER.info(json.dumps(group))


def decision_groups(lines: list[DecisionLine], *, rank: int, step: int) -> list[dict[str, Any]]:
    """Lines that differ only in query, branch, units and margin, as one each.

    `pairs` counts (query, branch) items and `units` what they list together; `margin` is the smallest:
    how much the closest of them would lose by going the other way. Times are microseconds. `fabric`
    names the profile that priced them and says whether its constants were measured.
    """
    groups: defaultdict[tuple[Any, ...], list[DecisionLine]] = defaultdict(list)
    for line in lines:
        groups[line.layer, line.holder, line.way, line.reason].append(line)
    return [
        {
            "event": "decision",
            "rank": rank,
            "step": step,
            "layer": layer,
            "holder": holder,
            "way": way,
            "reason": reason,
            "pairs": len(group),
            "units": sum(line.units for line in group),
            "margin": round(min(line.margin for line in group), 6),
            "route_us": round(group[0].route_us, 3),
            "fetch_us": round(group[0].fetch_us, 3),
            "fabric": group[0].fabric,
        }
        for (layer, holder, way, reason), group in sorted(groups.items())
    ]
