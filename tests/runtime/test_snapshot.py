"""Snapshots of a world: restored onto other ranks and placements, while serving, incremental, failing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from effort import slow_between
from ranks import RankPool, run_loopback
from snapshot_world import B, add, attended, config, contents, late_writer, refused, world
from snapshots import restore, save
from spoiling import on, spoiling

from qroam.partition.placement import Placement
from qroam.partition.presets import uniform_model
from qroam.partition.snapshot import folder as folder_module
from qroam.partition.snapshot.folder import read_manifest
from qroam.partition.snapshot.record import take_records
from qroam.partition.snapshot.verify import verify
from qroam.runtime import PeerError, Runtime, SnapshotError
from qroam.runtime.corpus import snapshot as step
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport

# What was saved, and what it is restored onto: other ranks, placements, copies, index placements.
PAIRS = [
    (Case(seed=1, world=1), {"world": 3, "copies": 2}),
    (Case(seed=2, world=3, prefilled=2, layers=2, picks="select"), {"world": 2}),
    (
        Case(seed=3, world=4, picks="select", index_placement="replicated", copies=2),
        {"world": 3, "index_placement": "with-blocks", "policy": "document-affine"},
    ),
    (
        Case(seed=4, world=2, picks="select", storage="fp8-fp64", prefilled=1),
        {"world": 4, "index_placement": "replicated", "policy": "balanced"},
    ),
    (
        Case(seed=5, world=4, architecture="mlra-4", policy="branch-split", prefilled=1),
        {"world": 3, "policy": "contiguous", "lease_entries": 40},
    ),
    (Case(seed=6, world=3, architecture="mixed", storage="bf16"), {"world": 1}),
]


@pytest.mark.parametrize(
    ("case", "changes"), slow_between(2, PAIRS), ids=[str(c.seed) for c, _ in PAIRS]
)
def test_what_was_saved_is_restored_onto_another_world(
    case: Case, changes: dict[str, Any], tmp_path: Path
) -> None:
    other = replace(case, **changes)
    saved = run_loopback(case.world, partial(save, case=case, folder=tmp_path / "s"))
    found = run_loopback(other.world, partial(restore, case=other, folder=tmp_path / "s"))
    for report, hashes in found:
        assert hashes == saved[0][1], "blocks differ from those that were saved"
        assert list(report.documents.values()) == list(case.documents)
    verified = verify(tmp_path / "s")
    assert verified.damage == ()
    assert verified.unclosed == 0
    assert verified.records == sum(report.written for report, _ in saved)


def test_ranks_that_are_processes(four_ranks: RankPool, tmp_path: Path) -> None:
    case = Case(seed=7, world=4, picks="select", prefilled=1, copies=2)
    saved = four_ranks.run(save, case, tmp_path / "s")
    found = run_loopback(
        2, partial(restore, case=replace(case, world=2, copies=1), folder=tmp_path / "s")
    )
    assert {hashes == saved[0][1] for _, hashes in found} == {True}


# Small worlds of one plain layer kind, written by hand ----------------------------------------------


def test_what_is_on_disk_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def counted(store: Any, slots: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        read.append(len(slots))
        return take_records(store, slots, *rest, **named)

    monkeypatch.setattr(step, "take_records", counted)

    def first(runtime: Runtime) -> list[int]:
        add(runtime, "a", 30)
        written = [runtime.snapshot(tmp_path / "s").written]
        written.append(runtime.snapshot(tmp_path / "s").written)
        add(runtime, "b", 9)
        runtime.add_document("a again", tokens=30)
        for layer in range(2):
            runtime.load_document("a again", layer, contents("a", 30, layer))
        return [*written, runtime.snapshot(tmp_path / "s").written]

    def later(runtime: Runtime) -> list[int]:
        runtime.restore(tmp_path / "s")
        written = [runtime.snapshot(tmp_path / "s").written]
        add(runtime, "c", 5)
        attended(runtime, "a again", 30)
        return [*written, runtime.snapshot(tmp_path / "s").written]

    files = tmp_path / "s"
    totals = [sum(column) for column in zip(*world(2, first), strict=True)]
    assert totals == [8, 0, 3]
    assert (
        sum(read) == 8 + 3 + 8
    )  # what is known to be there is not even read; "a again" is not known
    before = {path: path.stat().st_mtime_ns for path in files.glob("*.safetensors")}
    totals = [sum(column) for column in zip(*world(3, later), strict=True)]
    assert totals == [0, 2]
    assert sum(read) == 8 + 3 + 8 + 2
    assert before.items() <= {p: p.stat().st_mtime_ns for p in files.glob("*.safetensors")}.items()
    assert verify(files).sequence == 5


def test_blocks_that_are_not_closed_wait_for_the_next_snapshot(tmp_path: Path) -> None:
    def write(runtime: Runtime, start: int, ends: tuple[int, int]) -> None:
        if runtime.rank != 1:  # not the owner: the next step, a snapshot too, takes it there
            return
        request = runtime.request(into="a", start=start)
        ids = runtime.append(request, max(ends) - start)
        for layer, end in enumerate(ends):
            runtime.write(layer, ids[: end - start], contents("a", 14, layer)[start:end])
        runtime.release(request)

    def first(runtime: Runtime) -> int:
        runtime.add_document("a", tokens=14)
        write(runtime, 0, (10, 6))
        return runtime.snapshot(tmp_path / "s").closed

    def later(runtime: Runtime) -> dict[str, int]:
        report = runtime.restore(tmp_path / "s")
        write(runtime, 4, (14, 14))  # goes on where the closed blocks end
        runtime.idle_attend(0)
        runtime.idle_attend(1)
        attended(runtime, "a", 14)
        runtime.snapshot(tmp_path / "s")
        return dict(report.documents)

    assert sum(world(2, first)) == 1
    assert verify(tmp_path / "s").unclosed == 3
    assert world(3, later) == [{"a": 4}] * 3
    assert verify(tmp_path / "s").unclosed == 0


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


def test_files_of_no_use_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "s"

    def work(runtime: Runtime) -> None:
        add(runtime, "a", 12)
        runtime.snapshot(folder)

    world(2, work)
    orphan = folder / "0123abcd-00001-entries-00000.safetensors.tmp"
    orphan.write_bytes(b"of an attempt that died")
    foreign = folder / "notes.safetensors"
    foreign.write_bytes(b"somebody's")
    (folder / "manifest").unlink()
    world(1, work)
    assert not orphan.exists()
    assert foreign.exists()
    manifest, _ = read_manifest(folder) or pytest.fail("no manifest")
    left = {path.name for path in folder.iterdir()}
    assert left == {"manifest", "lock", foreign.name, *(file.name for file in manifest.files)}


def test_a_file_that_is_mostly_of_no_use_is_written_anew(tmp_path: Path) -> None:
    """Once a snapshot found it so, the next one writes what is left of it; then it goes."""
    folder = tmp_path / "s"

    def work(runtime: Runtime) -> list[tuple[int, int]]:
        def saved() -> tuple[int, int]:
            written = runtime.snapshot(folder).written
            runtime.idle_attend(0)
            return written, sum(path.stat().st_size for path in folder.glob("*.safetensors"))

        for name, tokens in (("a", 16), ("b", 12), ("c", 4)):
            add(runtime, name, tokens)
        sizes = [saved()]
        runtime.remove_document("a")
        sizes += [saved(), saved()]  # half is of use
        runtime.remove_document("b")
        sizes += [saved(), saved(), saved()]
        attended(runtime, "c", 4)
        return sizes

    record, header = 2 * B * 64, 256
    whole = (8, header + 8 * record)
    less = (1, header + record)
    assert world(1, work) == [
        [whole, (0, whole[1]), (0, whole[1]), (0, whole[1]), less, (0, less[1])]
    ]
    assert verify(folder).damage == ()

    def later(runtime: Runtime) -> None:
        assert runtime.restore(folder).documents == {"c": 4}
        attended(runtime, "c", 4)

    world(2, later)


# What a world knows of its documents comes back ----------------------------------------------------

TEXT = tuple(range(100, 114))  # 14 tokens: three blocks and a half


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    """Order, groups, pins, quotas; shared beginnings once, though who stored them first is gone."""
    folder = tmp_path / "s"

    def first(runtime: Runtime) -> tuple[int, int]:
        runtime.add_document("a", token_ids=TEXT, position=5, salt="x")
        runtime.add_document("b", token_ids=(*TEXT[:8], 1, 2, 3), position=5, salt="x", group="g")
        runtime.add_document("c", token_ids=TEXT[:9], position=5, salt="x", group="g")
        runtime.add_document("d", tokens=3)
        for layer in range(2):
            runtime.load_document("a", layer, contents("a", 14, layer))
            runtime.load_document("b", layer, contents("a", 11, layer))
            runtime.load_document("c", layer, contents("a", 9, layer))
            runtime.load_document("d", layer, contents("d", 3, layer))
        runtime.remove_document("a")
        runtime.pin("c")
        runtime.set_quota("g", 4)  # fewer than it has
        runtime.set_quota("h", 1)
        return runtime.snapshot(folder).closed, runtime._world.directory.num_blocks

    def later(runtime: Runtime) -> None:
        runtime.add_document("own", tokens=6)  # other ids, slots and serial numbers than before
        runtime.set_quota("h", 2)
        report = runtime.restore(folder)
        assert list(report.documents.items()) == [("b", 11), ("c", 9), ("d", 3)]
        own, b, c, d = runtime.documents()
        assert [doc.name for doc in (own, b, c, d)] == ["own", "b", "c", "d"]
        assert [(doc.position, doc.group) for doc in (b, c, d)] == [(5, "g"), (5, "g"), (0, "")]
        assert c.blocks[:2] == b.blocks[:2]
        assert (b.shared, c.shared, runtime._world.directory.num_blocks) == (0, 2, 7)
        assert runtime.pinned() == {"c"}
        assert runtime._world.directory.quotas == {"g": 4, "h": 2}
        for name, tokens, seed in (("b", 11, "a"), ("c", 9, "a"), ("d", 3, "d")):
            attended(runtime, name, tokens, seed=seed)
        with pytest.raises(ValueError, match="has 6 of its 4"):
            runtime.add_document("e", tokens=1, group="g")
        # What they say is known too: another document shares it.
        e = runtime.add_document("e", token_ids=(*TEXT[:8], 1, 2, 3, 4), position=5, salt="x")
        assert e.shared == 2
        assert e.blocks[:2] == b.blocks[:2]
        runtime.remove_document("e")
        assert all(check.is_sound for check in runtime.verify_copies())
        assert runtime.snapshot(folder).written == 0

    saved = world(2, first)
    assert sum(closed for closed, _ in saved) == saved[0][1] == 5  # b, c and d: shared ones once
    world(3, later)
    assert verify(folder).damage == ()


def test_what_is_here_already_is_shared_and_not_read_again(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> tuple[int, int]:
        runtime.add_document("a", token_ids=TEXT)
        for layer in range(2):
            runtime.load_document("a", layer, contents("a", 14, layer))
        runtime.add_document("b", token_ids=TEXT[:10])
        for layer in range(2):
            runtime.load_document("b", layer, contents("a", 10, layer))
        runtime.snapshot(tmp_path / "s")
        runtime.remove_document("a")
        held = runtime.documents()
        before = runtime.scope(documents=["b"], queries=1)
        with pytest.raises(SnapshotError, match="'b' exists already"):
            runtime.restore(tmp_path / "s")
        assert runtime.documents() == held
        runtime.remove_document("b")
        runtime.add_document("c", token_ids=TEXT[:9])
        for layer in range(2):
            runtime.load_document("c", layer, contents("a", 9, layer))
        report = runtime.restore(tmp_path / "s")
        nothing = torch.empty(1, 0, dtype=torch.int32)
        with pytest.raises(ValueError, match="removed since"):  # another one of that name
            runtime.attend(0, torch.zeros(1, 2, 8).double(), runtime.selection(nothing, before))
        for name, tokens in (("a", 14), ("b", 10), ("c", 9)):
            attended(runtime, name, tokens, seed="a")
        return report.read_bytes, runtime._world.directory.num_blocks

    results = world(2, work)
    block_bytes = 2 * B * 64
    assert sum(read for read, _ in results) == (2 + 1) * block_bytes  # the rest of a and of b
    assert results[0][1] == 3 + 2 + 1


def test_what_is_shared_counts_as_far_as_it_is_here(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> None:
        runtime.add_document("a", token_ids=TEXT)
        for layer in range(2):
            runtime.load_document("a", layer, contents("a", 14, layer))
        runtime.snapshot(tmp_path / "s")
        runtime.remove_document("a")
        runtime.add_document("b", token_ids=TEXT)
        request = runtime.request(into="b") if runtime.rank == 0 else None
        for layer in range(2):  # what is saved as a whole is written here now
            if request is not None:
                ids = runtime.append(request, 9) if layer == 0 else request.ids(0, 9)
                runtime.write(layer, ids, contents("a", 9, layer))
        assert runtime.restore(tmp_path / "s").documents == {"a": 9 // B * B}
        attended(runtime, "a", 9 // B * B)

    world(2, work)


# What goes wrong ------------------------------------------------------------------------------------


def test_a_full_disk_fails_everywhere_and_the_world_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    pwrite = os.pwrite

    def full(fd: int, data: bytes, offset: int) -> int:
        if "-00001-" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(28, "No space left on device")
        return pwrite(fd, data, offset)

    def work(runtime: Runtime) -> str:
        add(runtime, "a", 12)
        runtime.snapshot(folder)
        add(runtime, "b", 20)
        runtime.idle_attend(0)
        with monkeypatch.context() as patch:
            if runtime.rank == 0:
                patch.setattr(os, "pwrite", full)
            runtime.idle_attend(0)
            said = refused(lambda: runtime.snapshot(folder))
            runtime.idle_attend(0)
        attended(runtime, "b", 20)
        assert verify(folder).documents == 1
        runtime.idle_attend(0)
        runtime.snapshot(folder)
        return said

    first, *others = world(3, work)
    assert "rank 1: [Errno 28] No space left on device" in first
    assert others == [first, first]
    assert verify(folder).documents == 2
    assert len(list(folder.glob("*.tmp"))) == 0


def test_a_file_that_cannot_be_synced_fails_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are synced while the next ones are written; what happens there is not forgotten."""
    folder = tmp_path / "s"
    monkeypatch.setattr("qroam.partition.snapshot.folder.FILE_BYTES", 2 * B * 64)  # a block each
    fsync = os.fsync

    def broken(fd: int) -> None:
        if "-00001-entries-00001" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")
        fsync(fd)

    def work(runtime: Runtime) -> str:
        add(runtime, "a", 30)
        with monkeypatch.context() as patch:
            if runtime.rank == 0:
                patch.setattr(os, "fsync", broken)
            runtime.idle_attend(0)
            said = refused(lambda: runtime.snapshot(folder))
            runtime.idle_attend(0)
        left = list(folder.glob("*-00001-*"))
        runtime.idle_attend(0)
        runtime.snapshot(folder)
        return said if not left else f"left {left}"

    first, *others = world(2, work)
    assert "rank 1: [Errno 5] Input/output error" in first
    assert others == [first]
    assert verify(folder).records == 8


def test_the_folder_must_be_shared_free_and_of_the_same_model(tmp_path: Path) -> None:
    folder = tmp_path / "s"

    def save_a(runtime: Runtime) -> None:
        add(runtime, "a", 12)
        runtime.snapshot(folder)

    world(2, save_a)

    def elsewhere(runtime: Runtime) -> str:
        own = tmp_path / ("s" if runtime.rank == 0 else "other")
        return refused(lambda: runtime.snapshot(own)).split(": ", 1)[1]

    assert all("ranks [1] find another manifest" in said for said in world(2, elsewhere))

    def in_use(runtime: Runtime) -> str:
        with folder_module.FolderLock(folder, exclusive=False) if not runtime.rank else Event_():
            said = refused(lambda: runtime.snapshot(folder))
            runtime.idle_attend(0)
        return said

    assert all(f"{folder}: lock: " in said for said in world(2, in_use))

    def nowhere(runtime: Runtime) -> str:
        return refused(lambda: runtime.snapshot(tmp_path / "not" / "there"))

    assert all("No such file" in said for said in world(2, nowhere))

    def another_model(runtime: Runtime) -> str:
        refused(lambda: runtime.restore(folder))
        return refused(lambda: runtime.snapshot(folder))

    layout = replace(config().model.layers[0], codec="fp32")
    for said in world(2, another_model, model=uniform_model(layout, 2)):
        assert "layers[0]" in said
        assert "fp64" in said
        assert "fp32" in said

    def other_blocks(runtime: Runtime) -> str:
        return refused(lambda: runtime.restore(folder))

    assert (
        "block_tokens: 4 was saved, this world has 8" in world(1, other_blocks, block_tokens=8)[0]
    )
    assert "needs 3 blocks, 2 of 2 are free" in world(1, other_blocks, max_blocks=2)[0]


class Event_:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_misuse_is_refused_at_the_door(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> None:
        with pytest.raises(ValueError, match="begin one first"):
            runtime.finish_snapshot()
        runtime.begin_snapshot(tmp_path / "s")
        with pytest.raises(ValueError, match="finish it first"):
            runtime.begin_snapshot(tmp_path / "t")
        runtime.finish_snapshot()
        with pytest.raises(ValueError, match="sample"):
            runtime.verify_copies(0)
        assert "there is none" in refused(lambda: runtime.restore(tmp_path))
        add(runtime, "a", 12)
        runtime.snapshot(tmp_path / "s")
        assert "'a' exists" in refused(lambda: runtime.restore(tmp_path / "s"))
        attended(runtime, "a", 12)

    world(2, work)


def test_damage_found_late_ends_the_world_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "s"

    def save_a(runtime: Runtime) -> None:
        add(runtime, "a", 12)
        runtime.snapshot(folder)

    world(2, save_a)
    (victim,) = folder.glob("*-00001-*.safetensors")
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)

    def work(runtime: Runtime) -> str:
        said = refused(lambda: runtime.restore(folder))
        with pytest.raises(PeerError, match="half restored"):
            runtime.idle_attend(0)
        return said

    first, *others = world(3, work)
    assert f"{victim}: record 0: its bytes are not those of its hash" in first
    assert others == [first, first]


def test_a_disk_may_take_longer_than_a_rank_may_be_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(store: Any, slots: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        time.sleep(2.5)
        return take_records(store, slots, *rest, **named)

    def work(runtime: Runtime) -> int:
        add(runtime, "a", 4)  # one block: rank 0 writes, rank 1 waits
        with monkeypatch.context() as patch:
            patch.setattr(step, "take_records", slow)
            written = runtime.snapshot(tmp_path / "s").written
        runtime.idle_attend(0)
        return written

    assert world(2, work, deadline_s=1.0) == [1, 0]


def test_a_rank_that_dies_meanwhile_is_named_and_the_last_snapshot_stays(tmp_path: Path) -> None:
    folder = tmp_path / "s"

    def work(end: Transport) -> str:
        runtime = Runtime.open(config(deadline_s=2.0), end)
        add(runtime, "a", 12)
        runtime.snapshot(folder)
        add(runtime, "b", 12)
        runtime.begin_snapshot(folder)
        runtime.idle_attend(0)
        if end.rank == 1:
            runtime.close()
            end.close()
            return "rank 1: "
        with pytest.raises(PeerError) as caught:
            runtime.finish_snapshot()
        runtime.close()
        return str(caught.value)

    ends = LoopbackTransport.world(3, deadline_s=2.0)
    assert all(said.startswith("rank 1: ") for said in run_loopback(3, work, transports=ends))
    assert verify(folder).documents == 1


def test_a_runtime_that_closes_has_stopped_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*arguments: Any, **named: Any) -> torch.Tensor:
        time.sleep(0.3)
        return take_records(*arguments, **named)

    monkeypatch.setattr(step, "take_records", slow)
    with Runtime.open(config()) as runtime:
        add(runtime, "a", 12)
        runtime.begin_snapshot(tmp_path / "s")
        pending = runtime._snapshot
    assert pending is not None
    assert pending.work.done()
    assert not (tmp_path / "s" / "manifest").exists()
    folder_module.FolderLock(tmp_path / "s", exclusive=True).release()


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


# Live blocks ----------------------------------------------------------------------------------------


def test_a_copy_that_changed_is_found(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> list[Any]:
        add(runtime, "a", 30)
        sound = runtime.verify_copies()
        assert len(sound) == 8
        assert all(check.is_sound and len(check.hashes) == 2 for check in sound)
        world = runtime._world
        if runtime.rank == 1:
            key = int((world.stores.entries.slot_of[:8] >= 0).nonzero()[0])
            world.stores.entries._storage[1][
                int(world.stores.entries.slot_of[key]) * B * 64 + 5
            ] ^= 1
        return [(c.block, c.hashes, c.changed) for c in runtime.verify_copies() if not c.is_sound]

    for faults in world(3, work, placement=Placement(copies=2)):
        ((block, hashes, changed),) = faults
        assert changed == (1,)
        assert len({name for _, name in hashes}) == 2
        assert block < 8


def test_a_copy_that_is_missing_is_found_and_a_sample_is_the_same_everywhere() -> None:
    def work(runtime: Runtime) -> tuple[list[Any], list[int]]:
        add(runtime, "a", 30)
        sampled = [check.block for _ in range(4) for check in runtime.verify_copies(2)]
        if runtime.rank == 1:
            runtime._world.stores.entries.release(torch.tensor([1]))
        faults = [(c.block, c.hashes[-1]) for c in runtime.verify_copies() if not c.is_sound]
        return faults, sampled

    results = world(2, work, placement=Placement(copies=2))
    assert results[0] == results[1]
    faults, sampled = results[0]
    assert faults == [(1, (1, ""))]
    assert len(sampled) == 8
    assert len(set(sampled)) > 2
