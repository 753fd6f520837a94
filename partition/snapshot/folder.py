"""A snapshot's folder: files that appear whole or not at all, bounded reads, verification.

A file is written under a temporary name, synced, renamed, and the folder synced: from then on it is
there, with all of its bytes, whatever dies. Nothing is mapped into memory (a mapped file that is cut
short kills its reader), and nothing is read that does not have the size that it must have.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..pool import Kind
from .format import (
    HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    BlockFile,
    Manifest,
    decode_manifest,
    fault,
    file_header,
    file_name,
    is_file_name,
)
from .parallel_map import in_order
from .record import BATCH_BYTES, block_hash, rows_within

MANIFEST = "manifest"
FILE_BYTES = 64 << 20  # after which the next file begins, and this one is synced beside it
_TEMPORARY = ".tmp"


class FolderLock:
    """Held while a folder is written (`exclusive`), or read as a whole; freed by the system on death.

    Raises: ValueError if another process holds it. A folder without a lock file has no writer.
    """

    def __init__(self, folder: Path, *, exclusive: bool) -> None:
        self._fd = -1
        flags = os.O_RDWR | os.O_CREAT if exclusive else os.O_RDONLY
        try:
            self._fd = os.open(folder / "lock", flags | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except FileNotFoundError:
            if exclusive:
                raise
        except BlockingIOError:
            self.release()
            raise fault(str(folder), "lock", "a snapshot is written or read here already") from None

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def read_manifest(folder: Path) -> tuple[Manifest, bytes] | None:
    """The manifest of the snapshot in `folder` and a digest of its bytes; None if there is none.

    Raises: ValueError that names the file and the field.
    """
    path = folder / MANIFEST
    try:
        fd = _open_regular(path)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > MAX_MANIFEST_BYTES:
            raise fault(str(path), "size", f"{size} bytes, at most {MAX_MANIFEST_BYTES} allowed")
        raw = file.read(size)
    return decode_manifest(raw, str(path)), hashlib.sha256(raw).digest()


def write_manifest(folder: Path, raw: bytes) -> None:
    """Make `raw` the manifest: the commit of a snapshot."""
    temporary = folder / (MANIFEST + _TEMPORARY)
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """The folder, durably; its parent must exist."""
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def remove_unused(folder: Path, manifest: Manifest | None) -> None:
    """Remove data files that the manifest does not list: of attempts that died, of removed documents."""
    used = {file.name for file in manifest.files} if manifest else set()
    for path in folder.iterdir():
        if is_file_name(path.name.removesuffix(_TEMPORARY)) and path.name not in used:
            path.unlink(missing_ok=True)


def remove_attempt(folder: Path, token: str, rank: int) -> None:
    """Remove what one rank wrote in an attempt that failed."""
    for path in folder.glob(f"{token}-{rank:05d}-*"):
        path.unlink(missing_ok=True)


class RecordWriter:
    """Appends records of one kind to data files of one rank, which exist once `close` has returned.

    A file that is full is synced and given its name in a thread, while the next one is written.
    """

    def __init__(self, folder: Path, *, token: str, rank: int, kind: Kind, width: int) -> None:
        self._folder, self._token, self._rank = folder, token, rank
        self._kind: Kind = kind
        self._width = width
        self._most = rows_within(FILE_BYTES, width)
        self._fd = -1
        self._hashes: list[bytes] = []
        self._files: list[BlockFile] = []
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="qroam-sync")
        self._synced: list[Future[None]] = []

    def append(self, records: Tensor, hashes: Sequence[bytes]) -> None:
        """Write records (n, width) uint8, contiguous, with these hashes."""
        while len(records):
            if self._fd < 0:
                self._fd = os.open(self._temporary(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            count = min(self._most - len(self._hashes), len(records))
            offset = HEADER_BYTES + len(self._hashes) * self._width
            _write_all(self._fd, records[:count].numpy().data.cast("B"), offset)
            self._hashes += hashes[:count]
            records, hashes = records[count:], hashes[count:]
            if len(self._hashes) == self._most:
                self._finish()

    def close(self) -> list[BlockFile]:
        """The files written, all of them on disk."""
        if self._fd >= 0:
            self._finish()
        for synced in self._synced:
            synced.result()
        if self._files:
            sync_folder(self._folder)
        return self._files

    def abandon(self) -> None:
        """Write no more; nothing is under way afterwards. Idempotent, and harmless after `close`."""
        self._syncer.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _name(self) -> str:
        return file_name(self._token, self._rank, self._kind, len(self._files))

    def _temporary(self) -> Path:
        return self._folder / (self._name() + _TEMPORARY)

    def _finish(self) -> None:
        header = file_header(self._kind, len(self._hashes), self._width)
        _write_all(self._fd, memoryview(header), 0)
        fd, self._fd = self._fd, -1
        final = self._folder / self._name()
        self._synced.append(self._syncer.submit(_sync_and_name, fd, self._temporary(), final))
        hashes = b"".join(self._hashes)
        self._files.append(BlockFile(name=self._name(), kind=self._kind, hashes=hashes))
        self._hashes = []


class RecordReader:
    """Reads records of one data file, which has the size and the header that its manifest implies.

    Raises: ValueError that names the file and the field, at the start or if it changes underneath.
    """

    def __init__(self, folder: Path, manifest: Manifest, file: BlockFile) -> None:
        self.where = str(folder / file.name)
        self._width = manifest.record_bytes(file.kind)
        expected = manifest.file_bytes(file)
        try:
            self._fd = _open_regular(folder / file.name)
        except FileNotFoundError:
            raise fault(self.where, "size", f"no such file, expected {expected} bytes") from None
        try:
            size = os.fstat(self._fd).st_size
            if size != expected:
                raise fault(self.where, "size", f"{size} bytes, expected {expected}")
            header = file_header(file.kind, file.rows, self._width)
            if os.pread(self._fd, HEADER_BYTES, 0) != header:
                raise fault(self.where, "header", "is not that of the records in the manifest")
        except BaseException:
            os.close(self._fd)
            raise

    def read(self, rows: Sequence[int], *, into: Tensor | None = None) -> Tensor:
        """The records (n, width) uint8 at these rows, in `into` if given; compare their hashes."""
        shape = (len(rows), self._width)
        records = torch.empty(shape, dtype=torch.uint8) if into is None else into
        for record, row in zip(records, rows, strict=True):
            left = record.numpy().data
            at = HEADER_BYTES + row * self._width
            while left:
                count = os.preadv(self._fd, [left], at)
                if count == 0:
                    raise fault(self.where, f"record {row}", "the file was cut short")
                left, at = left[count:], at + count
        return records

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise a ValueError unless every data file is there with its size and header."""
    for file in manifest.files:
        RecordReader(folder, manifest, file).__exit__(None, None, None)


def has_size(folder: Path, manifest: Manifest, file: BlockFile) -> bool:
    """Whether a data file is there with its size."""
    try:
        found = os.stat(folder / file.name)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == manifest.file_bytes(file)


def read_verified(
    folder: Path, manifest: Manifest, kind: Kind, tokens_of: dict[bytes, int]
) -> Iterator[tuple[list[bytes], Tensor]]:
    """The records of these hashes, with the tokens of each, in batches and in the files' order.

    Yields: n hashes, and their records (n, record bytes) uint8, which the next batch overwrites.
    Raises: ValueError that names the file and the record whose bytes are not those of its hash.
    """
    width = manifest.record_bytes(kind)
    batch = rows_within(BATCH_BYTES, width)

    def read(part: tuple[RecordReader, list[int], list[bytes]], into: Tensor) -> Tensor:
        reader, rows, names = part
        records = reader.read(rows, into=into[: len(rows)])
        for row, name, record in zip(rows, names, records, strict=True):
            if block_hash(record, tokens_of[name]) != name:
                raise fault(reader.where, f"record {row}", "its bytes are not those of its hash")
        return records

    for file, rows, hashes in by_file(manifest, kind, tokens_of):
        with RecordReader(folder, manifest, file) as reader:
            cuts = range(0, len(rows), batch)
            parts = [(reader, rows[at : at + batch], hashes[at : at + batch]) for at in cuts]
            with closing(in_order(read, parts, (min(batch, len(rows)), width))) as found:
                for (_, _, names), records in zip(parts, found, strict=True):
                    yield names, records


def by_file(
    manifest: Manifest, kind: Kind, wanted: dict[bytes, int]
) -> Iterator[tuple[BlockFile, list[int], list[bytes]]]:
    """The wanted hashes by the file they are in, with their rows, ascending."""
    found: dict[str, list[tuple[int, bytes]]] = defaultdict(list)
    locations = manifest.locations(kind)
    for name in wanted:
        location = locations[name]
        found[location.file.name].append((location.row, name))
    for file in manifest.files:
        if file.name in found:
            pairs = sorted(found[file.name])
            yield file, [row for row, _ in pairs], [name for _, name in pairs]


def _open_regular(path: Path) -> int:
    """A descriptor of a regular file; opening a pipe would wait for a writer."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise fault(str(path), "type", "is not a regular file")
    return fd


def _sync_and_name(fd: int, temporary: Path, final: Path) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(temporary, final)


def _write_all(fd: int, left: memoryview, offset: int) -> None:
    while left:
        count = os.pwrite(fd, left, offset)
        left, offset = left[count:], offset + count
