"""Which fetched entries a rank keeps for reuse, in rows that the block pool gave it for that."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from .residence import Places, Residence


class LeaseTable:
    """Fetched copies of entries of one layer, kept for reuse in a bounded, least-recently-used table.

    A lease is found by binary search in sorted stored ids; nothing grows after the start.
    """

    def __init__(self, rows: Tensor, *, first: int, residence: Residence | None = None) -> None:
        """`rows` (capacity, entry_bytes) uint8 is where leases are kept; `first` its entry index."""
        self._rows = rows
        self._first = first
        self.capacity = capacity = len(rows)
        self._id_at = torch.full((capacity,), -1, dtype=torch.int64)
        self._generation_at = torch.zeros(capacity, dtype=torch.int32)
        self._used_at = torch.full((capacity,), -1, dtype=torch.int64)
        self._sorted_ids, self._order = self._id_at.sort(stable=True)
        self._tick = 0
        self._places = Places(capacity, residence or Residence())

    def find(self, stored_ids: Tensor, generations: Tensor) -> tuple[Tensor, Tensor]:
        """Entry index (int64) of each id's lease, and whether it is leased in that generation."""
        ids = stored_ids.long()
        if self.capacity == 0:
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        at = torch.searchsorted(self._sorted_ids, ids).clamp(max=self.capacity - 1)
        lease = self._order[at]
        found = (self._id_at[lease] == ids) & (ids >= 0)
        found &= self._generation_at[lease] == generations
        return torch.where(found, lease + self._first, 0), found

    def touch(self, entry_index: Tensor) -> None:
        """Mark the leases at these entry indices (n,) as used now."""
        self._tick += 1
        self._used_at[entry_index - self._first] = self._tick
        used = torch.zeros(self.capacity, dtype=torch.bool)
        used[entry_index - self._first] = True
        self._places.use(used.nonzero()[:, 0], time.monotonic())

    def forget(self, gone: Tensor) -> None:
        """Give up the leases of these entries (n,) by stored id."""
        old = torch.isin(self._id_at, gone.long())
        self._id_at[old], self._used_at[old] = -1, -1
        self._places.leave(old.nonzero()[:, 0], time.monotonic())
        self._sorted_ids, self._order = self._id_at.sort(stable=True)

    def admit(self, stored_ids: Tensor, generations: Tensor, rows: Tensor) -> int:
        """Keep rows (n, entry_bytes) of distinct ids (n,) that are not leased, evicting the stalest.

        Beyond the capacity only the first rows are kept. Returns the number evicted.
        """
        count = min(len(stored_ids), self.capacity)
        if count == 0:
            return 0
        outdated = torch.isin(self._id_at, stored_ids[:count].long())  # of another generation
        self._id_at[outdated], self._used_at[outdated] = -1, -1
        now_s = time.monotonic()
        self._places.leave(outdated.nonzero()[:, 0], now_s)
        victims = self._used_at.argsort(stable=True)[:count]
        evicted = int((self._id_at[victims] >= 0).sum())
        self._rows[victims] = rows[:count]
        self._id_at[victims] = stored_ids[:count].long()
        self._generation_at[victims] = generations[:count].to(torch.int32)
        self._places.leave(victims, now_s)
        self._places.take(victims, now_s)
        self.touch(victims + self._first)
        self._sorted_ids, self._order = self._id_at.sort(stable=True)
        return evicted
