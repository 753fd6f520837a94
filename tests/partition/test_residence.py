"""How long things are kept and how soon they are used again, by the caller's clock."""

from __future__ import annotations

import torch

from qroam.partition.residence import Histogram, Places, Residence


def test_lifetime_and_reuse_gap_by_the_callers_clock() -> None:
    residence = Residence()
    places = Places(4, residence)
    places.take(torch.tensor([0, 2]), 100.0)
    places.use(torch.tensor([0]), 101.0)  # the first use has no gap
    places.use(torch.tensor([0, 2]), 101.5)
    places.leave(torch.tensor([0, 1]), 160.0)  # place 1 was never taken
    places.take(torch.tensor([0]), 161.0)
    places.use(torch.tensor([0]), 200.0)  # somebody else by now: no gap to the one before
    gap, life = residence.reuse_gap.plain(), residence.lifetime.plain()
    assert gap["sum_s"] == 0.5
    assert sum(gap["counts"]) == 1
    assert life["sum_s"] == 60.0
    assert dict(zip(life["bounds_s"], life["counts"], strict=True))[100.0] == 1


def test_a_bound_counts_what_is_equal_to_it() -> None:
    histogram = Histogram((1.0, 2.0, float("inf")))
    histogram.add(torch.tensor([0.0, 1.0, 1.5, 2.0, 9.0], dtype=torch.float64))
    assert histogram.plain()["counts"] == [2, 2, 1]
