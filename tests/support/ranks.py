"""Ranks for tests: processes over gloo that serve job after job, and threads over loopback."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from qroam.runtime.errors import PeerError
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.gloo import TorchTransport
from qroam.runtime.transport.loopback import LoopbackTransport

T = TypeVar("T")


class RanksFailedError(AssertionError):
    """Some ranks raised, died or hung; the text has a traceback for each."""


class _Job(NamedTuple):
    group: int
    work: Callable[..., Any]
    args: tuple[Any, ...]


class _Reply(NamedTuple):
    result: Any
    failure: str | None


class RankPool:
    """`world_size` processes in one gloo group, started at the first job and fed by pipes.

    A job is a module-level function `work(transport, *args)`. A failed job leaves a broken transport
    behind, so the next one gets a new group; ranks that died or hung are replaced together.
    """

    def __init__(
        self, world_size: int, folder: Path, *, deadline_s: float = 20.0, patience_s: float = 90.0
    ) -> None:
        self.world_size = world_size
        self._folder = folder
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._group = 0
        self._processes: list[SpawnProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, work: Callable[..., T], *args: Any) -> list[T]:
        """The results of `work(transport, *args)` of every rank; raises if any failed."""
        if not self._processes:
            self._start()
        job = pickle.dumps(_Job(self._group, work, args))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        replies = self._replies()
        failures = [f"rank {rank}: {r.failure}" for rank, r in enumerate(replies) if r.failure]
        if failures:
            self._group += 1
            raise RanksFailedError("\n".join(failures))
        return [reply.result for reply in replies]

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            args = (rank, self.world_size, self._folder, self._deadline_s, theirs)
            process = context.Process(target=_serve, args=args, daemon=True, name=f"rank-{rank}")
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def _stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank that is idle takes this as the end
        for process in self._processes:
            process.join(self._deadline_s)
            process.kill()
            process.join()
        self._pipes, self._processes = [], []

    def _replies(self) -> list[_Reply]:
        expiry = time.monotonic() + self._patience_s
        replies: dict[int, _Reply] = {}
        while len(replies) < self.world_size:
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in replies]
            ready = wait(pending, timeout=max(expiry - time.monotonic(), 0))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    replies[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except EOFError:
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    replies[rank] = _Reply(None, f"died with exit code {code}")
        hung = _Reply(None, f"gave no result within {self._patience_s:g} s")
        if len(replies) < self.world_size or any(not p.is_alive() for p in self._processes):
            for process in self._processes:
                process.kill()
            self._stop()
        return [replies.get(rank, hung) for rank in range(self.world_size)]


def run_loopback(
    world_size: int,
    worker: Callable[[Transport], T],
    *,
    deadline_s: float = 20.0,
    transports: Sequence[Transport] | None = None,
) -> list[T]:
    """The results of `worker(transport)` of every rank, each in a thread of its own.

    Raises: what a rank raised; rather the cause than the PeerError that others got because of it.
    """

    def guarded(end: Transport) -> T:
        try:
            return worker(end)
        except BaseException as error:
            end.abort((end.rank,), f"raised {type(error).__name__}: {error}")
            raise

    ends = transports or LoopbackTransport.world(world_size, deadline_s=deadline_s)
    with ThreadPoolExecutor(world_size) as threads:
        futures = [threads.submit(guarded, end) for end in ends]
    errors = [error for future in futures if (error := future.exception())]
    if errors:
        raise next((e for e in errors if not isinstance(e, PeerError)), errors[0])
    return [future.result() for future in futures]


def _serve(rank: int, world_size: int, folder: Path, deadline_s: float, pipe: Connection) -> None:
    """A rank's life: one job after another until the pipe is closed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    transport: Transport | None = None
    group = -1
    while True:
        try:
            job: _Job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            break
        reply = _Reply(None, None)
        try:
            if job.group != group:
                _close(transport)
                transport = _connect(rank, world_size, folder / f"group-{job.group}", deadline_s)
                group = job.group
            assert transport is not None
            reply = _Reply(job.work(transport, *job.args), None)
        except BaseException as error:
            if transport is not None:  # so that nobody waits for this rank
                transport.abort((rank,), f"raised {type(error).__name__}: {error}")
            reply = _Reply(None, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(reply))
    _close(transport)


def _connect(rank: int, world_size: int, store: Path, deadline_s: float) -> Transport:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=deadline_s),
    )
    group = dist.group.WORLD
    assert group is not None
    return TorchTransport(group=group, deadline_s=deadline_s)


def _close(transport: Transport | None) -> None:
    if transport is not None:
        transport.close()
        dist.destroy_process_group()
