"""A directory for other ranks than it was made for keeps every copy that is left."""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EVERYWHERE

from qroam.partition.directory import empty_directory, with_document, without_document
from qroam.partition.directory_codec import directory_columns, directory_of
from qroam.partition.placement import PLACEMENT_POLICIES, Placement, place
from qroam.partition.repair import repaired


@given(data=st.data(), world=st.integers(2, 5), branches=st.integers(1, 2))
@settings(EVERYWHERE, max_examples=60)
def test_a_repaired_directory_keeps_every_copy_that_is_left(
    data: st.DataObject, world: int, branches: int
) -> None:
    """Against a plain reading; and it goes to a rank that is new and back, bit for bit."""
    copies = data.draw(st.integers(1, world))
    blank = empty_directory(
        max_blocks=24, block_tokens=4, num_branches=branches, copies=copies, world_size=world
    )
    before = blank
    capacity = data.draw(st.sampled_from((48 * copies // world + 2, 100)))
    for number in range(data.draw(st.integers(0, 4))):
        tokens = data.draw(st.integers(1, 20))
        blocks = before.free_blocks("", -(-tokens // 4))
        policy = data.draw(st.sampled_from(PLACEMENT_POLICIES))
        ranks = place(
            Placement(policy=policy, copies=copies),
            blocks,
            num_branches=branches,
            world_size=world,
            used=before.used,
        )
        name = f"d{number}"
        try:
            before = with_document(
                before, name, tokens=tokens, position=0, ranks=ranks, capacity=capacity
            )
        except ValueError:  # no room left
            break
    some_removed = data.draw(st.booleans())
    if before.documents and some_removed:
        before = without_document(before, "d0")
    size = data.draw(st.integers(1, 6))
    now = data.draw(st.permutations([*range(size), *[-1] * world]))[:world]
    after = repaired(before, now, world_size=size, capacity=capacity, index_capacity=24)

    firsts = [0] * size
    for key in range(24 * branches):
        had = [
            (now[owner], slot)
            for owner, slot in zip(
                before.owners[key].tolist(), before.slots[key].tolist(), strict=True
            )
            if owner >= 0 and now[owner] >= 0
        ]
        has = list(zip(after.owners[key].tolist(), after.slots[key].tolist(), strict=True))
        assert has[: len(had)] == had
        assert had or has == [(-1, -1)] * copies
        holders = [owner for owner, _ in has if owner >= 0]
        assert len(set(holders)) == len(holders)
        assert has[len(holders) :] == [(-1, -1)] * (copies - len(holders))
        for owner in holders:
            firsts[owner] += key % branches == 0
        if 0 < len(holders) < min(copies, size):  # only for want of room
            others = set(range(size)) - set(holders)
            assert all(int(after.used[rank]) >= capacity or firsts[rank] >= 24 for rank in others)
    taken = [
        pair
        for row in zip(after.owners.tolist(), after.slots.tolist(), strict=True)
        for pair in zip(*row, strict=True)
        if pair[0] >= 0
    ]
    assert len(set(taken)) == len(taken)
    assert all(slot < capacity for _, slot in taken)
    assert after.used.tolist() == [sum(owner == rank for owner, _ in taken) for rank in range(size)]
    assert torch.equal(after.generations, before.generations)

    for directory, ranks_there in ((before, world), (after, size)):
        sent = directory_columns(directory)
        like = replace(blank, used=torch.zeros(ranks_there, dtype=torch.int64))
        read = directory_of(sent, like, world_size=ranks_there, capacity=capacity)
        for field in fields(directory):
            ours, theirs = getattr(directory, field.name), getattr(read, field.name)
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, field.name
