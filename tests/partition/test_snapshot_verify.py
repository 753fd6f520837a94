"""A snapshot compared with its hashes: the blocks that are lost are named."""

from __future__ import annotations

from pathlib import Path

from snapshot_files import WIDTH, written

from qroam.partition.snapshot.verify import verify


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
