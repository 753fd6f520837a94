"""The directory: pure deltas, unique slots, and capacities refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from directories import B, added, empty
from hypothesis import given
from hypothesis import strategies as st

from qroam.partition.directory import (
    Directory,
    with_document,
    without_document,
)
from qroam.partition.placement import PLACEMENT_POLICIES, Placement


def frozen_copy(directory: Directory) -> dict[str, object]:
    tables = ("owners", "slots", "generations", "tokens", "used")
    values: dict[str, object] = {name: getattr(directory, name).tolist() for name in tables}
    return values | {
        "documents": dict(directory.documents),
        "num_blocks": directory.num_blocks,
        "version": directory.version,
    }


@given(
    lengths=st.lists(st.integers(1, 5 * B), min_size=1, max_size=5),
    policy=st.sampled_from(PLACEMENT_POLICIES),
    branches=st.sampled_from((1, 4)),
    world=st.integers(1, 5),
    copies=st.integers(1, 2),
)
def test_slots_are_unique_per_rank_and_old_values_stay(
    lengths: list[int], policy: str, branches: int, world: int, copies: int
) -> None:
    copies = min(copies, world)
    directory = empty(world=world, branches=branches, copies=copies, max_blocks=40)
    placement = Placement(policy=policy, copies=copies)  # type: ignore[arg-type]
    versions = {directory.version}
    for number, tokens in enumerate(lengths):
        before = frozen_copy(directory)
        grown = added(directory, f"doc{number}", tokens, placement=placement)
        assert frozen_copy(directory) == before
        assert grown.version not in versions
        versions.add(grown.version)
        directory = grown

    owners, slots = directory.owners.reshape(-1), directory.slots.reshape(-1)
    taken = owners >= 0
    places = list(zip(owners[taken].tolist(), slots[taken].tolist(), strict=True))
    assert len(set(places)) == len(places)
    used = torch.bincount(owners[taken].long(), minlength=world)
    assert torch.equal(used, directory.used)
    assert all(slot < int(used[rank]) for rank, slot in places)  # dense: no slot is skipped
    assert int(taken.sum()) == directory.num_blocks * branches * copies


@given(lengths=st.lists(st.integers(1, 3 * B + 1), min_size=1, max_size=4))
def test_documents_need_not_fill_their_last_block(lengths: list[int]) -> None:
    directory = empty(max_blocks=20)
    for number, tokens in enumerate(lengths):
        directory = added(directory, f"doc{number}", tokens, position=number)
    start = 0
    for number, tokens in enumerate(lengths):
        document = directory.document(f"doc{number}")
        fills = directory.tokens[list(document.blocks)].tolist()
        assert document.start == start
        assert document.position == number
        assert sum(fills) == document.tokens == tokens
        assert all(fill == B for fill in fills[:-1])
        assert 1 <= fills[-1] <= B
        start += document.num_blocks * B
    assert int(directory.tokens.sum()) == sum(lengths)


def test_the_same_deltas_give_the_same_version_and_others_another() -> None:
    one, two = (added(added(empty(), "a", 20), "b", 9) for _ in range(2))
    assert one.version == two.version
    others = [
        added(added(empty(), "b", 9), "a", 20),
        added(added(empty(), "a", 20), "b", 10),
        added(added(empty(), "a", 20), "b", 9, position=1),
        added(added(empty(), "a", 20), "b", 9, placement=Placement(policy="document-affine")),
    ]
    assert len({one.version, *(other.version for other in others)}) == 5


REFUSED = {
    "name-taken": ("exists already", {"name": "a", "tokens": 1}),
    "no-tokens": ("tokens of document 'b' must be a whole number", {"name": "b", "tokens": 0}),
    "negative-position": (
        "position of document 'b' must be a whole number",
        {"name": "b", "tokens": 1, "position": -1},
    ),
    "too-many-blocks": ("3 of 4 are free", {"name": "b", "tokens": 3 * B + 1}),
    "rank-full": ("rank 0 would hold 2", {"name": "b", "tokens": 2 * B, "capacity": 1}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_change(case: str) -> None:
    message, wanted = REFUSED[case]
    directory = added(empty(world=2, max_blocks=4), "a", 5)
    before = frozen_copy(directory)
    with pytest.raises(ValueError, match=message):
        added(directory, **wanted)  # type: ignore[arg-type]
    assert frozen_copy(directory) == before
    assert added(directory, "b", B).num_blocks == 2


def test_an_unknown_document_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown document 'c'; known: none"):
        empty().document("c")
    with pytest.raises(ValueError, match="unknown document 'c'; known: a, b"):
        added(added(empty(), "b", 1), "a", 1).document("c")


def test_the_documents_cannot_be_changed_in_place() -> None:
    directory = added(empty(), "a", 1)
    with pytest.raises(TypeError):
        directory.documents["b"] = directory.document("a")  # type: ignore[index]


def test_giving_up_blocks_raises_their_generations_and_frees_their_slots() -> None:
    before = added(added(added(empty(max_blocks=6), "a", 2 * B), "b", B), "c", B)
    after = without_document(before, "a")
    assert after.generations.tolist() == [1, 1, 0, 0, 0, 0]
    assert after.tokens.tolist() == [0, 0, B, B, 0, 0]
    assert after.owners[:2].unique().tolist() == after.slots[:2].unique().tolist() == [-1]
    assert int(after.used.sum()) == 2
    again = added(after, "a", 3 * B)
    assert again.document("a").blocks == (0, 1, 4)
    assert again.document("a").serial > before.document("a").serial
    assert again.generations.tolist() == after.generations.tolist()
    taken = again.owners >= 0
    places = list(zip(again.owners[taken].tolist(), again.slots[taken].tolist(), strict=True))
    assert len(set(places)) == len(places)


def test_shared_blocks_live_as_long_as_the_last_that_holds_them() -> None:
    hashes = [b"x" * 32, b"y" * 32]
    ranks = torch.zeros(2, 1, 1, dtype=torch.int32)
    one = with_document(
        empty(), "a", tokens=2 * B, position=0, ranks=ranks, capacity=9, hashes=hashes
    )
    two = with_document(
        one, "b", tokens=2 * B, position=0, ranks=ranks[:0], capacity=9, hashes=hashes
    )
    assert two.document("b").blocks == two.document("a").blocks
    left = without_document(two, "a")
    assert left.num_blocks == 2
    assert int(left.generations.sum()) == 0
    assert left.prefix(hashes) == two.document("b").blocks
    none = without_document(left, "b")
    assert (none.num_blocks, none.prefix(hashes)) == (0, ())
    assert none.generations[:2].tolist() == [1, 1]
