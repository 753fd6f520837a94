"""Rescue out of the region of a dead rank, here in memory of the host: nothing of it is trusted."""

from __future__ import annotations

import pytest
import torch
from gpu_world import LAYERS, B, Part, config, corpus
from torch import Tensor

from qroam.runtime.gpu.admit import admit
from qroam.runtime.gpu.rescue import rescue

TOKENS = 12 * B + 3  # of three ranks; the last block, of rank 0, is not closed
DEAD = 0


def world() -> list[Part]:
    return corpus(config(lease_entries=2 * B), 3, TOKENS)


def check(parts: list[Part], keys: Tensor | None, had: list[int], lacking: list[int]) -> None:
    """These blocks come, bit for bit, in this order, and the others are named."""
    pool = parts[DEAD].pool
    before = pool.memory.clone()
    blocks, without = rescue(pool.memory, pool.map, keys)
    found = list(blocks)
    assert [block.key for block in found] == had
    assert without.tolist() == lacking
    for key, generation, rows in found:
        assert generation == int(parts[DEAD].directory.generations[key])
        wanted = torch.stack([parts[key % 3].rows(layer, key) for layer in range(LAYERS)])
        assert torch.equal(rows, wanted)
    assert torch.equal(pool.memory, before)


def test_closed_blocks_come_bitwise() -> None:
    parts = world()
    check(parts, None, [0, 3, 6, 9], [12])
    check(parts, torch.tensor([9, 1, 12, 3, 23]), [9, 3], [1, 12, 23])
    check(parts, torch.tensor([], dtype=torch.int64), [], [])


def test_leases_come_as_well() -> None:
    parts = world()
    pool, store, directory = parts[DEAD]
    assert pool.leases.fetched is not None
    pool.leases.fetched[4] = 1
    admit(pool, least=1)
    pool.refresh(store, directory)
    check(parts, None, [0, 3, 4, 6, 9], [12])


def test_blocks_are_read_when_they_are_asked_for() -> None:
    pool = world()[DEAD].pool
    blocks, _ = rescue(pool.memory, pool.map)
    first = next(blocks)
    pool.storage()[0].zero_()
    second = next(blocks)
    assert bool(first.rows[0].any())
    assert not bool(second.rows[0].any())


@pytest.mark.parametrize(
    "how", ["absent", "beyond the slots", "far beyond", "below", "open", "overfull", "no such generation"]
)  # fmt: skip
def test_a_block_whose_tables_make_no_sense_cannot_be_had(how: str) -> None:
    parts = world()
    pool = parts[DEAD].pool
    slot = int(pool.slot_of[6])
    match how:
        case "absent":
            pool.slot_of[6] = -1
        case "beyond the slots":
            pool.slot_of[6] = pool.map.slots
        case "far beyond":
            pool.slot_of[6] = 2**31 - 1
        case "below":
            pool.slot_of[6] = -(2**31)
        case "open":
            pool.fill[LAYERS - 1, slot] = B - 1
        case "overfull":
            pool.fill[0, slot] = B + 1
        case "no such generation":
            pool.generation[slot] = -1
    check(parts, torch.tensor([0, 3, 6, 9]), [0, 3, 9], [6])
    check(parts, None, [0, 3, 9], [12] if how == "absent" else [6, 12])


def test_of_two_blocks_in_one_slot_neither_can_be_had() -> None:
    parts = world()
    pool = parts[DEAD].pool
    pool.slot_of[6] = pool.slot_of[3]
    check(parts, torch.tensor([3, 9]), [9], [3])  # also if the other one is not asked for
    check(parts, None, [0, 9], [3, 6, 12])


def test_random_tables_do_no_harm() -> None:
    parts = world()
    pool = parts[DEAD].pool
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        tables = pool.memory[: pool.map.entries_of(0)]
        tables.copy_(torch.randint(256, tables.shape, generator=generator, dtype=torch.uint8))
        blocks, lacking = rescue(pool.memory, pool.map)
        assert len(list(blocks)) + len(lacking) == int((pool.slot_of != -1).sum())


def test_bad_arguments() -> None:
    pool = world()[DEAD].pool
    with pytest.raises(ValueError, match="the region must be uint8"):
        rescue(pool.memory[16:], pool.map)
    for keys in ([3, 3], [-1], [pool.map.keys]):
        with pytest.raises(ValueError, match=r"keys must be distinct and in \[0, "):
            rescue(pool.memory, pool.map, torch.tensor(keys))
