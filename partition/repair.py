"""A directory for other ranks than it was made for: some are gone, some are new, all may be renumbered.

Letters: K keys, R copies, G branches, W ranks now. What is kept stays where it is: no copy moves from
one rank that is there to another. Missing copies are made anew wherever there is room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .directory import Directory, changed_version


def repaired(
    directory: Directory,
    ranks: Sequence[int],
    *,
    world_size: int,
    capacity: int,
    index_capacity: int,
) -> Directory:
    """The directory with the copies of ranks that are gone replaced, as far as there is room.

    The first copy that is left becomes the owner. A key that has none left keeps none: its
    content is lost, and new documents do not share it (`Directory.prefix`). Generations stay, for
    the blocks are the same.

    Args:
        ranks: for every former rank, which it is now, -1 if it is gone.
        capacity: (block, branch) copies that a rank can hold.
        index_capacity: blocks of whose first branch a rank can hold a copy.
    """
    now = torch.tensor([*ranks, -1])[directory.owners.long()]  # -1 stays -1
    order = (now < 0).to(torch.uint8).argsort(dim=1, stable=True)
    now = now.gather(1, order)
    slots = torch.where(now >= 0, directory.slots.long().gather(1, order), -1)
    room = _Room(now, slots, directory.num_branches, world_size, capacity, index_capacity)
    left = (now >= 0).sum(1)
    for key in ((left > 0) & (left < now.shape[1])).nonzero()[:, 0].tolist():
        for copy in range(int(left[key]), now.shape[1]):
            found = room.take(key, set(now[key, :copy].tolist()))
            if found is None:
                break
            now[key, copy], slots[key, copy] = found
    tables = torch.stack((now, slots)).numpy().tobytes()
    return replace(
        directory,
        owners=now.to(torch.int32),
        slots=slots.to(torch.int32),
        used=torch.bincount(now[now >= 0], minlength=world_size),
        version=changed_version(directory, f"repair {list(ranks)} {world_size}", tables),
    )


class _Room:
    """The free slots of every rank, given out lowest first, by ranks that hold least."""

    def __init__(
        self,
        owners: Tensor,
        slots: Tensor,
        branches: int,
        world_size: int,
        capacity: int,
        index_capacity: int,
    ) -> None:
        self._branches, self._index_capacity = branches, index_capacity
        self._free: list[list[int]] = []
        self._firsts: list[int] = []
        for rank in range(world_size):
            taken = torch.zeros(capacity, dtype=torch.bool)
            taken[slots[owners == rank]] = True
            self._free.append((~taken).nonzero()[:, 0].flip(0).tolist())
            self._firsts.append(int((owners[::branches] == rank).sum()))

    def take(self, key: int, holders: set[int]) -> tuple[int, int] | None:
        """A rank that is no holder of the key yet, and its slot; None if there is no room."""
        first = key % self._branches == 0
        able = [
            rank
            for rank, free in enumerate(self._free)
            if free
            and rank not in holders
            and not (first and self._firsts[rank] >= self._index_capacity)
        ]
        if not able:
            return None
        rank = max(able, key=lambda rank: len(self._free[rank]))  # of equals the lowest
        self._firsts[rank] += first
        return rank, self._free[rank].pop()
