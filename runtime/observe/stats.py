"""What a runtime counts in its steps. A new counter is added here: to `Stats`, and to its `plain` values.

`Runtime.stats` shows them beside what transport, stores and backend count themselves; Prometheus gets
what `adapters/metrics.py` lists.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..cost.predicate import Way
from .profiling import named_range

_NO_RANGE = nullcontext()


@dataclass(slots=True)
class Served:
    """What the server did for each source, over all services of a runtime; written by it alone."""

    answered: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    busy_s: float = 0.0
    most_requests: int = 0
    most_bytes: int = 0

    def plain(self) -> dict[str, Any]:
        return {
            "answered": dict(self.answered),
            "refused": dict(self.refused),
            "busy_s": self.busy_s,
            "most_requests": self.most_requests,
            "most_bytes": self.most_bytes,
        }


class Stats:
    """Counters since the runtime was opened. `ways[h, w]` counts (item, holder) decisions."""

    def __init__(self, world_size: int, *, profile_ranges: bool = False) -> None:
        self.steps = 0
        self.queries = 0
        self.phase_s: defaultdict[str, float] = defaultdict(float)
        self.leases: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self._profile_ranges = profile_ranges
        self.restart(world_size)

    def restart(self, world_size: int) -> None:
        """Begin to count anew what is counted by rank: ranks have new numbers."""
        self.ways = torch.zeros(world_size, len(Way), dtype=torch.int64)
        self.served = Served()

    def count(self, way: Tensor, queries: int) -> None:
        """Add one attention step and its ways (N, W)."""
        self.steps += 1
        self.queries += queries
        self.ways += torch.nn.functional.one_hot(way.long(), len(Way)).sum(0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a phase of a step."""
        start = time.perf_counter()
        try:
            with named_range(name) if self._profile_ranges else _NO_RANGE:
                yield
        finally:
            self.phase_s[name] += time.perf_counter() - start

    def plain(self) -> dict[str, Any]:
        """All of them as plain values; what is counted here appears in `Runtime.stats`.

        `decisions` are by holder: how many (item, holder) pairs went which way.
        """
        return {
            "steps": self.steps,
            "queries": self.queries,
            "decisions": {
                rank: {way.name.lower(): int(ways[way]) for way in Way if way != Way.NONE}
                for rank, ways in enumerate(self.ways)
            },
            "served": self.served.plain(),
            "failures": {"coverage": 0, "failover": 0, **self.failures},
            "phase_s": dict(self.phase_s),
        }
