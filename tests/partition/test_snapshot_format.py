"""The snapshot's bytes: round trips, what other tools can read, and that nothing hostile is accepted."""

from __future__ import annotations

import hashlib
import os
import random
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from safetensors.torch import load_file

from qroam.partition.codec import make_codec
from qroam.partition.pool import KINDS, BlockStore, Kind
from qroam.partition.snapshot.folder import (
    FolderLock,
    RecordReader,
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
    decode_manifest,
    encode_manifest,
    file_header,
    file_name,
    is_file_name,
    split_hashes,
    users,
)
from qroam.partition.snapshot.record import (
    BlockHashes,
    block_hash,
    closed,
    hash_records,
    put_records,
    take_records,
)
from qroam.partition.snapshot.verify import verify

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


# Records --------------------------------------------------------------------------------------------


def test_a_record_is_the_same_wherever_its_block_lies() -> None:
    codecs = [make_codec("fp32", dim=5), None, make_codec("fp8_index", dim=32)]
    one, other = (BlockStore(codecs, num_slots=4, num_keys=6, block_tokens=B) for _ in range(2))
    tokens = torch.tensor([4, 3], dtype=torch.int32)
    one.assign(torch.tensor([0, 1]), torch.tensor([2, 0]))
    for layer, codec in enumerate(codecs):
        if codec is not None:
            entries = torch.randn(7, codec.dim, generator=torch.Generator().manual_seed(layer))
            assert not closed(one, torch.tensor([0, 1]), tokens).any()
            one.write(layer, torch.arange(7), codec.encode(entries))
    assert closed(one, torch.tensor([0, 1]), tokens).all()
    assert not closed(one, torch.tensor([0, 1, 5]), torch.tensor([3, 4, 4])).any()
    records = take_records(one, torch.tensor([2, 0]), tokens)
    assert not records[1, 3 * 20 : 4 * 20].any()  # what lies beyond the last token says nothing
    other.assign(torch.tensor([4, 3]), torch.tensor([1, 3]))
    put_records(other, torch.tensor([4, 3]), tokens, records)
    assert torch.equal(take_records(other, torch.tensor([1, 3]), tokens), records)
    for layer in (0, 2):
        at = torch.arange(7)
        there = torch.tensor([16, 17, 18, 19, 12, 13, 14])
        ours, theirs = one.resolve(layer, at)[0], other.resolve(layer, there)[0]
        assert torch.equal(one.rows(layer, ours), other.rows(layer, theirs))


def test_a_hash_tells_every_bit_and_the_tokens_apart() -> None:
    record = torch.zeros(40, dtype=torch.uint8)
    names = {block_hash(record, tokens) for tokens in (1, 2, 3)}
    for at in range(40):
        changed = record.clone()
        changed[at] = 1 << (at % 8)
        names.add(block_hash(changed, 3))
    assert len(names) == 43
    # Pinned: snapshots of earlier versions stay readable.
    assert block_hash(record, 3) == hashlib.sha256(struct.pack("<q", 3) + bytes(40)).digest()[:16]


def test_a_known_hash_is_of_one_generation() -> None:
    hashes = BlockHashes(3)
    keys, name = torch.tensor([1]), torch.full((1, 16), 7, dtype=torch.uint8)
    assert not hashes.find(keys, torch.tensor([0]))[1].any()
    hashes.keep(keys, torch.tensor([4]), name)
    found, known = hashes.find(torch.tensor([0, 1, 1]), torch.tensor([4, 4, 5]))
    assert known.tolist() == [False, True, False]
    assert torch.equal(found[1], name[0])


# Data files -----------------------------------------------------------------------------------------


def test_any_safetensors_reader_reads_a_data_file(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    for file in manifest.files:
        (blocks,) = load_file(tmp_path / file.name).values()
        assert blocks.shape == (file.rows, manifest.record_bytes(file.kind))
        with RecordReader(tmp_path, manifest, file) as reader:
            assert torch.equal(reader.read(range(file.rows)), blocks)


def test_files_end_at_their_size_and_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qroam.partition.snapshot.folder.FILE_BYTES", 100)
    writer = RecordWriter(tmp_path, token="0123abcd", rank=7, kind="index", width=40)
    records = torch.arange(7 * 40).remainder(251).byte().view(7, 40)
    names = [bytes([at]) * 16 for at in range(7)]
    writer.append(records[:3], names[:3])
    writer.append(records[3:], names[3:])
    files = writer.close()
    assert [file.rows for file in files] == [2, 2, 2, 1]
    assert [file.name for file in files] == [
        file_name("0123abcd", 7, "index", number) for number in range(4)
    ]
    assert all(is_file_name(path.name) for path in tmp_path.iterdir())
    loaded = [load_file(tmp_path / file.name)["blocks"] for file in files]
    assert torch.equal(torch.cat(loaded), records)


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


def test_a_sound_snapshot_is_read_back(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    found = read_manifest(tmp_path)
    assert found is not None
    assert found[0] == manifest
    result = verify(tmp_path)
    assert (result.records, result.unclosed, result.damage) == (6, 1, ())
    assert result.num_bytes == 3 * WIDTH + 3 * B * 3
    read_all(tmp_path)


@pytest.mark.parametrize("which", [0, 2])
def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, which: int) -> None:
    manifest = written(tmp_path)
    rng = random.Random(which)
    for path in (tmp_path / "manifest", tmp_path / manifest.files[which].name):
        raw = path.read_bytes()
        for at in rng.sample(range(len(raw)), min(60, len(raw))):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << rng.randrange(8))]) + raw[at + 1 :])
            assert said(tmp_path).startswith(f"{path}: ")
            path.write_bytes(raw[:at])
            assert said(tmp_path).startswith(f"{path}: ")
        path.write_bytes(raw + b"\0")
        assert said(tmp_path).startswith(f"{path}: ")
        path.write_bytes(raw)


def test_a_header_of_another_shape_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """The right size, a valid safetensors file, and yet not what the manifest says."""
    manifest = written(tmp_path)
    path = tmp_path / manifest.files[0].name
    raw = path.read_bytes()
    other = file_header("entries", 1, 2 * WIDTH)
    path.write_bytes(other + raw[len(other) :])
    assert load_file(path)["blocks"].shape == (1, 2 * WIDTH)
    assert said(tmp_path) == f"{path}: header: is not that of the records in the manifest"


def test_a_file_cut_short_underneath_is_an_error_and_not_a_signal(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    file = manifest.files[0]
    with RecordReader(tmp_path, manifest, file) as reader:
        os.truncate(tmp_path / file.name, 300)
        with pytest.raises(ValueError, match="record 1: the file was cut short"):
            reader.read([1])


def test_pipes_and_missing_files_do_not_hang(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    path = tmp_path / manifest.files[1].name
    path.unlink()
    assert said(tmp_path).startswith(f"{path}: size: no such file")
    os.mkfifo(path)
    assert said(tmp_path) == f"{path}: type: is not a regular file"
    (tmp_path / "manifest").unlink()
    os.mkfifo(tmp_path / "manifest")
    assert said(tmp_path) == f"{tmp_path / 'manifest'}: type: is not a regular file"


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
    with pytest.raises(ValueError, match="block 1 has the content hash"):
        accepted(first, replace(twin, contents=one + one))
    with pytest.raises(ValueError, match="block 0 has the content hash"):
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


# The lock, and verification ---------------------------------------------------------------------------


def test_the_lock_is_for_one_writer_or_many_readers(tmp_path: Path) -> None:
    with FolderLock(tmp_path, exclusive=True):
        for exclusive in (True, False):
            with pytest.raises(ValueError, match=f"{tmp_path}: lock: "):
                FolderLock(tmp_path, exclusive=exclusive)
    with (
        FolderLock(tmp_path, exclusive=False),
        FolderLock(tmp_path, exclusive=False),
        pytest.raises(ValueError, match="lock"),
    ):
        FolderLock(tmp_path, exclusive=True)
    FolderLock(tmp_path, exclusive=True).release()


def test_verify_names_the_blocks_that_are_lost(tmp_path: Path) -> None:
    manifest = written(tmp_path)
    entries = tmp_path / manifest.files[0].name
    raw = bytearray(entries.read_bytes())
    raw[-1] ^= 1
    entries.write_bytes(raw)
    index = tmp_path / manifest.files[2].name
    index.unlink()
    result = verify(tmp_path)
    assert [damage.blocks for damage in result.damage] == [
        (("a", 1),),
        (("a", 0), ("a", 1), ("ü", 0)),
    ]
    assert result.damage[0].what == f"{entries}: record 1: its bytes are not those of its hash"
    assert result.damage[1].what.startswith(f"{index}: size: no such file")
    assert result.records == 6
    assert result.num_bytes == 2 * WIDTH
