"""A small snapshot, written file by file without a world."""

from __future__ import annotations

from pathlib import Path

import torch

from qroam.partition.pool import Kind
from qroam.partition.snapshot.folder import FolderLock, RecordWriter, write_manifest
from qroam.partition.snapshot.format import (
    LayerForm,
    Manifest,
    SavedDocument,
    encode_manifest,
    split_hashes,
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
