"""Placement policies: distinct copies, balance, and what each policy promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from qroam.partition.placement import (
    PLACEMENT_POLICIES,
    Placement,
    PlacementPolicy,
    place,
    place_at,
)

policies = st.sampled_from(PLACEMENT_POLICIES)


def placed(
    placement: Placement,
    num_blocks: int,
    *,
    world: int,
    branches: int = 1,
    first_block: int = 0,
    used: Tensor | None = None,
    load: Tensor | None = None,
) -> Tensor:
    return place(
        placement,
        torch.arange(first_block, first_block + num_blocks),
        num_branches=branches,
        world_size=world,
        used=torch.zeros(world, dtype=torch.int64) if used is None else used,
        load=load,
    )


def per_rank(ranks: Tensor, world: int) -> Tensor:
    return torch.bincount(ranks.reshape(-1).long(), minlength=world)


@given(
    policy=policies,
    num_blocks=st.integers(1, 40),
    branches=st.integers(1, 4),
    world=st.integers(1, 9),
    copies=st.integers(1, 9),
    run=st.integers(1, 5),
    first_block=st.integers(0, 50),
    used=st.lists(st.integers(0, 30), min_size=9, max_size=9),
)
def test_every_block_has_distinct_copies_deterministically(
    policy: PlacementPolicy,
    num_blocks: int,
    branches: int,
    world: int,
    copies: int,
    run: int,
    first_block: int,
    used: list[int],
) -> None:
    assume(copies <= world)
    placement = Placement(policy=policy, run=run, copies=copies)
    slots = torch.tensor(used[:world])
    before = slots.clone()
    first, second = (
        placed(
            placement,
            num_blocks,
            world=world,
            branches=branches,
            used=slots,
            first_block=first_block,
        )
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(slots, before)
    assert first.shape == (num_blocks, branches, copies)
    assert first.dtype == torch.int32
    assert 0 <= int(first.min()) <= int(first.max()) < world
    ordered = first.sort(-1).values
    assert bool((ordered[..., 1:] > ordered[..., :-1]).all())


@given(
    policy=st.sampled_from(("contiguous", "block-cyclic", "balanced")),
    num_blocks=st.integers(1, 60),
    world=st.integers(1, 8),
    data=st.data(),
)
def test_even_policies_differ_by_at_most_one_block(
    policy: PlacementPolicy, num_blocks: int, world: int, data: st.DataObject
) -> None:
    placement = Placement(policy=policy, copies=data.draw(st.integers(1, world)))
    counts = per_rank(placed(placement, num_blocks, world=world)[..., 0], world)
    assert int(counts.max()) - int(counts.min()) <= 1


def test_contiguous_keeps_neighbours_together() -> None:
    owners = placed(Placement(policy="contiguous"), 10, world=4)[:, 0, 0]
    assert owners.tolist() == sorted(owners.tolist())
    assert set(owners.tolist()) == {0, 1, 2, 3}


def test_block_cyclic_goes_on_where_the_last_document_ended() -> None:
    placement = Placement(policy="block-cyclic", run=2)
    whole = placed(placement, 12, world=3)
    parts = [
        placed(placement, 5, world=3),
        placed(placement, 7, world=3, first_block=5),
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert whole[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2] * 2


@given(
    loads=st.lists(st.integers(1, 100), min_size=1, max_size=40),
    world=st.integers(1, 6),
)
def test_balanced_is_within_the_greedy_bound(loads: list[int], world: int) -> None:
    load = torch.tensor(loads, dtype=torch.float64)
    owners = placed(Placement(policy="balanced"), len(loads), world=world, load=load)[:, 0, 0]
    carried = torch.zeros(world, dtype=torch.float64).index_add(0, owners.long(), load)
    # Longest processing time first: (4/3 - 1/3W) times the optimum, of which these are bounds.
    least = max(sum(loads) / world, max(loads))
    ordered = sorted(loads, reverse=True)
    if len(loads) > world:
        least = max(least, ordered[world - 1] + ordered[world])
    assert float(carried.max()) <= (4 / 3 - 1 / (3 * world)) * least + 1e-9 or (
        float(carried.max()) - float(carried.min()) <= max(loads)
    )


def test_balanced_evens_out_heavy_blocks() -> None:
    load = torch.tensor([8.0, 1, 1, 1, 1, 1, 1, 1, 1])
    owners = placed(Placement(policy="balanced"), 9, world=2, load=load)[:, 0, 0]
    assert sorted(per_rank(owners, 2).tolist()) == [1, 8]


def test_balanced_fills_the_emptier_ranks_first() -> None:
    owners = placed(Placement(policy="balanced"), 4, world=3, used=torch.tensor([9, 0, 2]))
    assert per_rank(owners, 3).tolist() == [0, 3, 1]


def test_document_affine_takes_the_emptiest_rank_whole() -> None:
    owners = placed(Placement(policy="document-affine"), 7, world=3, used=torch.tensor([4, 2, 3]))
    assert owners.unique().tolist() == [1]


def test_branch_split_is_a_grid_of_branches_and_token_shards() -> None:
    owners = placed(Placement(policy="branch-split"), 6, world=8, branches=4)[..., 0]
    for block, ranks in enumerate(owners.tolist()):
        assert [rank % 4 for rank in ranks] == [0, 1, 2, 3]  # rank = shard * 4 + branch
        assert {rank // 4 for rank in ranks} == {block % 2}
    assert per_rank(owners, 8).tolist() == [3] * 8


@pytest.mark.parametrize("world", [4, 5, 8, 12])
def test_branch_split_never_puts_two_branches_of_a_block_together(world: int) -> None:
    owners = placed(Placement(policy="branch-split"), 9, world=world, branches=4)[..., 0]
    ordered = owners.sort(1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())


def test_a_world_of_one_holds_everything() -> None:
    for policy in PLACEMENT_POLICIES:
        owners = placed(Placement(policy=policy), 3, world=1, branches=4)
        assert owners.unique().tolist() == [0]


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown placement 'round-robin'; known: contiguous"):
        Placement(policy="round-robin")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        Placement(run=0)
    with pytest.raises(ValueError, match="at least 1"):
        Placement(copies=0)
    with pytest.raises(ValueError, match=r"shape \(4,\), got \(3,\)"):
        placed(Placement(policy="balanced"), 4, world=2, load=torch.ones(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0], ids=["nan", "inf", "negative"])
def test_an_absurd_load_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="load"):
        placed(Placement(policy="balanced"), 2, world=2, load=torch.tensor([1.0, bad]))


def test_a_world_of_fewer_ranks_than_copies_lacks_some_and_has_none_twice() -> None:
    for policy in PLACEMENT_POLICIES:
        ranks = placed(Placement(policy=policy, copies=3), 6, world=2)
        assert bool((ranks[..., 2] == -1).all())
        assert bool((ranks[..., 0] != ranks[..., 1]).all())
        assert bool((ranks[..., :2] >= 0).all())
    alone = place_at(0, 4, num_branches=2, copies=2, world_size=1)
    assert alone.tolist() == [[[0, -1]] * 2] * 4
