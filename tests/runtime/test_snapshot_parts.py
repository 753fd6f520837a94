"""What ranks tell each other of a snapshot: blocks that changed meanwhile, and malformed messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import run_loopback
from snapshot_world import B, add, attended, config, contents, late_writer, world
from spoiling import on, spoiling

from qroam.partition.snapshot.folder import read_manifest
from qroam.partition.snapshot.verify import verify
from qroam.runtime import PeerError, Runtime
from qroam.runtime.transport.base import Transport


@pytest.mark.parametrize(
    ("key", "generation"), [(5, 0), (1, 1)], ids=["to another key", "to the key's next block"]
)
def test_a_slot_given_away_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: int, generation: int
) -> None:
    """The writer reads beside the steps: key and generation tell it that a block is another one now."""
    let_go = late_writer(monkeypatch)

    def work(runtime: Runtime) -> None:
        add(runtime, "a", 12)
        runtime.begin_snapshot(tmp_path / "s")
        store = runtime._world.stores.entries
        slots = store.slot_of[1:2].clone()
        store.release(torch.tensor([1]))
        store.assign(torch.tensor([key]), slots, torch.tensor([generation]))
        store.write(0, torch.arange(key * B, (key + 1) * B), torch.ones(B, 64, dtype=torch.uint8))
        let_go.set()
        assert runtime.finish_snapshot().written == 2

    world(1, work)
    manifest, _ = read_manifest(tmp_path / "s") or pytest.fail("no manifest")
    (document,) = manifest.documents
    closed = [document.entries[at : at + 16] != bytes(16) for at in range(0, 48, 16)]
    assert closed == [True, False, True]


def test_a_document_removed_meanwhile_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one has its name, its blocks and its slots by the time that they are read."""
    let_go = late_writer(monkeypatch)

    def first(runtime: Runtime) -> list[str]:
        add(runtime, "a", 12)
        add(runtime, "b", 12)
        runtime.begin_snapshot(tmp_path / "s")
        runtime.remove_document("b")
        runtime.add_document("b", tokens=10)
        for layer in range(2):
            runtime.load_document("b", layer, contents("c", 10, layer))
        runtime.idle_attend(0)  # all have come so far
        let_go.set()
        runtime.finish_snapshot()
        manifest, _ = read_manifest(tmp_path / "s") or pytest.fail("no manifest")
        names = [document.name for document in manifest.documents]
        runtime.idle_attend(0)
        runtime.snapshot(tmp_path / "s")
        return names

    def later(runtime: Runtime) -> None:
        report = runtime.restore(tmp_path / "s")
        assert report.documents == {"a": 12, "b": 10}
        attended(runtime, "a", 12)
        attended(runtime, "b", 10, seed="c")

    assert world(2, first) == [["a"]] * 2
    assert verify(tmp_path / "s").damage == ()
    world(3, later)


@pytest.mark.parametrize(
    ("kind", "column", "change"),
    [
        ("snapshot-parts", "entries.keys", lambda rows: rows + 1),
        ("snapshot-parts", "entries.keys", lambda rows: rows - 100),
        ("snapshot-parts", "entries.hashes", lambda rows: rows[1:]),
        ("snapshot-parts", "entries.hashes", lambda rows: rows[:, 1:]),
        ("snapshot-parts", "files.rows", lambda rows: rows * 2**24),
        ("snapshot-parts", "files.kind", lambda rows: rows + 5),
        ("snapshot-parts", "files.hashes", lambda rows: rows.int()),
        ("verify", "at", lambda rows: rows + 1000),
        ("verify", "at", torch.zeros_like),
        ("verify", "hashes", lambda rows: rows[1:]),
    ],
)
def test_a_malformed_part_names_its_sender(
    kind: str, column: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    def work(end: Transport) -> str:
        with Runtime.open(config(deadline_s=2.0), end) as runtime:
            add(runtime, "a", 30)
            try:
                runtime.snapshot(tmp_path / "s")
                runtime.verify_copies()
                runtime.idle_attend(0)
            except PeerError as error:
                return str(error)
            return "nothing"

    ends = spoiling(on(kind, column, change)).world(2, deadline_s=2.0)
    for told in run_loopback(2, work, transports=ends):
        assert told.startswith("rank 1: sent "), told
    assert kind == "verify" or not (tmp_path / "s" / "manifest").exists()
