"""Rescue: the closed blocks of a dead rank, read out of its region while that is still mapped here.

Nothing of its tables is trusted: they may hold anything, and rows are read only where they make sense.
Whether a block is the one that is wanted, its generation says, which whoever asks compares with its
directory: blocks that were given up may be half overwritten. Leases are found like the rank's own blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.pool_layout import PoolLayout


class Rescued(NamedTuple):
    """A block as its rank had it: rows (layers, block_tokens, entry_bytes) uint8, on the host."""

    key: int
    generation: int
    rows: Tensor


def rescue(
    memory: Tensor, pool_map: PoolLayout, keys: Tensor | None = None
) -> tuple[Iterator[Rescued], Tensor]:
    """The closed blocks among `keys`, one at a time, and the keys that cannot be had.

    Its tables are read once, now, so that a rank that is not quite dead cannot change them meanwhile.

    Args:
        memory: (num_bytes,) uint8, the region of the dead rank, such as `SymmetricMemory.heap_of`.
        keys: (n,) int64, distinct; None: all for which its table names a slot.
    Returns:
        the blocks in the order of the keys, read as they are asked for; and keys (m,) int64 that have
        no slot there, or one that does not exist or that several keys have, or are not closed.
    Raises: ValueError for memory that is no such region, or keys that are not distinct or beyond it.
    """
    if memory.dtype != torch.uint8 or memory.shape != (pool_map.num_bytes,):
        raise ValueError(
            f"the region must be uint8 ({pool_map.num_bytes},), "
            f"got {memory.dtype} {tuple(memory.shape)}"
        )

    def ints(start: int, count: int) -> Tensor:
        return memory[start : start + 4 * count].view(torch.int32).cpu().long()

    layers, slots = pool_map.layers, pool_map.slots
    slot_of = ints(pool_map.slot_of, pool_map.keys)
    generation = ints(pool_map.generation, slots)
    fill = ints(pool_map.fill, layers * slots).view(layers, slots)
    if keys is None:
        keys = (slot_of != -1).nonzero()[:, 0]
    elif len(keys.unique()) != len(keys) or bool(((keys < 0) | (keys >= len(slot_of))).any()):
        raise ValueError(f"keys must be distinct and in [0, {len(slot_of)}), got {keys.tolist()}")
    exists = (slot_of >= 0) & (slot_of < slots)
    holders = torch.bincount(slot_of[exists], minlength=slots)  # keys that claim a slot
    closed = (fill == pool_map.block_tokens).all(0) & (generation >= 0)
    at = torch.where(exists, slot_of, 0)[keys]
    had = exists[keys] & (holders[at] == 1) & closed[at]

    def blocks() -> Iterator[Rescued]:
        block_bytes = pool_map.block_tokens * pool_map.entry_bytes
        for key, slot in zip(keys[had].tolist(), at[had].tolist(), strict=True):
            starts = [pool_map.entries_of(layer) + slot * block_bytes for layer in range(layers)]
            rows = torch.stack([memory[start : start + block_bytes] for start in starts])
            shaped = rows.cpu().view(layers, pool_map.block_tokens, pool_map.entry_bytes)
            yield Rescued(key, int(generation[slot]), shaped)

    return blocks(), keys[~had]
