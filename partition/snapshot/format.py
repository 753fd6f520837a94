"""The format of a snapshot: its manifest and the header of its data files. Pure.

Letters: G branches, B tokens of a block. A snapshot is a folder:

    manifest                                   what there is; replaced as a whole
    TOKEN-RANK-KIND-NUMBER.safetensors         blocks; written once, never changed
    lock                                       held by a process that writes, or reads all of it

It holds the records (`record.py`) of the closed blocks of its documents, of two kinds: `entries` of a
(block, branch), `index` keys of a block. Records are known by their hashes alone, so a snapshot holds
no ids, slots, ranks or placement, and what is on disk already is not written again. Of the directory it
holds the documents in their order, with the content hashes of their blocks (`prefix_hash.py`), so that
shared beginnings are shared again after a restore; groups, pins and quotas. Serial numbers and
generations distinguish things within one world, and are not saved.

A data file is a safetensors file with one uint8 tensor `blocks` (records, record bytes). Its header
follows from the manifest: readers compare it and parse nothing.

    manifest = magic (8) | u32 header bytes | sha256 (32) of what follows | header (msgpack) | hashes

The hashes are those of each file's records, then of each document's blocks: entries (blocks, G), then
index keys (blocks,) if the model has any; zeros for a block that was not closed; then the content
hashes of its full blocks, 32 bytes each, if they are known. Everything is checked before it is used,
sizes first; an error is a ValueError that names the file and the field.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import msgpack

from ..bounds import (
    MAX_BLOCK_TOKENS,
    MAX_BRANCHES,
    MAX_DOCUMENTS,
    MAX_ENTRY_BYTES,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_QUOTA,
    MAX_TOKENS,
    is_name,
    is_whole,
)
from ..codec import Codec
from ..layout import Layout
from ..pool import KINDS, Kind
from ..prefix_hash import CONTENT_BYTES, split_contents
from .record import HASH_BYTES

HEADER_BYTES = 256  # of a data file, its length field included
MAX_MANIFEST_BYTES = 1 << 28
MAX_MANIFEST_HEADER_BYTES = 1 << 24
UNCLOSED = bytes(HASH_BYTES)

_MAGIC = b"qroamsn1"  # version 1
_PREFIX = struct.Struct("<8sI32s")
_FILE_NAME = re.compile(r"[0-9a-f]{8}-[0-9]{5}-(entries|index)-[0-9]{5}\.safetensors", re.ASCII)
_NUMBERS = {
    "sequence": (1, (1 << 53) - 1),
    "block_tokens": (1, MAX_BLOCK_TOKENS),
    "num_branches": (1, MAX_BRANCHES),
}
_LISTS = {
    "layers": MAX_LAYERS,
    "files": 1 << 20,
    "documents": MAX_DOCUMENTS,
    "quotas": MAX_DOCUMENTS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """What the stored bytes of a layer mean, in words, and the bytes of an entry and an index key.

    Models of equal forms can read each other's blocks. A layer without an indexer has "" and 0.
    """

    entries: str
    entry_bytes: int
    index: str
    index_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFile:
    """A data file: its name, and the hashes of its records, concatenated."""

    name: str
    kind: Kind
    hashes: bytes

    @property
    def rows(self) -> int:
        return len(self.hashes) // HASH_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedDocument:
    """A document, and the hashes of its blocks: (blocks, G) of entries, (blocks,) of index keys.

    contents: of its full blocks by `prefix_hash.py`, concatenated; empty if they are not known.
    """

    name: str
    tokens: int
    position: int
    entries: bytes
    index: bytes
    contents: bytes = b""
    group: str = ""
    is_pinned: bool = False

    def hashes(self, kind: Kind) -> bytes:
        return self.entries if kind == "entries" else self.index


class Location(NamedTuple):
    """Where a record is."""

    file: BlockFile
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of a snapshot but its blocks. `sequence` counts the snapshots that a folder has seen.

    quotas: (group, blocks) of each group that has one.
    """

    sequence: int
    block_tokens: int
    num_branches: int
    layers: tuple[LayerForm, ...]
    files: tuple[BlockFile, ...]
    documents: tuple[SavedDocument, ...]
    quotas: tuple[tuple[str, int], ...] = ()

    def record_bytes(self, kind: Kind) -> int:
        return self.block_tokens * sum(
            form.entry_bytes if kind == "entries" else form.index_bytes for form in self.layers
        )

    def file_bytes(self, file: BlockFile) -> int:
        return HEADER_BYTES + file.rows * self.record_bytes(file.kind)

    def locations(self, kind: Kind) -> dict[bytes, Location]:
        """Where the record of each hash is."""
        files = [file for file in self.files if file.kind == kind]
        return {
            name: Location(file, row)
            for file in files
            for row, name in enumerate(split_hashes(file.hashes))
        }

    def mostly_live(self) -> list[BlockFile]:
        """The files of which documents use at least half of the records.

        Rewriting what is used of the other files costs less than keeping what is not, so a folder
        holds at most twice what its documents need, and what they ceased to need since.
        """
        live: Counter[str] = Counter()
        for kind in KINDS:
            locations = self.locations(kind)
            used = {name for d in self.documents for name in split_hashes(d.hashes(kind))}
            live.update(locations[name].file.name for name in used - {UNCLOSED})
        return [file for file in self.files if 2 * live[file.name] >= file.rows]


def layer_form(layout: Layout, entry_codec: Codec, index_codec: Codec | None) -> LayerForm:
    """The form of a layer; numbers of heads, weights, scale and top-k are not stored."""
    branches = "; ".join(
        f"{branch.name}: {', '.join(f'{s.name} {s.dim} {s.role}' for s in branch.streams)}"
        for branch in layout.branches
    )
    index = layout.index
    words = ""
    if index is not None and index_codec is not None:
        words = (
            f"{index_codec.name}, {index.head_dim} columns, rope {index.rope_dim} {index.pairing}, "
            f"{'quantized' if index.quantized else 'plain'}"
        )
    return LayerForm(
        entries=f"{entry_codec.name}; {branches}; {layout.rope}",
        entry_bytes=entry_codec.entry_bytes,
        index=words,
        index_bytes=index_codec.entry_bytes if index_codec else 0,
    )


def split_hashes(hashes: bytes) -> list[bytes]:
    """The single hashes of a concatenation."""
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def file_name(token: str, rank: int, kind: Kind, number: int) -> str:
    """`token`: 8 hex digits that no other attempt at a snapshot has."""
    return f"{token}-{rank:05d}-{kind}-{number:05d}.safetensors"


def is_file_name(name: str) -> bool:
    """Whether a name is one that `file_name` gives, and so cannot lead out of the folder."""
    return _FILE_NAME.fullmatch(name) is not None


def file_header(kind: Kind, rows: int, width: int) -> bytes:
    """The first HEADER_BYTES of a data file of `rows` records of `width` bytes."""
    described = {
        "__metadata__": {"format": "qroam blocks 1", "kind": kind},
        "blocks": {"dtype": "U8", "shape": [rows, width], "data_offsets": [0, rows * width]},
    }
    size = HEADER_BYTES - 8
    return struct.pack("<Q", size) + json.dumps(described).encode().ljust(size)


def fault(where: str, field: str, found: str) -> ValueError:
    """The error about a file: where, which field, and what was found instead of what is allowed."""
    return ValueError(f"{where}: {field}: {found}")


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a manifest. Raises: ValueError if it would be larger than readers accept."""
    layers = [[f.entries, f.entry_bytes, f.index, f.index_bytes] for f in manifest.layers]
    header: bytes = msgpack.packb(
        {
            "sequence": manifest.sequence,
            "block_tokens": manifest.block_tokens,
            "num_branches": manifest.num_branches,
            "layers": layers,
            "files": [[file.name, file.rows] for file in manifest.files],
            "documents": [
                [d.name, d.tokens, d.position, bool(d.contents), d.group, d.is_pinned]
                for d in manifest.documents
            ],
            "quotas": manifest.quotas,
        }
    )
    hashes = [file.hashes for file in manifest.files]
    hashes += [part for d in manifest.documents for part in (d.entries, d.index, d.contents)]
    body = b"".join((header, *hashes))
    if len(header) > MAX_MANIFEST_HEADER_BYTES or len(body) + _PREFIX.size > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"the manifest would have {len(body)} bytes, {len(header)} of them header; "
            f"{MAX_MANIFEST_BYTES} and {MAX_MANIFEST_HEADER_BYTES} are allowed"
        )
    return _PREFIX.pack(_MAGIC, len(header), hashlib.sha256(body).digest()) + body


def decode_manifest(raw: bytes, where: str) -> Manifest:
    """The manifest in `raw`, which was read from `where`.

    Raises: ValueError that names `where` and the field.
    """
    if not _PREFIX.size <= len(raw) <= MAX_MANIFEST_BYTES:
        raise fault(
            where, "size", f"{len(raw)} bytes, allowed {_PREFIX.size} to {MAX_MANIFEST_BYTES}"
        )
    magic, header_bytes, digest = _PREFIX.unpack_from(raw)
    if magic != _MAGIC:
        raise fault(where, "magic", f"{magic!r} instead of {_MAGIC!r}")
    most = min(MAX_MANIFEST_HEADER_BYTES, len(raw) - _PREFIX.size)
    if header_bytes > most:
        raise fault(where, "header bytes", f"{header_bytes}, at most {most} fit")
    body = memoryview(raw)[_PREFIX.size :]
    if hashlib.sha256(body).digest() != digest:
        raise fault(where, "checksum", "is not that of the contents")
    head = _header(body[:header_bytes], where)
    layers = tuple(_layer(where, at, item) for at, item in enumerate(head["layers"]))
    files = [_file(where, at, item) for at, item in enumerate(head["files"])]
    documents = [_document(where, at, item) for at, item in enumerate(head["documents"])]
    quotas = [_quota(where, at, item) for at, item in enumerate(head["quotas"])]
    if not layers:
        raise fault(where, "layers", "there are none")
    for field, items in (("files", files), ("documents", documents), ("quotas", quotas)):
        if len({item[0] for item in items}) != len(items):
            raise fault(where, field, "a name repeats")
    sizes = [rows * HASH_BYTES for _, _, rows in files]
    has_index = any(form.index_bytes for form in layers)
    for _, tokens, _, has_contents, _, _ in documents:
        blocks, full = -(-tokens // head["block_tokens"]), tokens // head["block_tokens"]
        sizes += [blocks * head["num_branches"] * HASH_BYTES, blocks * HASH_BYTES * has_index]
        sizes.append(full * CONTENT_BYTES * has_contents)
    table = body[header_bytes:]
    if len(table) != sum(sizes):
        raise fault(where, "hashes", f"{len(table)} bytes instead of {sum(sizes)}")
    ends = accumulate(sizes, initial=0)
    parts = iter([bytes(table[start:end]) for start, end in pairwise(ends)])
    manifest = Manifest(
        sequence=head["sequence"],
        block_tokens=head["block_tokens"],
        num_branches=head["num_branches"],
        layers=layers,
        files=tuple(BlockFile(name=n, kind=k, hashes=next(parts)) for n, k, _ in files),
        documents=tuple(
            SavedDocument(
                name=name,
                tokens=tokens,
                position=position,
                entries=next(parts),
                index=next(parts),
                contents=next(parts),
                group=group,
                is_pinned=is_pinned,
            )
            for name, tokens, position, _, group, is_pinned in documents
        ),
        quotas=tuple(quotas),
    )
    check_located(manifest, where)
    if encode_manifest(manifest) != raw:
        raise fault(where, "header", "is not encoded as this version encodes it")
    return manifest


class Users(NamedTuple):
    """Who has a block of some hash: its tokens, and the (document, block) of each."""

    tokens: int
    blocks: list[tuple[str, int]]


def users(manifest: Manifest, kind: Kind, where: str) -> dict[bytes, Users]:
    """For each hash of a closed block, who has it.

    Raises: ValueError that names `where` if a hash is in no file, or of blocks of different sizes.
    """
    found: dict[bytes, Users] = {}
    there = manifest.locations(kind)
    branches = manifest.num_branches if kind == "entries" else 1
    for document in manifest.documents:
        for at, name in enumerate(split_hashes(document.hashes(kind))):
            if name == UNCLOSED:
                continue
            block = at // branches
            left = document.tokens - block * manifest.block_tokens
            user = found.setdefault(name, Users(min(left, manifest.block_tokens), []))
            if name not in there or user.tokens != min(left, manifest.block_tokens):
                field = f"document {document.name!r}"
                raise fault(
                    where, field, f"block {block} ({kind}) is in no file, or of another size"
                )
            user.blocks.append((document.name, block))
    return found


def check_located(manifest: Manifest, where: str) -> None:
    """Raise a ValueError unless every closed block has a record, and every record bytes and a hash."""
    for file in manifest.files:
        if manifest.record_bytes(file.kind) == 0 or UNCLOSED in split_hashes(file.hashes):
            raise fault(where, f"file {file.name!r}", "has records without bytes or hash")
    for kind in KINDS:
        users(manifest, kind, where)
    _check_contents(manifest, where)


def _check_contents(manifest: Manifest, where: str) -> None:
    """Blocks of one content hash must have equal records and predecessors: they will be stored once."""
    size = manifest.num_branches * HASH_BYTES
    known: dict[bytes, tuple[int, bytes, bytes, bytes]] = {}
    for document in manifest.documents:
        before = b""
        for block, content in enumerate(split_contents(document.contents)):
            entries = document.entries[block * size : (block + 1) * size]
            index = document.index[block * HASH_BYTES : (block + 1) * HASH_BYTES]
            facts = (document.position, before, entries, index)
            if known.setdefault(content, facts) != facts:
                field = f"document {document.name!r}"
                raise fault(
                    where,
                    field,
                    f"block {block} has the content hash of another block, but other records",
                )
            before = content


def _header(raw: memoryview, where: str) -> dict[str, Any]:
    known = {*_NUMBERS, *_LISTS}
    try:
        # Tuples: an empty one takes no memory, however many of them a few bytes ask for.
        head = msgpack.unpackb(
            raw, use_list=False, max_array_len=max(_LISTS.values()), max_map_len=len(known)
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise fault(where, "header", f"is not valid msgpack: {error}") from error
    if not isinstance(head, dict) or head.keys() != known:
        raise fault(where, "header", f"must have the fields {sorted(known)}")
    for name, (low, high) in _NUMBERS.items():
        if not is_whole(head[name], low, high):
            raise fault(
                where, name, f"{_shown(head[name])} is not a whole number in [{low}, {high})"
            )
    for name, most in _LISTS.items():
        if type(head[name]) is not tuple or len(head[name]) > most:
            raise fault(where, name, f"must be a list of at most {most}")
    return head


def _layer(where: str, at: int, item: object) -> LayerForm:
    match item:
        case (str(entries), entry_bytes, str(index), index_bytes):
            if (
                is_whole(entry_bytes, 1, MAX_ENTRY_BYTES)
                and is_whole(index_bytes, 0, MAX_ENTRY_BYTES)
                and bool(index) == bool(index_bytes)
            ):
                return LayerForm(
                    entries=entries, entry_bytes=entry_bytes, index=index, index_bytes=index_bytes
                )
    raise fault(where, f"layers[{at}]", f"{_shown(item)} is not a layer")


def _file(where: str, at: int, item: object) -> tuple[str, Kind, int]:
    match item:
        case (str(name), rows) if is_file_name(name) and is_whole(rows, 1, (1 << 31) - 1):
            return name, "entries" if "-entries-" in name else "index", rows
    raise fault(where, f"files[{at}]", f"{_shown(item)} is not a file")


def _document(where: str, at: int, item: object) -> tuple[str, int, int, bool, str, bool]:
    match item:
        case (str(name), tokens, position, bool(has_contents), str(group), bool(is_pinned)):
            if (
                is_whole(tokens, 1, MAX_TOKENS)
                and is_whole(position, 0, MAX_POSITION)
                and is_name(name)
                and is_name(group)
            ):
                return name, tokens, position, has_contents, group, is_pinned
    raise fault(where, f"documents[{at}]", f"{_shown(item)} is not a document")


def _quota(where: str, at: int, item: object) -> tuple[str, int]:
    match item:
        case (str(group), blocks) if is_name(group) and is_whole(blocks, 0, MAX_QUOTA):
            return group, blocks
    raise fault(where, f"quotas[{at}]", f"{_shown(item)} is not a quota")


def _shown(item: object) -> str:
    return str(item)[:120]
