"""How long what is kept stays, and how soon it is used again: two histograms in seconds.

`lifetime` runs from taking a place to giving it up, `reuse_gap` from one use to the next; the caller
gives the time. The block pool and its lease tables measure this, and they may not import the runtime,
which publishes it: therefore the histograms are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BOUNDS_S = (*(10.0**power for power in range(-3, 5)), float("inf"))


class Histogram:
    """Counts by upper bound in seconds, as Prometheus has them, before they are made cumulative."""

    def __init__(self, bounds_s: Sequence[float] = BOUNDS_S) -> None:
        self._bounds = torch.tensor(bounds_s, dtype=torch.float64)
        self._counts = torch.zeros(len(bounds_s), dtype=torch.int64)
        self._sum = 0.0

    def add(self, seconds: Tensor) -> None:
        """Count each of `seconds` (n,) float64."""
        at = torch.bucketize(seconds, self._bounds)
        self._counts += torch.bincount(at, minlength=len(self._bounds))
        self._sum += float(seconds.sum())

    def plain(self) -> dict[str, Any]:
        """{"bounds_s", "counts", "sum_s"}: each count is of what is above the bound before it."""
        return {
            "bounds_s": self._bounds.tolist(),
            "counts": self._counts.tolist(),
            "sum_s": self._sum,
        }


class Residence:
    """The histograms of one kind of thing; `Places` of several tables may share them."""

    def __init__(self) -> None:
        self.lifetime, self.reuse_gap = Histogram(), Histogram()


class Places:
    """When each place of a table was taken and last used."""

    def __init__(self, count: int, residence: Residence) -> None:
        self._residence = residence
        self._taken_at = torch.full((count,), torch.nan, dtype=torch.float64)
        self._used_at = torch.full((count,), torch.nan, dtype=torch.float64)

    def take(self, places: Tensor, now_s: float) -> None:
        """These free `places` (n,) are taken now."""
        self._taken_at[places], self._used_at[places] = now_s, torch.nan

    def use(self, places: Tensor, now_s: float) -> None:
        """One use of each of the distinct `places` (n,)."""
        gaps = now_s - self._used_at[places]
        self._residence.reuse_gap.add(gaps[~gaps.isnan()])
        self._used_at[places] = now_s

    def leave(self, places: Tensor, now_s: float) -> None:
        """These `places` (n,) are given up now; those that were never taken are skipped."""
        lifetimes = now_s - self._taken_at[places]
        self._residence.lifetime.add(lifetimes[~lifetimes.isnan()])
        self._taken_at[places], self._used_at[places] = torch.nan, torch.nan
