"""Restore a snapshot into a world; `snapshot.py` describes the protocol."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from ...partition.directory import Directory, Document, with_pin, with_quota, without_document
from ...partition.pool import KINDS, Kind
from ...partition.prefix_hash import split_contents
from ...partition.snapshot.folder import (
    MANIFEST,
    FolderLock,
    check_files,
    read_manifest,
    read_verified,
)
from ...partition.snapshot.format import Manifest, SavedDocument, fault
from ...partition.snapshot.record import closed, hash_table, is_known, put_records
from ..copies import lost_blocks, runs_of
from ..errors import SnapshotError, in_words
from ..world import World
from .collective import in_thread, send_staged, share, together
from .documents import added
from .snapshot_parts import agree_on, check_forms, column_of, owner_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoreReport:
    """What came back: of each document, the tokens up to its first block that was not closed.

    read_bytes: what this rank read and compared.
    """

    sequence: int
    documents: Mapping[str, int]
    read_bytes: int


def restore(world: World, folder: Path, only: frozenset[str] | None = None) -> RestoreReport:
    """Add the documents of the snapshot in `folder` to the corpus, placed by this world's placement;
    those in `only` if it is given, instead of documents here of which blocks are lost.

    Raises: SnapshotError on every rank, with the same words. Unless a block's bytes are found not to
    be those of its hash, or a file changes meanwhile, nothing has changed then.
    """
    lock: FolderLock | None = None
    found: tuple[Manifest, bytes] | None = None
    before = directory = world.directory
    reason = ""
    send_staged(world, "restore")  # what survivors have is compared with what was saved
    try:
        if world.rank == 0:
            lock = FolderLock(folder, exclusive=False)
        found = read_manifest(folder)
        if found is None:
            raise fault(str(folder), MANIFEST, "there is none, so no snapshot")
        check_forms(found[0], world, str(folder / MANIFEST))
        check_files(folder, found[0])
        found = _chosen(found[0], only), found[1]
        before = _without_lost(world, found[0] if only else None)
        directory = _with_documents(world, before, found[0])
    except (ValueError, OSError) as error:
        reason = str(error)
    try:
        agree_on(world, "restore", folder, found, reason, "0" * 8)
        assert found is not None
        manifest = found[0]
        unused = before.references == 0
        world.adopt(directory)
        load = in_thread(partial(_load, world, folder, manifest, unused), "qroam-restore")
        try:
            read_bytes = together(world, "restore", f"snapshot {folder}", load)
        except SnapshotError as error:
            # Not an abort: that could overtake the error that the others are about to receive.
            world.transport.give_up((world.rank,), f"its corpus is half restored: {error}")
            raise
    finally:
        if lock is not None:
            lock.release()
    tokens = _closed_tokens(world, [document.name for document in manifest.documents])
    return RestoreReport(sequence=manifest.sequence, documents=tokens, read_bytes=read_bytes)


def _chosen(manifest: Manifest, only: frozenset[str] | None) -> Manifest:
    """The manifest with only these documents. Raises: ValueError if one is not there."""
    documents = tuple(d for d in manifest.documents if only is None or d.name in only)
    missing = (only or frozenset()) - {document.name for document in documents}
    if missing:
        raise ValueError(f"the snapshot has no documents {', '.join(sorted(missing))}")
    return replace(manifest, documents=documents)


def _without_lost(world: World, manifest: Manifest | None) -> Directory:
    """The directory without those of the saved documents that have blocks nobody has a copy of.

    Raises: ValueError if less of one was saved than this rank has.
    """
    directory = world.directory
    lost = lost_blocks(directory, world.askable())
    for saved in manifest.documents if manifest else ():
        if saved.name in lost:
            _check_no_older(world, saved)
            directory = without_document(with_pin(directory, saved.name, False), saved.name)
    return directory


def _check_no_older(world: World, saved: SavedDocument) -> None:
    """Raise a ValueError if `saved` is another document than the one of that name here, or lacks closed
    blocks of which this rank has a copy.
    """
    document = world.directory.documents[saved.name]
    ours = (document.tokens, document.position, b"".join(document.contents))
    if ours != (saved.tokens, saved.position, saved.contents):
        raise ValueError(f"document {saved.name!r} is another one in the snapshot: remove it first")
    newer: set[int] = set()
    for kind in KINDS:
        hashes = hash_table(saved.hashes(kind))
        branches = world.config.num_branches if kind == "entries" else 1
        blocks, keys = _keys(document, branches, len(hashes))
        here = closed(world.stores.of(kind), keys, world.directory.tokens[blocks])
        newer |= set(((here & ~is_known(hashes)).nonzero()[:, 0] // branches).tolist())
    if newer:
        raise ValueError(
            f"blocks {in_words({saved.name: runs_of(sorted(newer))})} are here, and not in the snapshot, "
            "which is older: remove the document first to go back to it"
        )


def _with_documents(world: World, directory: Directory, manifest: Manifest) -> Directory:
    """The directory with the snapshot's documents. Raises: ValueError on a name or for lack of room."""
    for document in manifest.documents:
        directory = added(
            world,
            directory,
            document.name,
            tokens=document.tokens,
            position=document.position,
            hashes=split_contents(document.contents),
            group=document.group,
        )
        if document.is_pinned:
            directory = with_pin(directory, document.name, True)
    for group, blocks in manifest.quotas:
        if group not in directory.quotas:
            directory = with_quota(directory, group, blocks)
    return directory


def _load(world: World, folder: Path, manifest: Manifest, unused: Tensor) -> int:
    """Read and store the blocks of which a copy belongs here, of those that were `unused` (blocks,);
    returns how many bytes they have.
    """
    return sum(_load_kind(world, folder, manifest, kind, unused) for kind in KINDS)


def _load_kind(world: World, folder: Path, manifest: Manifest, kind: Kind, unused: Tensor) -> int:
    store, num_bytes = world.stores.of(kind), 0
    keys_of: dict[bytes, list[int]] = defaultdict(list)
    tokens_of: dict[bytes, int] = {}
    for key, name in _held(world, manifest, kind, unused).items():
        block = key if kind == "index" else key // manifest.num_branches
        keys_of[name].append(key)
        tokens_of[name] = int(world.directory.tokens[block])
    for names, records in read_verified(folder, manifest, kind, tokens_of):
        pairs = [(at, key) for at, name in enumerate(names) for key in keys_of[name]]
        rows = [at for at, _ in pairs]
        keys = torch.tensor([key for _, key in pairs])
        tokens = torch.tensor([tokens_of[names[at]] for at in rows], dtype=torch.int32)
        chosen = records if len(rows) == len(records) else records[rows]
        put_records(store, keys, tokens, chosen)
        generations = store.generation[store.slot_of[keys].long()]
        world.stores.hashes[kind].keep(keys, generations, hash_table(b"".join(names))[rows])
        num_bytes += records.numel()
    return num_bytes


def _held(world: World, manifest: Manifest, kind: Kind, unused: Tensor) -> dict[int, bytes]:
    """The hashes of the closed blocks that have a slot here, by key; of shared ones once."""
    branches = manifest.num_branches if kind == "entries" else 1
    held: dict[int, bytes] = {}
    for document in manifest.documents:
        hashes = hash_table(document.hashes(kind))
        blocks, keys = _keys(world.directory.documents[document.name], branches, len(hashes))
        here = (world.stores.of(kind).slot_of[keys] >= 0) & is_known(hashes) & unused[blocks]
        rows = hashes[here].numpy()
        held |= zip(keys[here].tolist(), [row.tobytes() for row in rows], strict=True)
    return held


def _keys(document: Document, branches: int, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` keys of a document in a store of so many branches, with the block of each."""
    blocks = torch.tensor(document.blocks).repeat_interleave(branches)[:count]
    return blocks, blocks * branches + torch.arange(count) % branches


def _closed_tokens(world: World, names: Sequence[str]) -> dict[str, int]:
    """Of each document the tokens before its first block that is not closed, as its owners say."""
    directory = world.directory
    documents = [directory.documents[name] for name in names]
    blocks_of = [block for document in documents for block in document.blocks]
    wanted = torch.tensor(blocks_of, dtype=torch.int64)
    found = [wanted[:0]]
    for kind in KINDS if world.stores.has_index else KINDS[:1]:
        keys = (owner_of(directory, kind) == world.rank).nonzero()[:, 0]
        blocks = keys // (directory.num_branches if kind == "entries" else 1)
        there = closed(world.stores.of(kind), keys, directory.tokens[blocks])
        found.append(blocks[~there & torch.isin(blocks, wanted)])
    opened: set[int] = set()
    for rank, columns in enumerate(share(world, "restore", {"open": torch.cat(found).int()})):
        try:
            opened |= set(column_of(columns, "open", torch.int32, ()).tolist())
        except ValueError as error:
            raise world.transport.accuse(rank, f"sent an invalid message: {error}") from error
    tokens = {}
    for document in documents:
        blocks_there = takewhile(lambda block: block not in opened, document.blocks)
        tokens[document.name] = min(
            len(list(blocks_there)) * directory.block_tokens, document.tokens
        )
    return tokens
