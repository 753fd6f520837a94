"""Why the last attention step asked whom for what: its decisions, a line each."""

from __future__ import annotations

from typing import NamedTuple

from ..cost.model import CostModel
from ..cost.predicate import Decision, Demand, Reason, Way, predict_step


class LastStep(NamedTuple):
    """What the last `attend` demanded, how it was decided, and the model that decided it."""

    layer: int
    rank: int
    branches: int
    demand: Demand
    decision: Decision
    model: CostModel


class DecisionLine(NamedTuple):
    """One (query, branch, holder). Times are of the whole exchange with that holder, microseconds.

    `margin`: how much longer, relatively, the exchange would take if this query went the other way.
    `fabric`: the profile whose constants priced it and whether they were measured, such as "nvlink4
    (7 of 15 constants assumed)".
    """

    layer: int
    query: int
    branch: int
    holder: int
    units: int
    way: str
    reason: str
    margin: float
    route_us: float
    fetch_us: float
    fabric: str


def explain_last(last: LastStep | None) -> list[DecisionLine]:
    """The decisions of a step, a line per (query, branch, holder); of none, none."""
    if last is None:
        return []
    demand, decision = last.demand, last.decision
    return [
        DecisionLine(
            layer=last.layer,
            query=item // last.branches,
            branch=item % last.branches,
            holder=holder,
            units=int(demand.pairs_units[item, holder]),
            way=Way(int(decision.way[item, holder])).name,
            reason=Reason(int(decision.reason[item, holder])).name,
            margin=float(decision.margin[item, holder]),
            route_us=float(decision.route_s[holder]) * 1e6,
            fetch_us=float(decision.fetch_s[holder]) * 1e6,
            fabric=last.model.profile.label,
        )
        for item, holder in (decision.way != Way.NONE).nonzero().tolist()
    ]


def predicted_last(last: LastStep | None) -> float:
    """Seconds predicted for a step as it was decided, own work and merge included; of none, 0."""
    if last is None:
        return 0.0
    return float(predict_step(last.decision.way, last.demand, last.model, rank=last.rank).total)
