"""A small snapshot, written file by file without a world."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch

from qroam.partition.pool import KINDS, Kind
from qroam.partition.snapshot.folder import (
    FolderLock,
    RecordWriter,
    check_files,
    read_manifest,
    read_verified,
    write_manifest,
)
from qroam.partition.snapshot.format import (
    LayerForm,
    Manifest,
    SavedDocument,
    encode_manifest,
    split_hashes,
    users,
)
from qroam.partition.snapshot.record import hash_records

B, WIDTH = 4, 4 * (12 + 8)


def form(entries: int = 12, index: int = 3) -> LayerForm:
    return LayerForm(
        entries="fp32", entry_bytes=entries, index="fp8" if index else "", index_bytes=index
    )


def written(folder: Path) -> Manifest:
    """A small snapshot of two layers and two documents; block 1 of the second is not closed."""
    folder.mkdir(exist_ok=True)
    FolderLock(folder, exclusive=True).release()
    noise = torch.Generator().manual_seed(5)
    files, hashes = [], {}
    shares: list[tuple[int, Kind, int, list[int]]] = [
        (0, "entries", WIDTH, [4, 2]),
        (1, "entries", WIDTH, [4]),
        (1, "index", B * 3, [4, 2, 4]),
    ]
    for rank, kind, width, tokens in shares:
        records = torch.randint(0, 256, (len(tokens), width), generator=noise).byte()
        names = split_hashes(hash_records(records, torch.tensor(tokens)).numpy().tobytes())
        writer = RecordWriter(folder, token="0123abcd", rank=rank, kind=kind, width=width)
        writer.append(records, names)
        files += writer.close()
        hashes[rank, kind] = names
    (whole, tail), (other,) = hashes[0, "entries"], hashes[1, "entries"]
    index = hashes[1, "index"]
    manifest = Manifest(
        sequence=3,
        block_tokens=B,
        num_branches=1,
        layers=(form(), form(8, 0)),
        files=tuple(files),
        documents=(
            SavedDocument(
                name="a", tokens=6, position=0, entries=whole + tail, index=index[0] + index[1]
            ),
            SavedDocument(
                name="ü",
                tokens=8,
                position=9,
                entries=other + bytes(16),
                index=index[2] + bytes(16),
                group="g",
                is_pinned=True,
            ),
        ),
        quotas=(("g", 7),),
    )
    write_manifest(folder, encode_manifest(manifest))
    return manifest


def read_all(folder: Path) -> None:
    """Read a whole snapshot as `restore` does."""
    found = read_manifest(folder)
    assert found is not None
    manifest, _ = found
    check_files(folder, manifest)
    for kind in KINDS:
        used = users(manifest, kind, str(folder / "manifest"))
        tokens = {name: user.tokens for name, user in used.items()}
        for names, records in read_verified(folder, manifest, kind, tokens):
            assert len(names) == len(records)


def said(folder: Path) -> str:
    """What a reader says of a snapshot that is not sound."""
    with pytest.raises(ValueError, match=": ") as caught:
        read_all(folder)
    return str(caught.value)


def forged(
    folder: Path, change: Callable[[dict[str, Any]], None], table: bytes | None = None
) -> None:
    """Change the manifest's header as an attacker would: with the right checksum."""
    path = folder / "manifest"
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<I", raw, 8)
    head = msgpack.unpackb(raw[44 : 44 + size])
    change(head)
    packed = head["raw"] if "raw" in head else msgpack.packb(head)
    body = packed + (raw[44 + size :] if table is None else table)
    path.write_bytes(
        struct.pack("<8sI32s", raw[:8], len(packed), hashlib.sha256(body).digest()) + body
    )


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """Set head[place[0]][place[1]]... to the last of `place`."""

    def change(head: Any) -> None:
        *path, last, value = place
        for step in path:
            head = head[step]
        head[last] = value

    return change
