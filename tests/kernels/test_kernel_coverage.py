"""Coverage: the count and the mix of entries, against plain Python."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from qroam.kernels.coverage import coverage, differs, mix, tagged


@given(
    entries=st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 3), st.booleans()), max_size=9
    )
)
def test_coverage_counts_and_sums_a_mix(entries: list[tuple[int, int, bool]]) -> None:
    ids = torch.tensor([e[0] for e in entries], dtype=torch.int32)
    generations = torch.tensor([e[1] for e in entries], dtype=torch.int32)
    valid = torch.tensor([e[2] for e in entries], dtype=torch.bool)
    count, mixed = coverage(ids, generations, valid).tolist()
    kept = [(id, generation) for id, generation, is_valid in entries if is_valid]
    assert count == len(kept)
    assert mixed % 2**32 == sum(plain_mix(*entry) for entry in kept) % 2**32


def plain_mix(id: int, generation: int) -> int:
    x = (id * 0x9E3779B1 + generation * 0x85EBCA77 + 0x165667B1) % 2**32
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) % 2**32
    x = ((x ^ (x >> 12)) * 0x297A2D39) % 2**32
    return x ^ (x >> 15)


def test_coverage_tells_swapped_stale_and_doubled_entries_apart() -> None:
    yes = torch.ones(3, dtype=torch.bool)
    ids, generations = torch.tensor([5, 6, 70]), torch.tensor([0, 0, 1])
    asked = coverage(ids, generations, yes)
    for other_ids, other_generations in (
        (torch.tensor([5, 7, 70]), generations),
        (torch.tensor([5, 5, 70]), generations),
        (torch.tensor([5, 7, 69]), generations),
        (ids, torch.tensor([0, 1, 1])),
    ):
        assert not torch.equal(coverage(other_ids, other_generations, yes), asked)
    shuffled = torch.tensor([2, 0, 1])
    assert torch.equal(coverage(ids[shuffled], generations[shuffled], yes), asked)


def test_a_tag_binds_coverage_to_its_item_and_sums_wrap_as_on_the_device() -> None:
    covered = torch.tensor([[3, 2**31 - 1], [3, 2**31 - 1], [0, -5]], dtype=torch.int32)
    item = torch.tensor([7, 8, 2**30], dtype=torch.int32)
    found = tagged(covered, item)
    assert found.dtype == torch.int32
    for (count, mixed), at, (found_count, found_mixed) in zip(
        covered.tolist(), item.tolist(), found.tolist(), strict=True
    ):
        assert found_count == count
        assert found_mixed % 2**32 == (mixed + plain_mix(at, 0)) % 2**32
    assert differs(found, tagged(covered, item.flip(0))).tolist() == [True, False, True]
    assert differs(found, found + torch.tensor([1, 0])).tolist() == [True, True, True]


def test_mix_hardly_collides() -> None:
    ids = torch.arange(200_000)
    assert len(mix(ids, torch.zeros_like(ids)).unique()) > 199_980
