"""Snapshots of a world: begin, write beside the serving, finish; and restore.

A snapshot is one folder that all ranks can reach (format: `partition/snapshot/format.py`).
`begin_snapshot`, `finish_snapshot` and `restore` are steps of the world, as `attend` is: every rank calls
them in the same place of its sequence.

    begin    Refused while there are blocks of which nobody has a copy: they would not be in the new
             manifest, and what the last one has of them would be removed as of no use.
             Every rank hands over the writes it staged for copies elsewhere, so all that was written
             before is with its owners. Rank 0 locks the folder, clears away what dead attempts left
             and draws the attempt's token. Everyone reads the last manifest; they must be the same.
    write    Each rank, in a thread: of the blocks it owns (copy 0 of a branch; index keys go with
             branch 0) and that were closed at `begin`, those whose hash the last manifest does not
             have, or has in a file that is mostly of no use any more: such a file is not listed again.
             Closed blocks never change, so steps go on meanwhile. A block whose slot was given away (to
             another key, or generation) is left out. A file is synced before it gets its name, and the
             folder before the rank says that it is done.
    finish   When all ranks are done they give rank 0 the hashes of their blocks and files. Rank 0
             leaves out documents that went meanwhile, checks that every file is there, and replaces
             the manifest: write, sync, rename, sync the folder. This commits the whole snapshot.
             Then it removes the files that no manifest lists any more, and everyone returns.

If a rank dies before the rename, the last manifest and all its files are as they were, and the next
attempt clears away the rest; the other ranks get a PeerError that names it within the deadline, in
whatever step they are. If rank 0 dies after the rename the snapshot is there, though no rank knows it.
If a rank cannot write or read (disk full, a file damaged), every rank raises SnapshotError: after
`begin` and `finish` the world goes on; the last snapshot is whole. Acknowledged is what a returned
`finish_snapshot` covers, on any rank.

    restore  Everyone reads the manifest and checks, before anything changes: the model's forms, names
             and capacity, and every file's size and header; and that a document which is to be replaced,
             for it lost blocks, is the one that was saved, with no closed block that was not. Then
             documents are added as by `add_document`, placed anew; each rank reads the blocks of which
             it gets a copy, compares their hashes and stores them. A document that was still being
             written comes back with its closed blocks. Damage found so late leaves the world without an
             agreed corpus: every rank raises SnapshotError, and the world refuses further steps.

Requests and their private tokens are the engine's and not saved. Nothing is kept for a block but its
hash: which ranks there are, ids, serial numbers, slots and generations are the restoring world's own.
"""

from __future__ import annotations

import secrets
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import torch

from ...partition.directory import Directory
from ...partition.pool import KINDS, Kind
from ...partition.snapshot.folder import (
    MANIFEST,
    FolderLock,
    RecordWriter,
    has_size,
    make_folder,
    read_manifest,
    remove_attempt,
    remove_unused,
    write_manifest,
)
from ...partition.snapshot.format import (
    BlockFile,
    Manifest,
    check_located,
    decode_manifest,
    encode_manifest,
    fault,
    split_hashes,
)
from ...partition.snapshot.parallel_map import in_order
from ...partition.snapshot.record import (
    BATCH_BYTES,
    closed,
    hash_records,
    is_known,
    record_bytes,
    rows_within,
    take_records,
)
from ..copies import lost_blocks
from ..errors import SnapshotError, in_words
from ..lockstep import settle
from ..world import World
from .collective import done, in_thread, send_staged, together
from .snapshot_parts import (
    Closed,
    Part,
    agree_on,
    check_forms,
    forms_of,
    owner_of,
    part_columns,
    received_part,
    saved_documents,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotReport:
    """What this rank did for a snapshot: blocks it answers for, and how many of them it wrote."""

    sequence: int
    closed: int
    written: int
    written_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PendingSnapshot:
    """A snapshot under way, between `begin_snapshot` and `finish_snapshot`.

    ours: what this rank answers for. work: its part, and the data files of the last manifest that are
    there and mostly in use.
    """

    folder: Path
    token: str
    sequence: int
    directory: Directory
    ours: dict[Kind, Closed]
    stop: Event
    lock: FolderLock | None
    work: Future[tuple[Part, list[BlockFile]]]

    def cancel(self, timeout_s: float = 0.0) -> None:
        """Stop writing, wait so long for that, and let go of the folder; what is not committed yet
        will not be.
        """
        self.stop.set()
        wait([self.work], timeout_s)
        if self.lock is not None:
            self.lock.release()


def begin_snapshot(world: World, folder: Path) -> PendingSnapshot:
    """Agree on what is saved, and begin to write this rank's part of it in a thread.

    Raises: SnapshotError on every rank if the folder cannot be used, or blocks of the corpus are lost;
    nothing is under way then.
    """
    lost = lost_blocks(world.directory, world.askable())
    if lost:
        raise SnapshotError(
            f"snapshot {folder}: nobody has a copy of blocks {in_words(lost)}: restore these "
            "documents, or remove them, before the next snapshot"
        )
    send_staged(world, "snapshot-begin")
    lock: FolderLock | None = None
    found: tuple[Manifest, bytes] | None = None
    reason = ""
    try:
        make_folder(folder)
        if world.rank == 0:
            lock = FolderLock(folder, exclusive=True)
        found = read_manifest(folder)
        if found is not None:
            check_forms(found[0], world, str(folder / MANIFEST))
        if world.rank == 0:
            remove_unused(folder, found[0] if found else None)
    except (ValueError, OSError) as error:
        reason = str(error)
    try:
        token = agree_on(world, "snapshot-begin", folder, found, reason, secrets.token_hex(4))
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    previous = found[0] if found else None
    ours = {kind: _closed(world, kind) for kind in KINDS}
    stop = Event()
    write = partial(_write_part, world, folder, token, previous, ours, stop)
    return PendingSnapshot(
        folder=folder,
        token=token,
        sequence=previous.sequence + 1 if previous else 1,
        directory=world.directory,
        ours=ours,
        stop=stop,
        lock=lock,
        work=in_thread(write, "qroam-snapshot"),
    )


def finish_snapshot(world: World, pending: PendingSnapshot) -> SnapshotReport:
    """Wait for every rank's part and commit the whole.

    Raises: SnapshotError on every rank if a part could not be written; nothing is committed then.
    """
    what = f"snapshot {pending.folder}"
    commit = done(None)
    try:
        try:
            part, kept = together(world, "snapshot-write", what, pending.work)
        except ValueError:
            remove_attempt(pending.folder, pending.token, world.rank)
            raise
        columns = part_columns(world, pending.ours, part)
        received = settle(world, world.header("snapshot-parts", layer=0), columns)
        if world.rank == 0:
            parts = [
                received_part(world, pending.directory, pending.token, rank, message)
                for rank, message in enumerate(received)
                if message is not None
            ]
            keys = {kind: pending.ours[kind].keys for kind in KINDS}
            manifest = _manifest(world, pending, kept, [(keys, part), *parts])
            commit = in_thread(partial(_commit, pending.folder, manifest), "qroam-commit")
        together(world, "snapshot-commit", what, commit)
    finally:
        # Not before a commit that has begun is over, even if a rank was lost meanwhile: whoever
        # holds the folder next must not find it changing.
        commit.add_done_callback(lambda _: pending.cancel())
    for kind, ours in pending.ours.items():
        there = is_known(part.hashes[kind])
        world.stores.hashes[kind].keep(
            ours.keys[there], ours.generations[there], part.hashes[kind][there]
        )
    return SnapshotReport(
        sequence=pending.sequence,
        closed=sum(len(ours.keys) for ours in pending.ours.values()),
        written=sum(file.rows for file in part.files),
        written_bytes=sum(
            file.rows * record_bytes(world.stores.of(file.kind)) for file in part.files
        ),
    )


def _closed(world: World, kind: Kind) -> Closed:
    """The closed blocks that this rank owns, as they are now."""
    store, directory = world.stores.of(kind), world.directory
    keys = (owner_of(directory, kind) == world.rank).nonzero()[:, 0]
    branches = directory.num_branches if kind == "entries" else 1
    tokens = directory.tokens[keys // branches]
    there = closed(store, keys, tokens)
    keys, tokens = keys[there], tokens[there]
    slots = store.slot_of[keys].long()
    generations = store.generation[slots]
    hashes, known = world.stores.hashes[kind].find(keys, generations)
    return Closed(keys, slots, generations, tokens, hashes, known)


def _write_part(
    world: World,
    folder: Path,
    token: str,
    previous: Manifest | None,
    ours: dict[Kind, Closed],
    stop: Event,
) -> tuple[Part, list[BlockFile]]:
    """Write what the kept files do not have. Runs beside the steps of the world, and only reads."""
    kept = [f for f in previous.mostly_live() if has_size(folder, previous, f)] if previous else []
    files: list[BlockFile] = []
    hashes = {}
    for kind, blocks in ours.items():
        there = {name for file in kept if file.kind == kind for name in split_hashes(file.hashes)}
        hashes[kind], written = _write_kind(world, folder, token, kind, blocks, there, stop)
        files += written
    return Part(hashes, files), kept


def _write_kind(
    world: World,
    folder: Path,
    token: str,
    kind: Kind,
    blocks: Closed,
    there: set[bytes],
    stop: Event,
) -> tuple[torch.Tensor, list[BlockFile]]:
    store = world.stores.of(kind)
    width = record_bytes(store)
    names = split_hashes(blocks.hashes.numpy().tobytes())
    saved = blocks.known & torch.tensor([name in there for name in names], dtype=torch.bool)
    hashes = torch.where(saved[:, None], blocks.hashes, 0)
    writer = RecordWriter(folder, token=token, rank=world.rank, kind=kind, width=width)
    try:
        todo = (~saved).nonzero()[:, 0]
        most = rows_within(BATCH_BYTES, width)

        def take(batch: torch.Tensor, staged: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if stop.is_set():
                raise ValueError("the snapshot was cancelled")
            slots, tokens = blocks.slots[batch], blocks.tokens[batch]
            records = take_records(store, slots, tokens, into=staged[: len(batch)])
            # Read first, then compare: a slot that was given away meanwhile shows it here.
            same = store.key_of[slots] == blocks.keys[batch]
            same &= store.generation[slots] == blocks.generations[batch]
            return batch, same, records, hash_records(records, tokens)

        shape = (min(most, len(todo)), width)
        with closing(in_order(take, todo.split(most), shape)) as taken:
            for batch, same, records, found in taken:
                hashes[batch] = torch.where(same[:, None], found, 0)
                fresh = []
                for at, name in enumerate(split_hashes(found.numpy().tobytes())):
                    if same[at] and name not in there:
                        there.add(name)
                        fresh.append((at, name))
                if fresh:
                    rows = [at for at, _ in fresh]
                    chosen = records if len(rows) == len(records) else records[rows]
                    writer.append(chosen, [name for _, name in fresh])
        return hashes, writer.close()
    finally:
        writer.abandon()


def _manifest(
    world: World,
    pending: PendingSnapshot,
    kept: list[BlockFile],
    parts: list[tuple[dict[Kind, torch.Tensor], Part]],
) -> Manifest:
    """The manifest of all ranks' parts, each with the keys its hashes belong to."""
    documents = saved_documents(world, pending.directory, parts)
    live = {
        kind: {name for document in documents for name in split_hashes(document.hashes(kind))}
        for kind in KINDS
    }
    kept = [f for f in kept if not live[f.kind].isdisjoint(split_hashes(f.hashes))]
    return Manifest(
        sequence=pending.sequence,
        block_tokens=world.config.block_tokens,
        num_branches=world.config.num_branches,
        layers=forms_of(world),
        files=(*kept, *(file for _, part in parts for file in part.files)),
        documents=documents,
        quotas=tuple(sorted(world.directory.quotas.items())),
    )


def _commit(folder: Path, manifest: Manifest) -> None:
    for file in manifest.files:
        if not has_size(folder, manifest, file):
            raise fault(str(folder / file.name), "size", "rank 0 does not see the whole file")
    where = str(folder / MANIFEST)
    check_located(manifest, where)
    encoded = encode_manifest(manifest)
    decode_manifest(encoded, where)  # what could not be read back must not replace the last one
    write_manifest(folder, encoded)
    remove_unused(folder, manifest)
