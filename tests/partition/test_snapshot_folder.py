"""Files of a snapshot: any reader reads them, and what is damaged, missing or locked is named."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from snapshot_files import WIDTH, said, written

from qroam.partition.snapshot.folder import FolderLock, RecordReader, RecordWriter
from qroam.partition.snapshot.format import file_header, file_name, is_file_name


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
