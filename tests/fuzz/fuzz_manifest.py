"""Snapshot manifests as a target of the fuzzer: headers, hashes and sizes that lie under a right checksum.

What is accepted is read once more, plainly, from the same bytes: every field in its range, every hash
where the header says, every closed block in a file of its kind, blocks that say the same the same.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import msgpack
from fuzzing import HOSTILE_INTS, Target, mutated_bytes, mutated_tree, packb

from qroam.partition.pool import Kind
from qroam.partition.snapshot.format import (
    BlockFile,
    LayerForm,
    Manifest,
    SavedDocument,
    decode_manifest,
    encode_manifest,
    file_name,
)

B, G, HASH, CONTENT, BEFORE = 4, 2, 16, 32, 44  # tokens, branches, bytes of each, of the prefix
FORM = LayerForm(entries="fp32", entry_bytes=12, index="fp8", index_bytes=3)


def hashes(*numbers: int, size: int = HASH) -> bytes:
    """Made-up hashes; 0 is of a block that is not closed."""
    return b"".join(bytes([number]) * size for number in numbers)


def _file(rank: int, kind: Kind, numbers: range) -> BlockFile:
    name = file_name("0123abcd", rank, kind, 0)
    return BlockFile(name=name, kind=kind, hashes=hashes(*numbers))


WHOLE = Manifest(
    sequence=3,
    block_tokens=B,
    num_branches=G,
    layers=(FORM, replace(FORM, index="", index_bytes=0)),
    files=(
        _file(0, "entries", range(1, 7)),
        _file(1, "entries", range(7, 13)),
        _file(1, "index", range(1, 8)),
    ),
    documents=(
        SavedDocument(
            name="a",
            tokens=10,
            position=0,
            entries=hashes(1, 2, 3, 4, 11, 12),
            index=hashes(1, 2, 6),
            contents=hashes(1, 2, size=CONTENT),
        ),
        SavedDocument(
            name="ü",
            tokens=12,
            position=0,
            entries=hashes(1, 2, 5, 6, 0, 0),
            index=hashes(1, 3, 0),
            contents=hashes(1, 3, 4, size=CONTENT),
            group="g",
            is_pinned=True,
        ),
        SavedDocument(name="c", tokens=4, position=9, entries=hashes(7, 8), index=hashes(5)),
    ),
    quotas=(("g", 7), ("h", 0)),
)
PLAIN = Manifest(
    sequence=1,
    block_tokens=B,
    num_branches=1,
    layers=(replace(FORM, index="", index_bytes=0),),
    files=(_file(0, "entries", range(1, 4)),),
    documents=(SavedDocument(name="a", tokens=9, position=2, entries=hashes(1, 2, 3), index=b""),),
)
MANIFESTS = [
    encode_manifest(manifest)
    for manifest in (WHOLE, PLAIN, replace(WHOLE, files=(), documents=(), quotas=()))
]


def draw_manifest(random: Random) -> bytes:
    """Edited bytes; or an edited header, edited hashes or both, under a checksum that is right."""
    raw = random.choice(MANIFESTS[:2] * 4 + MANIFESTS[2:])
    if random.random() < 0.15:
        return mutated_bytes(random, raw, MANIFESTS)
    size = struct.unpack_from("<I", raw, 8)[0]
    head, table = msgpack.unpackb(raw[BEFORE : BEFORE + size]), raw[BEFORE + size :]
    kind = random.random()
    if kind < 0.3:
        _edit(random, head)
    elif kind < 0.65:
        for _ in range(random.randint(1, 2)):
            head = mutated_tree(random, head)
    if kind > 0.55 and table:
        table = _edited_hashes(random, table)
    packed = packb(head)
    if random.random() < 0.05:
        packed = mutated_bytes(random, packed, [packed])
    body = packed + table
    size = random.choice(HOSTILE_INTS) % 2**32 if random.random() < 0.03 else len(packed)
    magic = b"qroamsn" + random.choice((b"1",) * 30 + (b"0", b"2"))
    return struct.pack("<8sI32s", magic, size, hashlib.sha256(body).digest()) + body


def _edit(random: Random, head: dict[str, Any]) -> None:
    """Change a field to another value of its type and near its bounds."""
    numbers = (0, 1, 2, 7, 2**20, 2**31 - 1, 2**31, 2**53 - 1, 2**53)
    texts = ("", "a", "ü", "g", "x" * 256, "x" * 257)
    items: list[tuple[Any, Any]] = [(head, "sequence"), (head, "block_tokens")]
    items += [(form, 1) for form in head["layers"]] + [(quota, 1) for quota in head["quotas"]]
    items += [(file, 0) for file in head["files"]]
    items += [(document, at) for document in head["documents"] for at in (0, 1, 2, 4, 5)]
    where, field = random.choice(items)
    match where[field]:
        case bool(value):
            where[field] = not value
        case int(value):
            where[field] = random.choice((*numbers, value + 1, max(value - 1, 0)))
        case str(name) if name.endswith(".safetensors"):
            other = name.replace(*random.choice((("entries", "index"), ("0123", "4567"))))
            where[field] = random.choice((f"../{name}", f"{name}\n", name.upper(), other))
        case _:
            where[field] = random.choice(texts)


def _edited_hashes(random: Random, table: bytes) -> bytes:
    """One hash is another's, nobody's, that of an open block, or missing; or two change places."""
    rows = [table[at : at + HASH] for at in range(0, len(table), HASH)]
    one, other = random.randrange(len(rows)), random.randrange(len(rows))
    match random.randrange(6):
        case 0:
            rows[one] = rows[other]
        case 1:
            rows[one] = random.randbytes(HASH)
        case 2:
            rows[one] = bytes(HASH)
        case 3:
            rows[one], rows[other] = rows[other], rows[one]
        case 4:
            del rows[one]
        case _:
            rows.insert(one, rows[other][: random.randint(1, HASH)])
    return b"".join(rows)


def check_manifest(raw: bytes, manifest: Manifest) -> None:
    """What the bytes say, read plainly, is what was read of them, and may be believed."""
    assert encode_manifest(manifest) == raw, "has another encoding too"
    body = raw[BEFORE:]
    assert raw[12:BEFORE] == hashlib.sha256(body).digest(), "checksum"
    size = int.from_bytes(raw[8:12], "little")
    head, table = msgpack.unpackb(body[:size]), body[size:]
    for name, least in (("sequence", 1), ("block_tokens", 1), ("num_branches", 1)):
        assert type(head[name]) is int, name
        assert head[name] >= least, name
        assert head[name] == getattr(manifest, name), name
    at = 0

    def cut(count: int, width: int = HASH) -> list[bytes]:
        nonlocal at
        start, at = at, at + count * width
        assert at <= len(table), "hashes beyond the end"
        return [table[one : one + width] for one in range(start, at, width)]

    widths = {"entries": 0, "index": 0}
    for entries, entry_bytes, index, index_bytes in head["layers"]:
        assert isinstance(entries, str)
        assert (index == "") == (index_bytes == 0), "an indexer without bytes, or bytes without one"
        assert min(entry_bytes - 1, index_bytes) >= 0, "sizes of a layer"
        widths["entries"] += entry_bytes
        widths["index"] += index_bytes
    held: dict[str, set[bytes]] = {"entries": set(), "index": set()}
    names = [name for name, _ in head["files"]]
    assert len(set(names)) == len(names), "a file twice"
    for (name, rows), file in zip(head["files"], manifest.files, strict=True):
        own = cut(rows)
        assert (file.name, file.hashes) == (name, b"".join(own)), "a file's hashes"
        assert "/" not in name, "a name that leads elsewhere"
        assert f"-{file.kind}-" in name, "of another kind than its name says"
        assert widths[file.kind] > 0, "records without bytes"
        assert bytes(HASH) not in own, "a record without a hash"
        held[file.kind] |= set(own)
    tokens_of: dict[tuple[str, bytes], int] = {}
    says: dict[bytes, object] = {}
    names = [item[0] for item in head["documents"]]
    assert len(set(names)) == len(names), "a document twice"
    for item, document in zip(head["documents"], manifest.documents, strict=True):
        name, tokens, position, speaks, group, pinned = item
        facts = (document.name, document.tokens, document.position)
        assert (*facts, document.group, document.is_pinned) == (
            name,
            tokens,
            position,
            group,
            pinned,
        )
        assert min(tokens - 1, position) >= 0, "tokens or position"
        assert max(len(name), len(group)) <= 256, "a long name"
        block_tokens, branches = head["block_tokens"], head["num_branches"]
        blocks = -(-tokens // block_tokens)
        found = {"entries": cut(blocks * branches), "index": cut(blocks * (widths["index"] > 0))}
        contents = cut(tokens // block_tokens * speaks, CONTENT)
        given = (document.entries, document.index, document.contents)
        assert given == tuple(b"".join(part) for part in (*found.values(), contents)), "hashes"
        for kind, own in found.items():
            for number, one in enumerate(own):
                block = number // branches if kind == "entries" else number
                here = min(tokens - block * block_tokens, block_tokens)
                assert one in held[kind] or one == bytes(HASH), "a closed block in no file"
                assert one == bytes(HASH) or tokens_of.setdefault((kind, one), here) == here
        for block, content in enumerate(contents):
            entries = found["entries"][block * branches : (block + 1) * branches]
            same = (position, contents[:block][-1:], entries, found["index"][block : block + 1])
            assert says.setdefault(content, same) == same, "says the same and differs"
    assert at == len(table), "hashes of nothing"
    assert [tuple(quota) for quota in head["quotas"]] == list(manifest.quotas)
    assert len(dict(head["quotas"])) == len(head["quotas"]), "two quotas of a group"
    assert all(blocks >= 0 for _, blocks in head["quotas"]), "a quota"


MANIFEST = Target(
    name="manifest",
    draw=draw_manifest,
    read=partial(decode_manifest, where="fuzz"),
    check=check_manifest,
)
