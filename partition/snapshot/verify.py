"""`qroam verify`: compare every block of a snapshot with its hash; which blocks are lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..pool import KINDS
from .folder import MANIFEST, FolderLock, RecordReader, by_file, read_manifest
from .format import UNCLOSED, BlockFile, Manifest, fault, split_hashes, users
from .record import block_hash


class Damage(NamedTuple):
    """What is wrong with a file, and the blocks (document, block) that are lost with it."""

    what: str
    blocks: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What `verify` found. `unclosed`: blocks that were not closed yet; `num_bytes`: read and compared."""

    sequence: int
    documents: int
    files: int
    records: int
    unclosed: int
    num_bytes: int
    damage: tuple[Damage, ...]


def verify(folder: Path) -> Verified:
    """Read every block of the snapshot in `folder` and compare it with its hash.

    Raises: ValueError if there is no snapshot, its manifest is malformed, or it is being written.
    """
    with FolderLock(folder, exclusive=False):
        found = read_manifest(folder)
        if found is None:
            raise fault(str(folder), MANIFEST, "there is none, so no snapshot")
        manifest, _ = found
        damage: list[Damage] = []
        records = num_bytes = 0
        for kind in KINDS:
            used = users(manifest, kind, str(folder / MANIFEST))
            tokens_of = {name: user.tokens for name, user in used.items()}
            for file, rows, hashes in by_file(manifest, kind, tokens_of):
                records += len(rows)
                wrong, count = _damaged(folder, manifest, file, rows, hashes, tokens_of)
                num_bytes += count * manifest.record_bytes(kind)
                for what, names in wrong:
                    blocks = sorted({block for name in names for block in used[name].blocks})
                    damage.append(Damage(what, tuple(blocks)))
    return Verified(
        sequence=manifest.sequence,
        documents=len(manifest.documents),
        files=len(manifest.files),
        records=records,
        unclosed=sum(
            UNCLOSED in split_hashes(d.entries[at : at + len(UNCLOSED) * manifest.num_branches])
            for d in manifest.documents
            for at in range(0, len(d.entries), len(UNCLOSED) * manifest.num_branches)
        ),
        num_bytes=num_bytes,
        damage=tuple(damage),
    )


def _damaged(
    folder: Path,
    manifest: Manifest,
    file: BlockFile,
    rows: list[int],
    hashes: list[bytes],
    tokens_of: dict[bytes, int],
) -> tuple[list[tuple[str, list[bytes]]], int]:
    """What is wrong with these records of a file, with the hashes lost; and how many are right."""
    wrong: list[tuple[str, list[bytes]]] = []
    right = 0
    try:
        with RecordReader(folder, manifest, file) as reader:
            for row, name in zip(rows, hashes, strict=True):
                if block_hash(reader.read([row])[0], tokens_of[name]) == name:
                    right += 1
                else:
                    where = f"{folder / file.name}: record {row}"
                    wrong.append((f"{where}: its bytes are not those of its hash", [name]))
    except (ValueError, OSError) as error:
        wrong.append((str(error), hashes))
    return wrong, right
