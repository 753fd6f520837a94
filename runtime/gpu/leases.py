"""Leases on a GPU: whole closed blocks of others, kept in the last slots of this rank's region.

Kernels count what is fetched of each block and what is read of each lease. Between steps `admit.py` pulls
the blocks that were fetched most, of all layers, straight out of their owners' regions, and from the
next refresh on this rank's tables say that they are here: a plan then takes them for local. That is
this rank's affair alone. Others may see a lease in its `slot_of`, but directories name owners, so
nobody looks for one there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.pool_layout import PoolLayout
from ...partition.directory import Directory
from ...partition.pool import BlockStore


class BlockLeases:
    """What is leased, on the host, and the device's counters.

    `key_of` (slots,) int64 has the block of each lease slot, -1 where it is free, `generation` (slots,)
    int32 its generation. On the device, since the last `admit`: `fetched` (keys,) int32, entries of
    each block that were fetched, once a step; `read` (slots,) int32, entries of each lease that items
    read. Both are None without slots. `version` is raised by what changes.
    """

    def __init__(self, pool_map: PoolLayout, slots: int, device: torch.device) -> None:
        """Nothing is leased, in the last `slots` of the map's. Raises: ValueError if it has no more."""
        if not 0 <= slots < pool_map.slots:
            raise ValueError(f"lease slots must be in [0, {pool_map.slots}), got {slots}")
        self.first = pool_map.slots - slots
        self.key_of = torch.full((slots,), -1)
        self.generation = torch.zeros(slots, dtype=torch.int32)
        self.version = 0
        self.fetched = self.read = None
        if slots:
            self.fetched = torch.zeros(pool_map.keys, dtype=torch.int32, device=device)
            self.read = torch.zeros(slots, dtype=torch.int32, device=device)
        self._hits, self._evicted = 0, 0

    def counted(self) -> dict[str, int]:
        """Entries of leases that were read so far, and leases that made room for others."""
        hits = self._hits + (0 if self.read is None else int(self.read.sum()))
        return {"hit": hits, "evicted": self._evicted}

    def beside(self, store: BlockStore) -> tuple[Tensor, Tensor, Tensor]:
        """The store's slot_of (keys,), generation and fill (layers, all slots) with the leases."""
        held = self.key_of >= 0
        slot_of = store.slot_of.clone()
        slot_of[self.key_of[held]] = (held.nonzero()[:, 0] + self.first).to(torch.int32)
        written = (held * store.block_tokens).to(torch.int32).expand(len(store.fill), -1)
        generation = torch.cat((store.generation, self.generation))
        return slot_of, generation, torch.cat((store.fill, written), 1)

    def drop_outdated(self, directory: Directory) -> None:
        """Forget blocks that were given up since they were leased: their generation was raised."""
        known = directory.generations[self.key_of.clamp(min=0)]
        self.drop(((self.key_of >= 0) & (known != self.generation)).nonzero()[:, 0])

    def drop(self, slots: Tensor | None = None) -> None:
        """Forget what is in these lease slots (n,), counted from the first; None: in all."""
        at = torch.arange(len(self.key_of)) if slots is None else slots
        if bool((self.key_of[at] >= 0).any()):
            self.key_of[at] = -1
            self.version += 1

    def make_room(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Begin to count anew, and free a lease slot for each of the first candidates.

        Args: counts: (n,) entries of each candidate that were fetched, falling.
        Returns: (m,) int64 free lease slots for the first m, as long as the next one is free, or was
        read less than its candidate was fetched; and the blocks (e,) int64 that were there.
        """
        assert self.read is not None
        read = self.read.cpu()
        self._hits += int(read.sum())
        worth, slots = torch.where(self.key_of >= 0, read, -1).sort(stable=True)
        self.read.zero_()
        count = min(len(slots), len(counts))
        slots = slots[:count][worth[:count] < counts[:count]]  # worth rises, so these are the first
        evicted = self.key_of[slots][self.key_of[slots] >= 0]
        self._evicted += len(evicted)
        self.drop(slots)
        return slots, evicted

    def take(self, slots: Tensor, keys: Tensor, generations: Tensor) -> None:
        """Blocks (n,) of these generations are now in free lease slots (n,)."""
        self.key_of[slots] = keys
        self.generation[slots] = generations.to(torch.int32)
        self.version += 1
