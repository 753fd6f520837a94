"""Ranks that raise, die, stall or lose their connections, and how the other ranks ended.

Processes over gloo, started for one test and ended with it; `die` and `die_after` are for threads
over loopback.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from qroam.runtime import PeerError
from qroam.runtime.cpu import answer as answering
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Message
from qroam.runtime.world import World

WORLD = 4


VICTIM = 2


PATIENCE_S = 60.0


class Outcome(NamedTuple):
    """How a rank ended: what it raised, how long after its last completed step, and its exit code."""

    steps: int
    error: str
    culprits: tuple[int, ...]
    seconds: float
    exit_code: int | None


class Progress:
    """Completed steps, and how long after the last of them the next one failed."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self._completed_at = time.monotonic()

    @contextmanager
    def step(self) -> Iterator[None]:
        try:
            yield
        except PeerError:
            self.seconds = time.monotonic() - self._completed_at
            raise
        self.steps += 1
        self._completed_at = time.monotonic()


def rank_main(
    rank: int, store: str, work: Callable[..., None], pipe: Connection, args: Any
) -> None:
    """Join the group, do `work`, and report how it ended."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=FileStore(store, WORLD),
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    progress = Progress()
    try:
        work(rank, progress, *args)
    except (PeerError, ArithmeticError) as error:
        culprits = error.culprits if isinstance(error, PeerError) else ()
        said = f"{type(error).__name__}: {error}"
        pipe.send((progress.steps, said, culprits, progress.seconds))
    else:
        pipe.send((progress.steps, "", (), 0.0))
    pipe.close()


def run(
    folder: Path, work: Callable[..., None], *args: Any, stopped: bool = False
) -> list[Outcome]:
    """`work(rank, progress, *args)` in four processes; all that were started are ended here."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qroam.runtime"])  # imported once, not by every rank
    processes, pipes = [], []
    for rank in range(WORLD):
        ours, theirs = context.Pipe(duplex=False)
        target = (rank, str(folder / "store"), work, theirs, args)
        process = context.Process(target=rank_main, args=target, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    outcomes: list[Outcome] = []
    expiry = time.monotonic() + PATIENCE_S
    try:
        for rank, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
            if stopped and rank == VICTIM:
                outcomes.append(Outcome(0, "stopped", (), 0.0, None))
                continue
            report: tuple[int, str, tuple[int, ...], float] = (0, "no report", (), 0.0)
            try:
                if pipe.poll(max(expiry - time.monotonic(), 0)):
                    report = pipe.recv()
            except EOFError:
                pass  # it was killed
            process.join(max(expiry - time.monotonic(), 0))
            outcomes.append(Outcome(*report, process.exitcode))
    finally:
        for process in processes:
            if process.exitcode is None:
                process.kill()  # SIGKILL also ends a stopped process
            process.join()
    return outcomes


Fault = Literal["is killed", "is stopped", "closes its sockets", "answers late", "answers wrongly"]


DEADLINE_S = 2.0


def strike(fault: Fault) -> None:
    """What happens to the victim once it has answered a few requests."""
    answer, count = answering.answer_attend, 0

    def struck(world: World, message: Message) -> Mapping[str, Tensor]:
        nonlocal count
        count += 1
        columns = dict(answer(world, message))
        if count > 10:
            match fault:
                case "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "is stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                case "closes its sockets":
                    close_sockets()
                case "answers late":
                    time.sleep(2 * DEADLINE_S)
                case "answers wrongly":
                    spoilt = {
                        "A.covered": lambda rows: rows + 1,
                        "fetch.mark": lambda rows: rows + 1,
                    }
                    columns = {n: spoilt.get(n, lambda x: x)(rows) for n, rows in columns.items()}
        return columns

    answering.answer_attend = struck  # type: ignore[assignment]


def close_sockets() -> None:
    """Shut down every connection of this process, as a network that goes away does."""
    for number in os.listdir("/proc/self/fd"):
        try:
            end = socket.socket(fileno=os.dup(int(number)))
        except OSError:
            continue  # not a socket, or gone
        try:
            if end.family in (socket.AF_INET, socket.AF_INET6) and end.getpeername():
                end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # one that listens
        finally:
            end.close()


def die(transport: Transport) -> None:
    """Say nothing more; the carrier tells the others that the connection is gone."""
    assert isinstance(transport, LoopbackTransport)
    transport.close()
    transport._send = transport._send_abort = lambda *_: None  # type: ignore[assignment]


def die_after(end: LoopbackTransport, messages: int) -> None:
    """The rank dies, and learns of it, when it has sent so many more messages."""
    send, left = end._send, messages

    def dying(*args: Any, **named: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            die(end)
            raise PeerError((end.rank,), "it died")
        send(*args, **named)

    end._send = dying  # type: ignore[method-assign]
