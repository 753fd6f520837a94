"""Documents to blocks, and (block, branch) to its copies: frozen tables and pure deltas.

Letters: K keys, R copies, G branches, B tokens of a block. A key is `block * G + branch`.
Ids: an entry id is `block * B + offset`; a stored id is `key * B + offset`, one per branch.
Every rank holds an equal directory, because every rank applies the same deltas in the same order.
Blocks are counted by the documents that hold them; whatever gives up the last one raises the
generations of its keys, so that nothing made of the old block passes for the new one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from .bounds import MAX_DOCUMENTS, MAX_POSITION, MAX_QUOTA, MAX_TOKENS, whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A named run of `blocks`, of `tokens` entries in all, at positions from `position` on.

    `serial` distinguishes it from earlier and later documents of that name. The first `shared` blocks
    were stored by another document, and are not written again. Its blocks count for its `group`.
    `contents` are the content hashes (`prefix_hash.py`) of its full blocks; none if they are not known.
    """

    name: str
    blocks: tuple[int, ...]
    tokens: int
    position: int
    block_tokens: int
    serial: int = 0
    shared: int = 0
    group: str = ""
    contents: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def start(self) -> int:
        """The entry id of its first token; the others are in `ids`."""
        return self.blocks[0] * self.block_tokens

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def ids(self, first: int = 0, end: int | None = None) -> Tensor:
        """Entry ids int32 of its tokens [first, end), all by default."""
        at = torch.arange(first, self.tokens if end is None else end, dtype=torch.int32)
        blocks = torch.tensor(self.blocks, dtype=torch.int32)
        return blocks[at // self.block_tokens] * self.block_tokens + at % self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Directory:
    """The tables; tensors are never written in place.

    Args:
        documents: by name, in the order they were added.
        pinned: names that are neither removed nor evicted.
        quotas: blocks that the documents of a group may have.
        hashed: the block that holds a content, of the last document that has it.
        owners: (K, R) int32, rank of each copy, -1 where the key is unused.
        slots: (K, R) int32, slot of that copy in its rank's pool.
        generations: (K,) int32, raised when a key is given up.
        tokens: (blocks,) int32, entries a block holds once its document is written; 0 where unused.
        references: (blocks,) int32, documents that hold a block.
        used: (W,) int64, slots taken at each rank.
        serial: documents added so far.
        version: changes with every delta; headers carry it.
    """

    block_tokens: int
    num_branches: int
    documents: Mapping[str, Document]
    pinned: frozenset[str]
    quotas: Mapping[str, int]
    hashed: Mapping[bytes, int]
    owners: Tensor
    slots: Tensor
    generations: Tensor
    tokens: Tensor
    references: Tensor
    used: Tensor
    serial: int
    version: int

    @property
    def max_blocks(self) -> int:
        return len(self.tokens)

    @property
    def num_blocks(self) -> int:
        """Blocks in use."""
        return int((self.references > 0).sum())

    def document(self, name: str) -> Document:
        if name not in self.documents:
            known = ", ".join(sorted(self.documents)[:8]) or "none"
            raise ValueError(f"unknown document {name!r}; known: {known}")
        return self.documents[name]

    def group_blocks(self, group: str) -> int:
        """Blocks that count for a group: those of its documents, shared ones for each."""
        return sum(d.num_blocks for d in self.documents.values() if d.group == group)

    def prefix(self, hashes: Sequence[bytes]) -> tuple[int, ...]:
        """The blocks that already hold the first of these contents, up to the first that no block has."""
        found = []
        for content in hashes:
            block = self.hashed.get(content)
            if block is None or self._is_lost(block):
                break
            found.append(block)
        return tuple(found)

    def _is_lost(self, block: int) -> bool:
        keys = slice(block * self.num_branches, (block + 1) * self.num_branches)
        return bool((self.owners[keys] < 0).all(1).any())

    def free_blocks(self, name: str, count: int) -> Tensor:
        """The block ids (count,) int64 that the next document gets: the lowest that are free.

        Raises: ValueError that names the document if there are too few.
        """
        free = (self.references == 0).nonzero()[:, 0]
        if count > len(free):
            raise ValueError(
                f"document {name!r} needs {count} blocks, {len(free)} of {self.max_blocks} are free"
            )
        return free[:count]


def empty_directory(
    *, max_blocks: int, block_tokens: int, num_branches: int, copies: int, world_size: int
) -> Directory:
    keys = max_blocks * num_branches
    return Directory(
        block_tokens=block_tokens,
        num_branches=num_branches,
        documents=MappingProxyType({}),
        pinned=frozenset(),
        quotas=MappingProxyType({}),
        hashed=MappingProxyType({}),
        owners=torch.full((keys, copies), -1, dtype=torch.int32),
        slots=torch.full((keys, copies), -1, dtype=torch.int32),
        generations=torch.zeros(keys, dtype=torch.int32),
        tokens=torch.zeros(max_blocks, dtype=torch.int32),
        references=torch.zeros(max_blocks, dtype=torch.int32),
        used=torch.zeros(world_size, dtype=torch.int64),
        serial=0,
        version=0,
    )


def with_document(
    directory: Directory,
    name: str,
    *,
    tokens: int,
    position: int,
    ranks: Tensor,
    capacity: int,
    hashes: Sequence[bytes] = (),
    group: str = "",
) -> Directory:
    """The directory with one more document whose new blocks have copies at `ranks`.

    Its leading blocks are `directory.prefix(hashes)`, the others `directory.free_blocks`.

    Args:
        ranks: (N, G, R) int32 from `place`, of the blocks that are new.
        capacity: slots of one rank's pool.
        hashes: contents of its full blocks; none stores every block anew.
    Raises:
        ValueError: name taken, no tokens, or a capacity or quota exhausted; nothing is changed.
    """
    block_tokens, branches = directory.block_tokens, directory.num_branches
    num_blocks = -(-tokens // block_tokens)
    if name in directory.documents:
        raise ValueError(f"document {name!r} exists already")
    check_extent(name, tokens, position)
    if len(directory.documents) >= MAX_DOCUMENTS:
        raise ValueError(f"document {name!r}: there are {MAX_DOCUMENTS} documents already")
    if len(hashes) not in (0, tokens // block_tokens):
        raise ValueError(f"document {name!r}: {len(hashes)} hashes for {tokens} tokens")
    quota, held = directory.quotas.get(group), directory.group_blocks(group)
    if quota is not None and held + num_blocks > quota:
        raise ValueError(
            f"document {name!r} needs {num_blocks} blocks, group {group!r} has {held} of its {quota}"
        )
    shared = directory.prefix(hashes)
    fresh = directory.free_blocks(name, num_blocks - len(shared))
    keys = (fresh[:, None] * branches + torch.arange(branches)).reshape(-1)
    per_key = ranks.reshape(len(keys), directory.owners.shape[1]).long()
    slots, used = _slots(directory, name, per_key, capacity)
    blocks = (*shared, *fresh.tolist())
    document = Document(
        name=name,
        blocks=blocks,
        tokens=tokens,
        position=position,
        block_tokens=block_tokens,
        serial=directory.serial + 1,
        shared=len(shared),
        group=group,
        contents=tuple(hashes),
    )
    fills = torch.full((num_blocks,), block_tokens, dtype=torch.int32)
    fills[-1] = tokens - (num_blocks - 1) * block_tokens
    every = torch.tensor(blocks)
    where = torch.stack((per_key, slots)).numpy().tobytes() + b"".join(hashes)
    return replace(
        directory,
        documents=MappingProxyType({**directory.documents, name: document}),
        hashed=MappingProxyType({**directory.hashed, **hashed_of([document])}),
        owners=_updated(directory.owners, keys, per_key),
        slots=_updated(directory.slots, keys, slots),
        tokens=_updated(directory.tokens, every, fills),
        references=_updated(directory.references, every, directory.references[every] + 1),
        used=used,
        serial=directory.serial + 1,
        version=changed_version(directory, f"add {document!r}", where),
    )


def check_extent(name: str, tokens: int, position: int) -> None:
    """Raise ValueError unless a document has tokens, all at positions up to `MAX_POSITION`."""
    whole(tokens, f"tokens of document {name!r}", 1, MAX_TOKENS)
    whole(position, f"position of document {name!r}", 0, MAX_POSITION - tokens + 1)


def without_document(directory: Directory, name: str) -> Directory:
    """The directory without a document; blocks that no other one holds are free.

    Raises: ValueError if it is unknown or pinned.
    """
    document = directory.document(name)
    if name in directory.pinned:
        raise ValueError(f"document {name!r} is pinned")
    blocks = torch.tensor(document.blocks)
    references = _updated(directory.references, blocks, directory.references[blocks] - 1)
    free = blocks[references[blocks] == 0]
    branches = directory.num_branches
    keys = (free[:, None] * branches + torch.arange(branches)).reshape(-1)
    owners = directory.owners[keys].long()
    copies = torch.bincount(owners[owners >= 0], minlength=len(directory.used))
    nowhere = torch.full_like(owners, -1)
    documents = {other: d for other, d in directory.documents.items() if other != name}
    return replace(
        directory,
        documents=MappingProxyType(documents),
        hashed=MappingProxyType(hashed_of(documents.values())),
        owners=_updated(directory.owners, keys, nowhere),
        slots=_updated(directory.slots, keys, nowhere),
        generations=_updated(
            directory.generations, keys, (directory.generations[keys] + 1) & 0x7FFFFFFF
        ),
        tokens=_updated(directory.tokens, free, torch.zeros_like(free)),
        references=references,
        used=directory.used - copies,
        version=changed_version(directory, f"remove {name!r}"),
    )


def with_pin(directory: Directory, name: str, pinned: bool) -> Directory:
    """The directory with a document pinned, or not; ValueError if it is unknown."""
    directory.document(name)
    names = directory.pinned | {name} if pinned else directory.pinned - {name}
    return replace(
        directory, pinned=names, version=changed_version(directory, f"pin {name!r} {pinned}")
    )


def with_quota(directory: Directory, group: str, blocks: int | None) -> Directory:
    """The directory with a bound on the blocks of a group's documents; None lifts it.

    A quota below what the group has only keeps it from adding more.

    Raises: ValueError unless the bound is a whole number in [0, `MAX_QUOTA`].
    """
    if blocks is not None:
        blocks = whole(blocks, f"the quota of group {group!r}", 0, MAX_QUOTA)
    quotas = {name: bound for name, bound in directory.quotas.items() if name != group}
    if blocks is not None:
        quotas[group] = blocks
    return replace(
        directory,
        quotas=MappingProxyType(quotas),
        version=changed_version(directory, f"quota {group!r} {blocks}"),
    )


def hashed_of(documents: Iterable[Document]) -> dict[bytes, int]:
    """`Directory.hashed` of these documents, in the order they were added."""
    found: dict[bytes, int] = {}
    for document in documents:
        found.update(zip(document.contents, document.blocks, strict=False))
    return found


def changed_version(directory: Directory, delta: str, tables: bytes = b"") -> int:
    """The version after a delta: a hash of all deltas so far."""
    return zlib.crc32(f"{directory.version}:{delta}".encode() + tables)


def _slots(
    directory: Directory, name: str, per_key: Tensor, capacity: int
) -> tuple[Tensor, Tensor]:
    """The lowest free slot at each rank (n, R) for the keys in order, and the new `used` (W,)."""
    world = len(directory.used)
    added = torch.bincount(per_key[per_key >= 0], minlength=world)
    used = directory.used + added
    if int(used.max()) > capacity:
        rank = int(used.argmax())
        raise ValueError(
            f"document {name!r} does not fit: rank {rank} would hold {int(used[rank])} "
            f"(block, branch) slots, its pool has {capacity}"
        )
    taken = torch.zeros(world, capacity, dtype=torch.bool)
    held = directory.owners >= 0
    taken[directory.owners[held].long(), directory.slots[held].long()] = True
    slots = torch.full_like(per_key, -1)
    for rank in range(world):
        here = per_key == rank
        slots[here] = (~taken[rank]).nonzero()[: int(added[rank]), 0]
    return slots, used


def _updated(table: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    table = table.clone()
    table[rows] = values.to(table.dtype)
    return table
