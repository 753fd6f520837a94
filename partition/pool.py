"""The only owner of mutable KV tensors: preallocated blocks, and what they hold.

Letters: L layers, S slots, B tokens of a block, K keys. A `BlockStore` maps keys to slots, and a
(layer, stored id) to an entry index `slot * B + offset` into that layer's tensor. Entries are
written once, in order, so an entry that exists never changes. The tables are on the host, wherever
the blocks lie.

Any thread may read a store at any time, without waiting: an entry is written before `fill` counts it.
Changes exclude each other, because an engine and the server beside it append to the same blocks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Concatenate, Literal, ParamSpec, get_args

import torch
from torch import Tensor

from .codec import Codec, gather_rows, scatter_rows
from .lease_table import LeaseTable
from .residence import Places, Residence

# Which stores exist: entries, by (block, branch), and index keys, by block.
Kind = Literal["entries", "index"]
KINDS: tuple[Kind, ...] = get_args(Kind)

P = ParamSpec("P")


def _alone(
    change: Callable[Concatenate[BlockStore, P], None],
) -> Callable[Concatenate[BlockStore, P], None]:
    """One change of a store at a time."""

    @wraps(change)
    def guarded(store: BlockStore, /, *args: P.args, **named: P.kwargs) -> None:
        with store._changing:
            change(store, *args, **named)

    return guarded


class BlockStore:
    """Blocks of one kind (entries, or index keys) for all layers, with the same slots in each."""

    def __init__(
        self,
        codecs: Sequence[Codec | None],
        *,
        num_slots: int,
        num_keys: int,
        block_tokens: int,
        lease_entries: int = 0,
        storage: Sequence[Tensor] | None = None,
    ) -> None:
        """Allocate `num_slots` blocks and `lease_entries` single entries a layer.

        Layers whose codec is None store nothing. Entry indices from `first_lease` on are leases.

        Args:
            storage: where rows are kept, instead of new memory: of each layer uint8 bytes for all of its
                blocks and leases, on one device. Rows that are read come back on the host.
        Raises: ValueError if there is no slot, stored ids would not fit in int32, or the storage is of
        other sizes.
        """
        if num_slots < 1 or num_keys * block_tokens >= 2**31:
            raise ValueError(
                f"{num_slots} slots, {num_keys} keys of {block_tokens} tokens: "
                "slots must be >= 1 and stored ids below 2**31"
            )
        self._changing = threading.RLock()
        self.codecs = tuple(codecs)
        self.block_tokens = block_tokens
        self.num_slots = num_slots
        self.first_lease = num_slots * block_tokens
        self._lease_entries = lease_entries
        if lease_entries and any(codec and len(codec.planes) > 1 for codec in self.codecs):
            raise ValueError("entries of a codec with several planes cannot be leased")
        sizes = [
            (self.first_lease + lease_entries) * (codec.entry_bytes if codec else 0)
            for codec in self.codecs
        ]
        if storage is None:
            storage = [torch.empty(size, dtype=torch.uint8) for size in sizes]
        given = [(part.dtype, *part.shape) for part in storage]
        if given != [(torch.uint8, size) for size in sizes]:
            raise ValueError(f"storage must be uint8 of {sizes} bytes, layer by layer, got {given}")
        self._storage = list(storage)
        self.device = self._storage[0].device
        self.fill = torch.zeros(len(self.codecs), num_slots, dtype=torch.int32)
        self.slot_of = torch.full((num_keys,), -1, dtype=torch.int32)
        self.key_of = torch.full((num_slots,), -1, dtype=torch.int32)
        self.generation = torch.zeros(num_slots, dtype=torch.int32)
        # Raised by what changes: slots and all fills; and, by layer, its fill.
        self.version, self.fill_versions = 0, [0] * len(self.codecs)
        self.block_residence, self.lease_residence = Residence(), Residence()
        self._places = Places(num_slots, self.block_residence)

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks of all layers, held or free."""
        return sum(storage.numel() for storage in self._storage) - self.lease_bytes

    @property
    def lease_bytes(self) -> int:
        """Bytes kept for leases, behind the blocks."""
        entry_bytes = sum(codec.entry_bytes for codec in self.codecs if codec)
        return self._lease_entries * entry_bytes

    @property
    def held_bytes(self) -> int:
        """Encoded bytes of the blocks that have a slot."""
        block_bytes = sum(codec.entry_bytes for codec in self.codecs if codec) * self.block_tokens
        return int((self.key_of >= 0).sum()) * block_bytes

    @_alone
    def assign(self, keys: Tensor, slots: Tensor, generations: Tensor | None = None) -> None:
        """Give free `slots` (n,) to `keys` (n,), of these `generations` or of the slots' next."""
        assert bool((self.key_of[slots.long()] == -1).all()), "slot in use"
        self.fill[:, slots.long()] = 0
        self._places.take(slots.long(), time.monotonic())
        if generations is not None:
            self.generation[slots.long()] = generations.to(torch.int32)
        self.key_of[slots.long()] = keys.to(torch.int32)
        self.slot_of[keys.long()] = slots.to(torch.int32)
        self.version += 1

    @_alone
    def release(self, keys: Tensor) -> None:
        """Free the slots of `keys`; the next block in them gets another generation."""
        slots = self.slot_of[keys.long()].long()
        self.slot_of[keys.long()] = -1
        self.key_of[slots] = -1
        self.generation[slots] += 1
        self._places.leave(slots, time.monotonic())
        self.version += 1

    @_alone
    def touch(self, entry_index: Tensor) -> None:
        """Count a use of the blocks of these entries (n,); leases have their own count."""
        slots = torch.zeros(self.num_slots + 1, dtype=torch.bool)
        slots[(entry_index // self.block_tokens).clamp(max=self.num_slots)] = True
        self._places.use(slots[:-1].nonzero()[:, 0], time.monotonic())

    def holds(self, stored_ids: Tensor) -> Tensor:
        """Whether the block of each stored id has a slot here; padding (-1) does not."""
        keys = stored_ids.long() // self.block_tokens
        known = (stored_ids >= 0) & (keys < len(self.slot_of))
        return known & (self.slot_of[torch.where(known, keys, 0)] >= 0)

    def resolve(self, layer: int, stored_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Entry index (int64) of each stored id and whether it is here and written; any shape.

        Ids outside the table count as absent, whatever their value.
        """
        ids = stored_ids.long()
        keys = ids // self.block_tokens
        known = (ids >= 0) & (keys < len(self.slot_of))
        slots = self.slot_of[torch.where(known, keys, 0)].long()
        offset = ids % self.block_tokens
        slots_or_0 = slots.clamp(min=0)
        valid = known & (slots >= 0) & (offset < self.fill[layer][slots_or_0])
        return torch.where(valid, slots_or_0 * self.block_tokens + offset, 0), valid

    def identify(self, entry_index: Tensor) -> tuple[Tensor, Tensor]:
        """(stored id, generation) of the entries at these indices: what is really there."""
        slots = entry_index // self.block_tokens
        ids = self.key_of[slots].long() * self.block_tokens + entry_index % self.block_tokens
        return ids, self.generation[slots]

    @_alone
    def write(self, layer: int, stored_ids: Tensor, rows: Tensor) -> None:
        """Append encoded rows (n, entry_bytes) at stored ids (n,) of blocks that are here.

        Raises: ValueError unless every block's new entries follow its last one, without gap or
        overwrite; nothing is written then.
        """
        codec = self.codecs[layer]
        if codec is None:
            raise ValueError(f"layer {layer} stores nothing of this kind")
        ids = stored_ids.long()
        if rows.shape != (len(ids), codec.entry_bytes) or rows.dtype != torch.uint8:
            raise ValueError(
                f"rows must be uint8 ({len(ids)}, {codec.entry_bytes}), "
                f"got {rows.dtype} {tuple(rows.shape)}"
            )
        if not bool(self.holds(ids).all()):
            raise ValueError("a block to be written is not held here")
        slots = self.slot_of[ids // self.block_tokens].long()
        offset = ids % self.block_tokens
        fill = self.fill[layer]
        added = torch.zeros_like(fill).index_add(0, slots, torch.ones_like(slots, dtype=fill.dtype))
        end = fill.scatter_reduce(0, slots, (offset + 1).to(fill.dtype), "amax")
        in_order = bool((fill[slots] <= offset).all()) and bool((fill + added == end).all())
        if not in_order or len(ids.unique()) != len(ids):
            raise ValueError(
                "entries are written once and in order; these would leave a gap or overwrite some"
            )
        at = slots * self.block_tokens + offset
        to = self._blocks(layer, codec)
        scatter_rows(to, codec, self.block_tokens, at.to(self.device), rows.to(self.device))
        fill.copy_(end)
        self.fill_versions[layer] += 1

    def rows(self, layer: int, entry_index: Tensor) -> Tensor:
        """Encoded rows (n, entry_bytes) at the entry indices (n,), leases included; on the host."""
        codec = self.codecs[layer]
        assert codec is not None
        at = entry_index.to(self.device)
        if len(codec.planes) == 1:
            single = self._storage[layer].view(-1, codec.entry_bytes)
            return gather_rows(single, codec, 1, at).cpu()
        return gather_rows(self._blocks(layer, codec), codec, self.block_tokens, at).cpu()

    def copy_out(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Copy the blocks of n slots, all of each whether written or not, to encoded `rows`
        (n, B, entry_bytes).
        """
        for plane, part in self._planes_beside(layer, rows):
            if plane.device == part.device:
                torch.index_select(plane, 0, slots, out=part)
            else:
                part.copy_(plane.index_select(0, slots.to(plane.device)))

    @_alone
    def copy_in(self, layer: int, slots: Tensor, rows: Tensor, tokens: Tensor) -> None:
        """Write n whole blocks at once: of each, the first `tokens` (n,) of encoded `rows`
        (n, B, entry_bytes) count.

        Raises: ValueError if something was written there already.
        """
        if bool(self.fill[layer, slots].any()):
            raise ValueError(
                "entries are written once; a whole block was given for one that has some already"
            )
        for plane, part in self._planes_beside(layer, rows):
            for slot, columns in zip(slots.tolist(), part, strict=True):
                plane[slot].copy_(columns)
        self.fill[layer, slots] = tokens
        self.fill_versions[layer] += 1

    def read(self, layer: int, entry_index: Tensor, dtype: torch.dtype) -> Tensor:
        """Decoded entries (*shape, D) at entry indices of any shape."""
        codec = self.codecs[layer]
        assert codec is not None
        rows = self.rows(layer, entry_index.reshape(-1))
        return codec.decode(rows, dtype).reshape(*entry_index.shape, codec.dim)

    def leases(self, layer: int) -> LeaseTable:
        """A new, empty lease table over this layer's lease entries."""
        codec = self.codecs[layer]
        assert codec is not None
        rows = self._storage[layer].view(-1, codec.entry_bytes)[self.first_lease :]
        return LeaseTable(rows, first=self.first_lease, residence=self.lease_residence)

    def _planes_beside(self, layer: int, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The planes (slots, B, bytes) of a layer, each with its columns of `rows` (n, B, bytes)."""
        codec = self.codecs[layer]
        assert codec is not None
        sizes = [self.block_tokens * width for width in codec.planes]
        planes = self._blocks(layer, codec).split_with_sizes(sizes, dim=1)
        views = [plane.view(self.num_slots, self.block_tokens, -1) for plane in planes]
        return list(zip(views, rows.split_with_sizes(codec.planes, dim=2), strict=True))

    def _blocks(self, layer: int, codec: Codec) -> Tensor:
        block_bytes = self.block_tokens * codec.entry_bytes
        return self._storage[layer][: self.num_slots * block_bytes].view(
            self.num_slots, block_bytes
        )
