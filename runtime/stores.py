"""Stores: the blocks that this rank keeps, entries and index keys, with their slots and leases.

Entry ids name tokens of all branches, stored ids those of one (`partition/directory.py`). Ids beyond
the corpus are of a running request's private blocks, which only this rank has.

Letters: n ids, G branches, B tokens of a block, K keys, R copies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..partition.codec import Codec, make_codec
from ..partition.directory import Directory
from ..partition.layout import Layout
from ..partition.lease_table import LeaseTable as LeaseTable
from ..partition.pool import BlockStore, Kind
from ..partition.snapshot.record import BlockHashes
from .config import RuntimeConfig


class Stores:
    """One rank's `entries` and `index` stores, the `leases` of each layer, and `hashes` of blocks."""

    def __init__(
        self, config: RuntimeConfig, world_size: int, storage: Sequence[Tensor] | None = None
    ) -> None:
        """Args: storage: memory for the entries of each layer, of a backend that leases whole blocks
        itself; without it, new memory on the host with a lease table a layer.
        """
        self._config = config
        layers = config.model.layers
        self.corpus_slots = config.slots_for(world_size)
        self.index_slots = index_slots(config, world_size)
        self.entries = BlockStore(
            [entry_codec(layout) for layout in layers],
            num_slots=entry_slots(config, world_size),
            num_keys=config.max_ids,
            block_tokens=config.block_tokens,
            lease_entries=config.lease_entries,
            storage=storage,
        )
        index_codecs = [index_codec(layout) for layout in layers]
        self.has_index = any(index_codecs)
        self.index = BlockStore(
            index_codecs,
            num_slots=max(self.index_slots + config.private_blocks, 1) if self.has_index else 1,
            num_keys=config.max_ids // config.num_branches,
            block_tokens=config.block_tokens,
        )
        self.hashes: dict[Kind, BlockHashes] = {
            "entries": BlockHashes(config.max_blocks * config.num_branches),
            "index": BlockHashes(config.max_blocks if self.has_index else 0),
        }
        self.leases: list[LeaseTable] = []
        if storage is None:
            self.leases = [self.entries.leases(layer) for layer in range(len(layers))]

    def of(self, kind: Kind) -> BlockStore:
        """The store of that kind."""
        return self.entries if kind == "entries" else self.index

    def drop_leases(self) -> None:
        """Forget every lease of the tables here."""
        self.leases = [self.entries.leases(layer) for layer in range(len(self.leases))]

    def stored_ids(self, ids: Tensor) -> Tensor:
        """Stored ids (n * G,) int32 of entry ids (n,), all branches of an entry together."""
        block_tokens, branches = self._config.block_tokens, self._config.num_branches
        block, offset = ids // block_tokens, ids % block_tokens
        keys = block[:, None] * branches + torch.arange(branches, dtype=torch.int32)
        return (keys * block_tokens + offset[:, None]).reshape(-1)

    def keys_of(self, kind: Kind, blocks: Tensor) -> Tensor:
        """The keys of blocks (n,) in the store of a kind: (n * G,), or (n,) of index keys."""
        if kind == "index":
            return blocks if self.has_index else blocks[:0]
        branches = self._config.num_branches
        return (blocks[:, None] * branches + torch.arange(branches)).reshape(-1)

    def branches_of(self, kind: Kind) -> int:
        """Keys of a block in the store of a kind."""
        return self._config.num_branches if kind == "entries" else 1

    def corpus_ids(self, kind: Kind) -> int:
        """Stored ids below this belong to the corpus; those above are private and never leave home."""
        return self._config.max_blocks * self._config.block_tokens * self.branches_of(kind)

    # Blocks of the corpus ------------------------------------------------------------------------

    def release_missing(self, directory: Directory, rank: int) -> None:
        """Free the slots of copies that the directory does not have at `rank` any more."""
        here = directory.owners == rank
        keys = (self.entries.slot_of[: len(here)] >= 0) & ~here.any(1)
        self.entries.release(keys.nonzero()[:, 0])
        if self.has_index and self._config.index_placement == "with-blocks":
            firsts = here[:: self._config.num_branches].any(1)
            blocks = (self.index.slot_of[: len(firsts)] >= 0) & ~firsts
            self.index.release(blocks.nonzero()[:, 0])

    def assign_new(self, directory: Directory, rank: int) -> None:
        """Give the copies that the directory has at `rank` their slots, where they have none yet."""
        branches = self._config.num_branches
        here, wanted = directory.owners == rank, directory.references > 0
        mine, copy = here.nonzero(as_tuple=True)
        fresh = self.entries.slot_of[mine] < 0
        mine, copy = mine[fresh], copy[fresh]
        self.entries.assign(mine, directory.slots[mine, copy], directory.generations[mine])
        if self.has_index:
            fresh = wanted & (self.index.slot_of[: len(wanted)] < 0)
            if self._config.index_placement == "with-blocks":
                fresh &= here[::branches].any(1)
            blocks = fresh.nonzero()[:, 0]
            free = (self.index.key_of[: self.index_slots] < 0).nonzero()[:, 0]
            generations = directory.generations[blocks * branches]
            self.index.assign(blocks, free[: len(blocks)], generations)

    def give_up(self, blocks: Tensor) -> None:
        """Forget all that is here of these blocks (n,), leases included."""
        block_tokens = self._config.block_tokens
        keys = self.keys_of("entries", blocks)
        self.entries.release(keys[self.entries.slot_of[keys] >= 0])
        if self.has_index:
            self.index.release(blocks[self.index.slot_of[blocks] >= 0])
        stored = (keys[:, None] * block_tokens + torch.arange(block_tokens)).reshape(-1)
        for leases in self.leases:
            leases.forget(stored)

    # Private blocks ------------------------------------------------------------------------------

    def assign_private(self, block: int, seat: int) -> None:
        """Give a running request's block the private seat `seat` of this rank's pool."""
        branches = self._config.num_branches
        branch = torch.arange(branches)
        first = self.corpus_slots + seat * branches
        self.entries.assign(block * branches + branch, first + branch)
        if self.has_index:
            self.index.assign(torch.tensor([block]), torch.tensor([self.index_slots + seat]))

    def release_private(self, block: int) -> None:
        """Free a request's block."""
        self.entries.release(self.keys_of("entries", torch.tensor([block])))
        if self.has_index:
            self.index.release(torch.tensor([block]))


def entry_slots(config: RuntimeConfig, world_size: int) -> int:
    """(block, branch) copies that one rank's pool has room for, the corpus's and private ones."""
    return max(config.slots_for(world_size) + config.private_blocks * config.num_branches, 1)


def index_slots(config: RuntimeConfig, world_size: int) -> int:
    """Blocks whose index keys one rank may have to hold: with copies of their first branch, or all."""
    placement, branches = config.placement, config.num_branches
    if config.index_placement == "replicated":
        return config.max_blocks
    if placement.policy == "block-cyclic":
        rounds = -(-config.max_blocks // (placement.run * world_size))
        return min(rounds * placement.run * placement.copies, config.max_blocks)
    # Elsewhere all that a rank holds may be first branches.
    per_block = 1 if placement.policy == "branch-split" else branches
    return min(-(-config.slots_for(world_size) // per_block), config.max_blocks)


def entry_codec(layout: Layout) -> Codec:
    """How a layer's entries are stored."""
    return make_codec(layout.codec, dim=layout.entry_dim, rope_dim=layout.rope_dim)


def index_codec(layout: Layout) -> Codec | None:
    """How a layer's index keys are stored; None if it has no indexer of its own."""
    if layout.index is None:
        return None
    return make_codec(layout.index_codec, dim=layout.index.head_dim, rope_dim=layout.index.rope_dim)
