"""Documents to blocks, and (block, branch) to its copies: frozen tables and pure deltas.

Letters: K keys, R copies, G branches, B tokens of a block. A key is `block * G + branch`.
Ids: an entry id is `block * B + offset`; a stored id is `key * B + offset`, one per branch.
Every rank holds an equal directory, because every rank applies the same deltas in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A named run of blocks: entry ids [start, start + tokens), positions from `position` on."""

    name: str
    first_block: int
    tokens: int
    position: int
    block_tokens: int

    @property
    def start(self) -> int:
        return self.first_block * self.block_tokens

    @property
    def num_blocks(self) -> int:
        return -(-self.tokens // self.block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """The tables; tensors are never written in place.

    Args:
        owners: (K, R) int32, rank of each copy, -1 where the key is unused.
        slots: (K, R) int32, slot of that copy in its rank's pool.
        generations: (K,) int32, raised when a slot is given to another block.
        tokens: (blocks,) int32, entries a block holds once its document is written.
        used: (W,) int64, slots taken at each rank.
        version: changes with every delta; headers carry it.
    """

    block_tokens: int
    num_branches: int
    documents: Mapping[str, Document]
    owners: Tensor
    slots: Tensor
    generations: Tensor
    tokens: Tensor
    used: Tensor
    num_blocks: int
    version: int

    @property
    def max_blocks(self) -> int:
        return len(self.tokens)

    def document(self, name: str) -> Document:
        if name not in self.documents:
            known = ", ".join(sorted(self.documents)[:8]) or "none"
            raise ValueError(f"unknown document {name!r}; known: {known}")
        return self.documents[name]


def empty_directory(
    *, max_blocks: int, block_tokens: int, num_branches: int, copies: int, world_size: int
) -> Directory:
    keys = max_blocks * num_branches
    return Directory(
        block_tokens=block_tokens,
        num_branches=num_branches,
        documents=MappingProxyType({}),
        owners=torch.full((keys, copies), -1, dtype=torch.int32),
        slots=torch.full((keys, copies), -1, dtype=torch.int32),
        generations=torch.zeros(keys, dtype=torch.int32),
        tokens=torch.zeros(max_blocks, dtype=torch.int32),
        used=torch.zeros(world_size, dtype=torch.int64),
        num_blocks=0,
        version=0,
    )


def with_document(
    directory: Directory, name: str, *, tokens: int, position: int, ranks: Tensor, capacity: int
) -> Directory:
    """The directory with one more document whose copies live at `ranks`.

    Args:
        ranks: (N, G, R) int32 from `place`.
        capacity: slots of one rank's pool.
    Raises:
        ValueError: name taken, no tokens, or a capacity exhausted; nothing is changed.
    """
    block_tokens, branches = directory.block_tokens, directory.num_branches
    num_blocks = -(-tokens // block_tokens)
    if name in directory.documents:
        raise ValueError(f"document {name!r} exists already")
    if tokens <= 0 or position < 0:
        raise ValueError(f"document {name!r}: needs tokens > 0 and position >= 0")
    first = directory.num_blocks
    if first + num_blocks > directory.max_blocks:
        raise ValueError(
            f"document {name!r} needs {num_blocks} blocks, "
            f"{directory.max_blocks - first} of {directory.max_blocks} are free"
        )
    per_key = ranks.reshape(num_blocks * branches, -1).long()
    world = len(directory.used)
    taken = torch.nn.functional.one_hot(per_key.reshape(-1), world)
    before = directory.used + taken.cumsum(0) - taken
    slots = before.gather(1, per_key.reshape(-1, 1)).reshape(per_key.shape)
    used = directory.used + taken.sum(0)
    if int(used.max()) > capacity:
        rank = int(used.argmax())
        raise ValueError(
            f"document {name!r} does not fit: rank {rank} would hold {int(used[rank])} "
            f"(block, branch) slots, its pool has {capacity}"
        )
    document = Document(
        name=name,
        first_block=first,
        tokens=tokens,
        position=position,
        block_tokens=block_tokens,
    )
    keys = slice(first * branches, (first + num_blocks) * branches)
    fills = torch.full((num_blocks,), block_tokens, dtype=torch.int32)
    fills[-1] = tokens - (num_blocks - 1) * block_tokens
    where = torch.stack((per_key, slots)).numpy().tobytes()
    delta = f"{directory.version}:{name}:{tokens}:{position}".encode() + where
    return replace(
        directory,
        documents=MappingProxyType({**directory.documents, name: document}),
        owners=_updated(directory.owners, keys, per_key),
        slots=_updated(directory.slots, keys, slots),
        tokens=_updated(directory.tokens, slice(first, first + num_blocks), fills),
        used=used,
        num_blocks=first + num_blocks,
        version=zlib.crc32(delta),
    )


def _updated(table: Tensor, rows: slice, values: Tensor) -> Tensor:
    table = table.clone()
    table[rows] = values.to(table.dtype)
    return table
