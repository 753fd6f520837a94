"""Snapshots of a world: while serving, incremental, and what goes wrong."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from ranks import RankPool, run_loopback
from snapshot_world import B, add, attended, config, contents, refused, world
from snapshots import restore, save

from qroam.partition.presets import uniform_model
from qroam.partition.snapshot import folder as folder_module
from qroam.partition.snapshot.folder import read_manifest
from qroam.partition.snapshot.record import take_records
from qroam.partition.snapshot.verify import verify
from qroam.runtime import PeerError, Runtime
from qroam.runtime.corpus import snapshot as step
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport


def test_ranks_that_are_processes(four_ranks: RankPool, tmp_path: Path) -> None:
    case = Case(seed=7, world=4, picks="select", prefilled=1, copies=2)
    saved = four_ranks.run(save, case, tmp_path / "s")
    found = run_loopback(
        2, partial(restore, case=replace(case, world=2, copies=1), folder=tmp_path / "s")
    )
    assert {hashes == saved[0][1] for _, hashes in found} == {True}


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
