"""Live copies of blocks compared with one another: changed ones and missing ones are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from snapshot_world import B, add, world

from qroam.partition.placement import Placement
from qroam.runtime import Runtime


def test_a_copy_that_changed_is_found(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> list[Any]:
        add(runtime, "a", 30)
        sound = runtime.verify_copies()
        assert len(sound) == 8
        assert all(check.is_sound and len(check.hashes) == 2 for check in sound)
        world = runtime._world
        if runtime.rank == 1:
            key = int((world.stores.entries.slot_of[:8] >= 0).nonzero()[0])
            world.stores.entries._storage[1][
                int(world.stores.entries.slot_of[key]) * B * 64 + 5
            ] ^= 1
        return [(c.block, c.hashes, c.changed) for c in runtime.verify_copies() if not c.is_sound]

    for faults in world(3, work, placement=Placement(copies=2)):
        ((block, hashes, changed),) = faults
        assert changed == (1,)
        assert len({name for _, name in hashes}) == 2
        assert block < 8


def test_a_copy_that_is_missing_is_found_and_a_sample_is_the_same_everywhere() -> None:
    def work(runtime: Runtime) -> tuple[list[Any], list[int]]:
        add(runtime, "a", 30)
        sampled = [check.block for _ in range(4) for check in runtime.verify_copies(2)]
        if runtime.rank == 1:
            runtime._world.stores.entries.release(torch.tensor([1]))
        faults = [(c.block, c.hashes[-1]) for c in runtime.verify_copies() if not c.is_sound]
        return faults, sampled

    results = world(2, work, placement=Placement(copies=2))
    assert results[0] == results[1]
    faults, sampled = results[0]
    assert faults == [(1, (1, ""))]
    assert len(sampled) == 8
    assert len(set(sampled)) > 2
