"""A rank's region of memory that all ranks can read: its blocks, and the tables that find them.

The host keeps the truth (`BlockStore` and the partition's `Directory`); here is the device's copy of
it, changed in place between steps, so that what was captured in a graph goes on reading it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...kernels.attend import Tables
from ...kernels.plan import BlockTable
from ...kernels.pool_layout import PoolLayout
from ...partition.codec import Codec, PlainCodec
from ...partition.directory import Directory
from ...partition.pool import BlockStore
from .leases import BlockLeases


class GpuPool:
    """The region of one rank, as tensors. `peers` (W,) int64 is where each rank's begins, here.

    `slot_of` (keys,), `generation` (slots,) and `fill` (layers, slots), all int32, are what other
    ranks read, too; `directory` is this rank's view of where blocks are. No address ever changes.
    `leases` has what lies in the last slots, behind the store's.
    """

    def __init__(
        self,
        memory: Tensor,
        pool_map: PoolLayout,
        codec: Codec,
        *,
        rank: int,
        peers: Tensor | None = None,
        lease_slots: int = 0,
    ) -> None:
        """Lay an empty pool out in `memory` (num_bytes,) uint8; without `peers` of a world of one.

        Raises: ValueError if the memory, the codec or the lease slots are not what the map says.
        """
        if memory.dtype != torch.uint8 or memory.shape != (pool_map.num_bytes,):
            raise ValueError(
                f"the region must be uint8 ({pool_map.num_bytes},), "
                f"got {memory.dtype} {tuple(memory.shape)}"
            )
        if codec.entry_bytes != pool_map.entry_bytes:
            raise ValueError(
                f"entries of {pool_map.entry_bytes} bytes were mapped, {codec.name!r} stores "
                f"{codec.entry_bytes}"
            )
        self.memory, self.map, self.rank = memory, pool_map, rank
        self.peers = torch.tensor([memory.data_ptr()]).to(memory.device) if peers is None else peers
        self.leases = BlockLeases(pool_map, lease_slots, memory.device)
        self._stored = codec.stored if isinstance(codec, PlainCodec) else torch.uint8
        keys, slots = pool_map.keys, pool_map.slots
        self.slot_of = self._ints(pool_map.slot_of, keys).fill_(-1)
        self.generation = self._ints(pool_map.generation, slots).zero_()
        self.fill = self._ints(pool_map.fill, pool_map.layers * slots).view(-1, slots).zero_()
        nowhere = torch.tensor([-1, -1, 0, 0], dtype=torch.int32, device=memory.device)
        self.directory = BlockTable(nowhere.repeat(keys, 1), pool_map.block_tokens, 1)
        self._tables: tuple[tuple[int, int], Directory | None, tuple[int, ...] | None]
        self._tables = ((-1, -1), None, None)
        self._fill_versions = [0] * pool_map.layers

    def storage(self) -> list[Tensor]:
        """Of each layer the bytes of its blocks and leases, for a `BlockStore` to keep its rows in."""
        starts = [self.map.entries_of(layer) for layer in range(self.map.layers + 1)]
        return [self.memory[a:b] for a, b in pairwise(starts)]

    def entries(self, layer: int) -> Tensor:
        """(rows, D) of the codec's dtype (fp8: bytes), from the layer's first row to the last staged."""
        region = self.memory[self.map.entries_of(layer) :]
        return region.view(-1, self.map.entry_bytes).view(self._stored)

    def tables(self, layer: int) -> Tables:
        """Where the stored ids of a layer are."""
        return Tables(self.slot_of, self.generation, self.fill[layer], self.map.block_tokens)

    def refresh(
        self, store: BlockStore, directory: Directory, askable: Tensor | None = None
    ) -> bool:
        """Copy what changed since the last time, on the current stream; whether anything did.

        Args:
            store: keeps its rows here. directory: of the corpus; keys beyond it are private.
            askable: (W,) uint8, whom a plan may ask, see `kernels.plan.BlockTable.of`; None: all.
        """
        self.leases.drop_outdated(directory)
        asked = None if askable is None else tuple(askable.tolist())
        versions = (store.version, self.leases.version)
        last, known, whom = self._tables
        same = last == versions and known is directory and whom == asked
        written = [
            layer for layer, n in enumerate(store.fill_versions) if n != self._fill_versions[layer]
        ]
        if not same:
            slot_of, generation, fill = self.leases.beside(store)
            # In this order, so that the tables of a rank that dies meanwhile never give a block the
            # fill of what was in its slot before (`rescue.py`).
            self.fill.copy_(fill)
            self.generation.copy_(generation)
            self.slot_of.copy_(slot_of)
            records = self._records(store, slot_of, directory, askable)
            self.directory.records.copy_(records)
        else:
            for layer in written:
                self.fill[layer, : store.num_slots].copy_(store.fill[layer])
        self._tables = (versions, directory, asked)
        self._fill_versions = list(store.fill_versions)
        return not same or bool(written)

    def _records(
        self, store: BlockStore, slot_of: Tensor, directory: Directory, askable: Tensor | None
    ) -> Tensor:
        """(keys, 4) int32: of the corpus as the directory says, of private blocks as they are here."""
        corpus = len(directory.generations)
        slots = store.slot_of[corpus:]
        here, slots_or_0 = slots >= 0, slots.clamp(min=0).long()
        owners = torch.where(here, self.rank, -1)[:, None].expand(-1, directory.owners.shape[1])
        full = torch.full_like(slots, store.block_tokens)
        return BlockTable.of(
            torch.cat((directory.owners, owners.to(torch.int32))),
            torch.cat((directory.generations, store.generation[slots_or_0])),
            torch.cat((directory.tokens, full)),
            slot_of,
            rank=self.rank,
            block_tokens=store.block_tokens,
            num_branches=1,
            askable=askable,
        ).records

    def _ints(self, start: int, count: int) -> Tensor:
        return self.memory[start : start + 4 * count].view(torch.int32)
