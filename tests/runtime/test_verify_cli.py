"""`qroam verify`: 0 for a sound snapshot, 1 and the lost blocks for a damaged one, 2 for none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from snapshot_files import written

from qroam.runtime.tools.cli import main


def test_verify_prints_what_is_there_and_what_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = written(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "snapshot 3: 2 documents, 6 records in 3 files, 1 blocks not closed yet; "
    )
    assert printed.count("\n") == 1
    victim = tmp_path / manifest.files[2].name
    victim.write_bytes(victim.read_bytes()[:-1])
    assert main(["verify", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"damaged: {victim}: size: 291 bytes, expected 292\n" in printed
    assert printed.endswith("  blocks lost: 'a' 0, 1; 'ü' 0\n")
    assert main(["verify", str(tmp_path), "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["damage"][0][1] == [["a", 0], ["a", 1], ["ü", 0]]


def test_verify_of_what_is_no_snapshot_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}: manifest: there is none, so no snapshot\n"
    )
    assert main(["verify", str(tmp_path / "none")]) == 2
    written(tmp_path)
    (tmp_path / "manifest").write_bytes(b"short")
    assert main(["verify", str(tmp_path)]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.endswith(
        f"error: {tmp_path / 'manifest'}: size: 5 bytes, allowed 44 to 268435456\n"
    )
