"""A rank's region of memory that all ranks can read: its blocks, and the tables that find them.

The host keeps the truth (`BlockStore` and the partition's `Directory`); here is the device's copy of
it, changed in place between steps, so that what was captured in a graph goes on reading it.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ...kernels.attend import Tables
from ...kernels.plan import Directory as Records
from ...kernels.pool_map import PoolMap
from ...partition.codec import Codec, PlainCodec
from ...partition.directory import Directory
from ...partition.pool import BlockStore


class GpuPool:
    """The region of one rank, as tensors. `peers` (W,) int64 is where each rank's begins, here.

    `slot_of` (keys,), `generation` (slots,) and `fill` (layers, slots), all int32, are what other
    ranks read, too; `directory` is this rank's view of where blocks are. No address ever changes.
    """

    def __init__(
        self,
        memory: Tensor,
        pool_map: PoolMap,
        codec: Codec,
        *,
        rank: int,
        peers: Tensor | None = None,
    ) -> None:
        """Lay an empty pool out in `memory` (num_bytes,) uint8; without `peers` of a world of one.

        Raises: ValueError if the memory or the codec is not what the map says.
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
        self._stored = codec.stored if isinstance(codec, PlainCodec) else torch.uint8
        keys, slots = pool_map.keys, pool_map.slots
        self.slot_of = self._ints(pool_map.slot_of, keys).fill_(-1)
        self.generation = self._ints(pool_map.generation, slots).zero_()
        self.fill = self._ints(pool_map.fill, pool_map.layers * slots).view(-1, slots).zero_()
        nowhere = torch.tensor([-1, -1, 0, 0], dtype=torch.int32, device=memory.device)
        self.directory = Records(nowhere.repeat(keys, 1), pool_map.block_tokens, 1)
        self._tables: tuple[int, Directory | None, tuple[int, ...] | None] = (-1, None, None)
        self._fill_versions = [0] * pool_map.layers

    def storage(self) -> list[Tensor]:
        """Of each layer the bytes of its blocks, for a `BlockStore` to keep its rows in."""
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
            askable: (W,) uint8, whom a plan may ask, see `kernels.plan.Directory.of`; None: all.
        """
        asked = None if askable is None else tuple(askable.tolist())
        version, known, whom = self._tables
        same = version == store.version and known is directory and whom == asked
        if not same:
            self.directory.records.copy_(self._records(store, directory, askable))
        written = [
            layer for layer, n in enumerate(store.fill_versions) if n != self._fill_versions[layer]
        ]
        if version != store.version:
            self.slot_of.copy_(store.slot_of)
            self.generation.copy_(store.generation)
            self.fill.copy_(store.fill)
        else:
            for layer in written:
                self.fill[layer].copy_(store.fill[layer])
        self._tables = (store.version, directory, asked)
        self._fill_versions = list(store.fill_versions)
        return not same or bool(written)

    def _records(self, store: BlockStore, directory: Directory, askable: Tensor | None) -> Tensor:
        """(keys, 4) int32: of the corpus as the directory says, of private blocks as they are here."""
        corpus = len(directory.generations)
        slots = store.slot_of[corpus:]
        here, slots_or_0 = slots >= 0, slots.clamp(min=0).long()
        owners = torch.where(here, self.rank, -1)[:, None].expand(-1, directory.owners.shape[1])
        full = torch.full_like(slots, store.block_tokens)
        return Records.of(
            torch.cat((directory.owners, owners.to(torch.int32))),
            torch.cat((directory.generations, store.generation[slots_or_0])),
            torch.cat((directory.tokens, full)),
            store.slot_of,
            rank=self.rank,
            block_tokens=store.block_tokens,
            num_branches=1,
            askable=askable,
        ).records

    def _ints(self, start: int, count: int) -> Tensor:
        return self.memory[start : start + 4 * count].view(torch.int32)
