"""Leases of whole blocks, with the regions of several ranks in one process."""

from __future__ import annotations

import pytest
import torch
from gpu_world import LAYERS, B, Part, config, corpus

from qroam.partition.directory import without_document
from qroam.runtime.gpu.admit import admit
from qroam.runtime.gpu.leases import BlockLeases

TOKENS = 12 * B + 3  # of three ranks; the last block, of rank 0, is not closed
ROOM = 2


def fetch_counts(part: Part, counts: dict[int, int]) -> None:
    """As if steps had fetched so many entries of these blocks."""
    assert part.pool.leases.fetched is not None
    for key, count in counts.items():
        part.pool.leases.fetched[key] += count


def read_counts(part: Part, *counts: int) -> None:
    """As if items had read so many entries of each lease slot."""
    assert part.pool.leases.read is not None
    part.pool.leases.read += torch.tensor(counts, dtype=torch.int32)


def world(staged: int = 64) -> list[Part]:
    return corpus(config(lease_entries=ROOM * B), 3, TOKENS, staged=staged)


def check(parts: list[Part], rank: int, leased: list[int]) -> None:
    """These blocks, -1 for none, are in the slots of a rank, and its tables say so."""
    part = parts[rank]
    pool, store, directory = part
    assert pool.leases.key_of.tolist() == leased
    pool.refresh(store, directory)
    for slot, key in enumerate(leased):
        if key >= 0:
            here = pool.leases.first + slot
            assert int(pool.slot_of[key]) == here
            generation = int(directory.generations[key])
            assert int(pool.generation[here]) == generation
            assert pool.directory.records[key].tolist() == [key % 3, here, generation, B]
            for layer in range(LAYERS):
                assert torch.equal(part.leased(layer, slot), parts[key % 3].rows(layer, key))
        else:
            assert not bool(pool.fill[:, pool.leases.first + slot].any())
    own = store.slot_of >= 0
    assert torch.equal(pool.slot_of[own], store.slot_of[own])
    held = torch.tensor([key for key in leased if key >= 0])
    assert (pool.slot_of >= 0).sum() == own.sum() + len(held)


@pytest.mark.parametrize("staged", [B, 3 * B - 1, 64])
def test_what_was_fetched_most_is_pulled_whole(staged: int) -> None:
    parts = world(staged)
    others = [part.pool.memory.clone() for part in parts[1:]]
    fetch_counts(parts[0], {1: 20, 2: 30, 5: 25})
    leases = parts[0].pool.leases
    version = leases.version
    admit(parts[0].pool, least=20)
    assert leases.version > version
    check(parts, 0, [2, 5])
    assert all(torch.equal(p.pool.memory, o) for p, o in zip(parts[1:], others, strict=True))
    assert leases.fetched is not None
    assert not bool(leases.fetched.any())
    assert not parts[0].pool.refresh(parts[0].store, parts[0].directory)


def test_too_little_own_and_open_blocks_are_not_taken() -> None:
    parts = world()
    fetch_counts(parts[1], {0: 19, 1: 99, 12: 99, 23: 99, 30: 99})
    admit(parts[1].pool, least=20)
    check(parts, 1, [-1, -1])
    fetch_counts(parts[1], {0: 19})  # each time is counted anew
    admit(parts[1].pool, least=20)
    check(parts, 1, [-1, -1])


def test_least_read_leases_make_room() -> None:
    parts = world()
    pool = parts[0].pool
    fetch_counts(parts[0], {1: 20, 4: 21})
    admit(pool, least=1)
    check(parts, 0, [4, 1])
    read_counts(parts[0], 7, 5)
    assert pool.leases.counted() == {"hit": 12, "evicted": 0}
    fetch_counts(parts[0], {2: 6, 5: 6})  # more than the one was read, not than the other
    admit(pool, least=1)
    assert pool.slot_of[[1, 2]].tolist() == [-1, -1]  # at once, and here with the next refresh
    check(parts, 0, [4, 2])
    assert pool.leases.counted() == {"hit": 12, "evicted": 1}
    read_counts(parts[0], 3, 3)
    fetch_counts(parts[0], {1: 3})  # no more than they
    admit(pool, least=1)
    check(parts, 0, [4, 2])
    assert pool.leases.counted() == {"hit": 18, "evicted": 1}
    fetch_counts(parts[0], {8: 9, 7: 2})  # none was read since
    admit(pool, least=1)
    check(parts, 0, [7, 8])


@pytest.mark.parametrize("how", ["absent", "beyond the slots", "short", "stale"])
def test_what_its_owner_has_not_as_the_directory_says_is_not_leased(how: str) -> None:
    parts = world()
    owner = parts[2].pool
    slot = int(owner.slot_of[2])
    match how:
        case "absent":
            owner.slot_of[2] = -1
        case "beyond the slots":
            owner.slot_of[2] = owner.map.slots
        case "short":
            owner.fill[LAYERS - 1, slot] = B - 1
        case "stale":
            owner.generation[slot] += 1
    fetch_counts(parts[0], {1: 20, 2: 30})
    admit(parts[0].pool, least=1)
    check(parts, 0, [1, -1])


def test_what_is_given_up_is_no_lease_any_more() -> None:
    parts = world()
    fetch_counts(parts[0], {1: 20, 2: 30})
    admit(parts[0].pool, least=1)
    pool, store, directory = parts[0]
    pool.refresh(store, directory)
    pool.refresh(store, without_document(directory, "a"))
    assert pool.leases.key_of.tolist() == [-1, -1]
    assert pool.slot_of[[1, 2]].tolist() == [-1, -1]
    assert pool.directory.records[[1, 2], 1].tolist() == [-1, -1]


def test_leases_are_dropped_at_once() -> None:
    parts = world()
    pool, store, directory = parts[0]
    fetch_counts(parts[0], {1: 20, 2: 30})
    admit(pool, least=1)
    pool.leases.drop()
    check(parts, 0, [-1, -1])
    version = pool.leases.version
    pool.leases.drop()
    assert pool.leases.version == version
    fetch_counts(parts[0], {1: 20})
    admit(pool, least=1)
    check(parts, 0, [1, -1])
    # What is written beside a lease reaches the tables, and leaves it.
    rest = torch.arange(3, B, dtype=torch.int32) + 12 * B
    store.write(1, rest, torch.zeros(B - 3, pool.map.entry_bytes, dtype=torch.uint8))
    assert pool.refresh(store, directory)
    assert int(pool.fill[1, int(store.slot_of[12])]) == B
    check(parts, 0, [1, -1])


def test_without_slots_there_is_nothing_to_count() -> None:
    (part,) = corpus(config(), 1, 2 * B)
    leases = part.pool.leases
    assert (leases.fetched, leases.read) == (None, None)
    assert leases.counted() == {"hit": 0, "evicted": 0}
    with pytest.raises(ValueError, match=r"lease slots must be in \[0, \d+\), got"):
        BlockLeases(part.pool.map, part.pool.map.slots, torch.device("cpu"))
