"""The manifest of a snapshot: one encoding, and nothing hostile is accepted."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from snapshot_files import WIDTH, B, forged, form, put, read_all, said, written

from qroam.partition.snapshot.folder import (
    read_manifest,
    write_manifest,
)
from qroam.partition.snapshot.format import (
    Manifest,
    SavedDocument,
    decode_manifest,
    encode_manifest,
    is_file_name,
    split_hashes,
)
from qroam.partition.snapshot.verify import verify


@pytest.mark.parametrize(
    "name",
    ["manifest", "../0123abcd-00001-index-00000.safetensors", "0123abcd-00001-index-00000.safetensors.tmp",
     "0123ABCD-00001-index-00000.safetensors", "0123abcd-1-index-00000.safetensors",
     "0123abcd-00001-both-00000.safetensors",
     "0123abcd-\u0660\u0660\u0660\u0660\u0660-index-00000.safetensors",
     "0123abcd-00001-index-00000.safetensors\n"],
)  # fmt: skip
def test_names_that_lead_elsewhere_are_none_of_ours(name: str) -> None:
    assert not is_file_name(name)


# What is wrong names the file and the field -----------------------------------------------------------


def test_a_sound_snapshot_is_read_back(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    found = read_manifest(tmp_path)
    assert found is not None
    assert found[0] == manifest
    result = verify(tmp_path)
    assert (result.records, result.unclosed, result.damage) == (6, 1, ())
    assert result.num_bytes == 3 * WIDTH + 3 * B * 3
    read_all(tmp_path)


HOSTILE = [
    ("sequence", put("sequence", -1)),
    ("sequence", put("sequence", True)),
    ("block_tokens", put("block_tokens", 0)),
    ("block_tokens", put("block_tokens", 1 << 40)),
    ("num_branches", put("num_branches", 1 << 30)),
    ("num_branches", put("num_branches", "1")),
    ("layers", put("layers", [])),
    ("layers", put("layers", {})),
    ("layers", put("layers", [["x", 1, "", 0]] * 5000)),
    ("layers[1]", put("layers", 1, 1, 0)),
    ("layers[1]", put("layers", 1, 1, 1 << 62)),
    ("layers[0]", put("layers", 0, 2, "")),
    ("layers[0]", put("layers", 0, None)),
    ("files[0]", put("files", 0, 0, "../../etc/passwd")),
    ("files[2]", put("files", 2, 1, 0)),
    ("files[2]", put("files", 2, 1, 1.0)),
    ("files", put("files", 1, 0, "0123abcd-00000-entries-00000.safetensors")),
    ("hashes", put("files", 2, 1, (1 << 31) - 1)),
    ("hashes", put("documents", 0, 1, (1 << 31) - 1)),
    ("documents[0]", put("documents", 0, 1, 0)),
    ("documents[0]", put("documents", 0, 2, -1)),
    ("documents[1]", put("documents", 1, 0, 7)),
    ("documents[1]", put("documents", 1, ["ü", 8])),
    ("documents[1]", put("documents", 1, 3, 1)),
    ("documents[1]", put("documents", 1, 4, "g" * 257)),
    ("documents[1]", put("documents", 1, 0, "n" * 257)),
    ("documents[0]", put("documents", 0, 5, None)),
    ("hashes", put("documents", 0, 3, True)),
    ("quotas[0]", put("quotas", [["g"]])),
    ("quotas[0]", put("quotas", [["g", -1]])),
    ("quotas[1]", put("quotas", [["g", 1], ["h", True]])),
    ("quotas", put("quotas", [["g", 1], ["g", 2]])),
    ("quotas", put("quotas", {})),
    ("documents", put("documents", 1, 0, "a")),
    ("header", put("more", 1)),
    ("header", lambda head: head.pop("files")),
    ("header", put("raw", b"\xc1")),
    ("header", put("raw", b"\x91" * 5000)),
    ("header", put("raw", b"\xdd\xff\xff\xff\xff")),
    ("header", put("raw", b"\xdf\xff\xff\xff\xff")),
    ("header", put("raw", b"\xc6\xff\xff\xff\xff")),
    ("header", put("raw", b"\x81\xa1\xff\x01")),
    ("header", put("raw", msgpack.packb([1, 2]))),
    ("header", put("raw", b"")),
    ("document 'a'", put("files", 0, 0, "0123abcd-00000-index-00009.safetensors")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "change"), HOSTILE, ids=[f"{n} {f}" for n, (f, _) in enumerate(HOSTILE)]
)
def test_a_hostile_field_is_named(
    tmp_path: Path, field: str, change: Callable[[dict[str, Any]], None]
) -> None:
    written(tmp_path)
    forged(tmp_path, change)
    assert said(tmp_path).startswith(f"{tmp_path / 'manifest'}: {field}: ")


def test_hashes_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    table = (tmp_path / "manifest").read_bytes()[-14 * 16 :]
    hashes = split_hashes(table)

    def with_hash(at: int, name: bytes) -> str:
        forged(tmp_path, lambda head: None, table[: at * 16] + name + table[(at + 1) * 16 :])
        return said(tmp_path)

    file = manifest.files[0].name
    assert f"file {file!r}: has records without bytes or hash" in with_hash(0, bytes(16))
    nowhere = "document 'ü': block 0 (index) is in no file, or of another size"
    assert nowhere in with_hash(12, b"x" * 16)
    # The second block of 'a' has two tokens, the first one of 'ü' four.
    assert nowhere.replace("index", "entries") in with_hash(10, hashes[7])
    # Consistent, but not what the bytes say: another record of the same size, another length.
    assert "its bytes are not those of its hash" in swapped(tmp_path, table)
    forged(tmp_path, put("documents", 0, 1, 7), table)
    assert f"{tmp_path / file}: record 1: its bytes are not those of its hash" in said(tmp_path)


def test_a_manifest_has_one_encoding(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    short, long = b"sequence\x03", b"sequence\xcd\x00\x03"  # 3 in one byte, and in three

    def longer(head: dict[str, Any]) -> None:
        packed = msgpack.packb(head)
        assert packed.count(short) == 1
        head["raw"] = packed.replace(short, long)

    assert read_manifest(tmp_path) is not None
    forged(tmp_path, longer)
    assert said(tmp_path).endswith("header: is not encoded as this version encodes it")
    assert decode_manifest(encode_manifest(manifest), "here") == manifest


def test_blocks_that_say_the_same_must_be_the_same(tmp_path: Path) -> None:
    """They would be stored once, so one document would get the other's."""
    manifest = written(tmp_path)
    first, second = manifest.documents
    one, other = bytes([1]) * 32, bytes([2]) * 32
    same_content = "block 0 has the content hash of another block, but other records"

    def accepted(first: SavedDocument, second: SavedDocument) -> Manifest:
        raw = encode_manifest(replace(manifest, documents=(first, second)))
        return decode_manifest(raw, "here")

    first = replace(first, contents=one)
    twin = replace(first, name="ü", tokens=8, contents=one + other)
    twin = replace(twin, entries=first.entries[:16] * 2, index=first.index[:16] * 2)
    assert accepted(first, twin).documents == (first, twin)
    for wrong in (
        replace(second, contents=one + other),
        replace(twin, position=1),
        replace(twin, entries=second.entries),
        replace(twin, index=second.index),
    ):
        with pytest.raises(ValueError, match=same_content):
            accepted(first, wrong)
    with pytest.raises(
        ValueError, match="block 1 has the content hash of another block, but other records"
    ):
        accepted(first, replace(twin, contents=one + one))
    with pytest.raises(
        ValueError, match="block 0 has the content hash of another block, but other records"
    ):
        accepted(replace(twin, name="a"), replace(first, name="ü", contents=other))


def swapped(folder: Path, table: bytes) -> str:
    """The hashes of the first and the third record (both of four tokens) change places in the files."""
    hashes = split_hashes(table)
    hashes[0], hashes[2] = hashes[2], hashes[0]
    forged(folder, lambda head: None, b"".join(hashes))
    return said(folder)


def test_blocks_of_a_kind_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    plain = replace(manifest, layers=(form(index=0),), documents=(), files=manifest.files[2:])
    write_manifest(tmp_path, encode_manifest(plain))
    assert "has records without bytes or hash" in said(tmp_path)


def test_a_manifest_too_large_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = written(tmp_path)
    with (tmp_path / "manifest").open("r+b") as file:
        file.truncate(1 << 40)  # sparse
    assert "size: 1099511627776 bytes, at most" in said(tmp_path)
    monkeypatch.setattr("qroam.partition.snapshot.format.MAX_MANIFEST_BYTES", 200)
    with pytest.raises(ValueError, match="200"):
        encode_manifest(manifest)


def test_random_mutations_of_a_forged_manifest_are_refused_or_sound(tmp_path: Path) -> None:
    """Bytes changed under a right checksum: a ValueError that names the file, or another valid one."""
    written(tmp_path)
    raw = (tmp_path / "manifest").read_bytes()
    rng = random.Random(11)
    refused: list[str] = []
    for _ in range(3000):
        body = bytearray(raw[44:])
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(len(body))
            match rng.randrange(3):
                case 0:
                    body[at] = rng.randrange(256)
                case 1:
                    del body[at : at + rng.randrange(1, 9)]
                case 2:
                    body[at:at] = rng.randbytes(rng.randrange(1, 9))
        size = struct.unpack_from("<I", raw, 8)[0] + rng.choice(
            (0, 0, 0, len(body) - len(raw) + 44)
        )
        digest = hashlib.sha256(body).digest()
        mutant = struct.pack("<8sI32s", raw[:8], max(size, 0), digest) + bytes(body)
        try:
            again = decode_manifest(mutant, "here")
        except ValueError as error:
            refused.append(str(error))
        else:
            assert decode_manifest(encode_manifest(again), "here") == again
    assert all(text.startswith("here: ") for text in refused)
    assert len(refused) > 1000
