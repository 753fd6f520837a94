"""What a returned snapshot covers survives kill -9, and loss of power, at any moment.

QROAM_KILLS=200 runs as many kills as the gate asks for; the suite makes a few.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

import pytest
from lives import (
    DOCUMENTS,
    NO_WORLD,
    PEER_LOST,
    Life,
    acknowledged,
    config,
    rank_main,
    restore_and_check,
    tokens_of,
)
from ranks import run_loopback
from snapshot_world import add, world

from qroam.partition.snapshot.folder import read_manifest
from qroam.partition.snapshot.verify import verify
from qroam.runtime import Runtime
from qroam.runtime.transport.base import Transport

KILLS = int(os.environ.get("QROAM_KILLS", "4"))
PRELOADED = ["torch", "torch.distributed", "qroam.runtime", "qroam.runtime.transport.gloo"]


def random_life(rng: random.Random) -> Life:
    size = rng.choice((1, 2, 2, 3))
    policy = rng.choice(("contiguous", "block-cyclic", "document-affine"))
    return Life(size, policy, rng.randint(1, size))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.processes
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    rng = random.Random(20)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = tmp_path / "world-0"
    folder.mkdir()
    seen: Counter[str] = Counter()
    for kill in range(10 * KILLS):  # on a busy machine more of them come before anything is saved
        if kill >= KILLS and seen["acknowledged"]:
            break
        life = random_life(rng)
        args = (life, folder, tmp_path / f"store-{kill}")
        ranks = [context.Process(target=rank_main, args=(r, *args)) for r in range(life.world)]
        for process in ranks:
            process.start()
        _wait_until_it_lives(folder, ranks)
        time.sleep(rng.uniform(0.0, 1.2))
        victims = rng.choice((ranks, [rng.choice(ranks)]))
        for process in victims:
            process.kill()
        for process in ranks:
            process.join(
                60
            )  # gloo takes its time to give up a mesh that lost a rank while connecting
            assert process.exitcode is not None, "a rank waits for a dead one"
        codes = {process.exitcode for process in ranks if process not in victims}
        assert codes <= {0, PEER_LOST, NO_WORLD}, codes
        assert not (folder / "wrong").exists(), (folder / "wrong").read_text()
        seen["unfinished"] += bool(list((folder / "s").glob("*"))) and _has_leftovers(folder / "s")
        seen["acknowledged"] += len(acknowledged(folder))

        def check(end: Transport, life: Life, folder: Path) -> None:
            with Runtime.open(config(life), end) as runtime:
                restore_and_check(runtime, folder)

        after = random_life(rng)
        run_loopback(after.world, partial(check, life=after, folder=folder))
        if acknowledged(folder).get(DOCUMENTS - 1) == tokens_of(DOCUMENTS - 1):
            seen["whole"] += 1
            shutil.rmtree(folder)
            folder = tmp_path / f"world-{kill + 1}"
            folder.mkdir()
    assert seen["acknowledged"] > 0, "every life was too short to save anything"
    assert KILLS < 50 or seen["unfinished"] > KILLS / 20, "hardly a kill met a snapshot"


def _wait_until_it_lives(folder: Path, ranks: list[Any]) -> None:
    """Until the new life has said that it begins; how long a process takes to start is no matter."""
    expiry = time.monotonic() + 60
    while not (folder / "s").exists() and all(process.is_alive() for process in ranks):
        assert time.monotonic() < expiry, "no life began"
        time.sleep(0.01)


def _has_leftovers(folder: Path) -> bool:
    found = read_manifest(folder)
    used = {file.name for file in found[0].files} if found else set()
    return any(path.name not in used for path in folder.glob("*.safetensors*"))


# Loss of power, simulated: what was not synced may or may not be on disk --------------------------------

State = dict[str, bytes]


class Disk:
    """The folder's files as they could be found after a loss of power, before each operation on them.

    `now`: all is there. `synced`: only what was synced, names and contents. `early`: names as they
    are, of contents only what was synced (a rename may reach the disk before its folder is synced).
    The fourth state is `synced` with the manifest of `early`: renames reach the disk in any order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = RLock()
        self._contents: dict[int, bytes] = {}
        self._names: dict[str, int] = {}
        self.states: list[State] = []
        self.synced: State = {}
        for path in folder.iterdir():
            self._contents[path.stat().st_ino] = path.read_bytes()
            self._names[path.name] = path.stat().st_ino

    def watched(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.look()
                result = operation(*args, **kwargs)
                if operation.__name__ == "fsync":
                    self._sync(args[0])
                self.look()
                return result

        return watching

    def look(self) -> None:
        now = {path.name: path for path in self._folder.iterdir()}
        early = {name: self._contents.get(path.stat().st_ino, b"") for name, path in now.items()}
        self.synced = {name: self._contents[inode] for name, inode in self._names.items()}
        everything = {name: path.read_bytes() for name, path in now.items()}
        manifest = {name: text for name, text in early.items() if name == "manifest"}
        self.states += [everything, early, self.synced, self.synced | manifest]

    def _sync(self, fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        if path == self._folder:
            self._names = {p.name: p.stat().st_ino for p in path.iterdir()}
            for inode in self._names.values():
                self._contents.setdefault(inode, b"")
        elif path.parent == self._folder:
            self._contents[os.fstat(fd).st_ino] = path.read_bytes()


@contextmanager
def watching(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(folder)
    with patch.context() as context:
        for name in ("fsync", "replace", "pwrite", "unlink"):
            context.setattr(os, name, disk.watched(getattr(os, name)))
        yield disk


def saved_documents(folder: Path, state: State) -> tuple[str, ...]:
    """The documents of a sound snapshot made of these files. Raises: AssertionError if it is not."""
    folder.mkdir()
    for name, contents in state.items():
        (folder / name).write_bytes(contents)
    assert verify(folder).damage == ()
    found = read_manifest(folder)
    assert found is not None
    return tuple(document.name for document in found[0].documents)


def test_power_may_fail_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "s"

    def first(runtime: Runtime) -> None:
        add(runtime, "a", 12)
        runtime.snapshot(folder)

    def second(runtime: Runtime) -> None:
        add(runtime, "b", 20)  # nothing of the first snapshot is of use: its files are removed
        runtime.snapshot(folder)

    world(2, first)
    with watching(folder, monkeypatch) as disk:
        world(2, second)
    distinct = {tuple(sorted(state.items())): state for state in disk.states}
    assert len(distinct) >= 10
    met = Counter(
        saved_documents(tmp_path / f"crash-{n}", state) for n, state in enumerate(distinct.values())
    )
    assert met.keys() == {("a",), ("b",)}
    # What was acknowledged needs nothing that was not synced.
    assert saved_documents(tmp_path / "after", disk.synced) == ("b",)
    assert len(list(folder.glob("*.safetensors"))) == 2  # those of "a" are gone


def test_power_may_fail_while_files_are_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"

    def first(runtime: Runtime) -> None:
        add(runtime, "a", 30)
        add(runtime, "b", 10)
        runtime.snapshot(folder)
        runtime.remove_document("a")
        runtime.snapshot(folder)

    def second(runtime: Runtime) -> None:
        runtime.restore(folder)
        runtime.snapshot(folder)

    world(2, first)
    before = {path.name for path in folder.glob("*.safetensors")}
    with watching(folder, monkeypatch) as disk:
        world(2, second)
    distinct = {tuple(sorted(state.items())): state for state in disk.states}
    assert len(distinct) >= 10
    for number, state in enumerate(distinct.values()):
        assert saved_documents(tmp_path / f"crash-{number}", state) == ("b",)
    assert saved_documents(tmp_path / "after", disk.synced) == ("b",)
    assert before.isdisjoint(path.name for path in folder.glob("*.safetensors"))


def test_the_first_snapshot_is_there_as_a_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()

    def work(runtime: Runtime) -> None:
        add(runtime, "a", 30)
        runtime.snapshot(folder)

    with watching(folder, monkeypatch) as disk:
        world(3, work)
    whole = [state for state in disk.states if "manifest" in state]
    assert 0 < len(whole) < len(disk.states)
    distinct = {tuple(sorted(state.items())): state for state in whole}
    for number, state in enumerate(distinct.values()):
        assert saved_documents(tmp_path / f"crash-{number}", state) == ("a",)
    assert "manifest" in disk.synced
