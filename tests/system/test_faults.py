"""A rank that raises, dies or stalls in the middle of a step, over gloo with four processes.

Every other rank must name exactly that rank within the deadline, and end in peace.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Runtime, RuntimeConfig
from qroam.runtime.cpu import step

WORLD = 4
VICTIM = 2
GOOD_STEPS = 3
DEADLINE_S = 5.0
PATIENCE_S = 60.0
TOKENS = 250


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


def config(**changes: Any) -> RuntimeConfig:
    model = uniform_model(named_layout("mla-tiny"), 1)
    sizes: dict[str, Any] = {
        "max_blocks": 16,
        "block_tokens": 16,
        "deadline_s": DEADLINE_S,
        "mode": "random",
    }
    return RuntimeConfig(model=model, **(sizes | changes))


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


def decode_steps(rank: int, progress: Progress, where: str, fault: str) -> None:
    """Attend over all ranks' blocks until the victim's `where` is struck by `fault`."""
    with Runtime.open(config()) as runtime:
        layout = runtime.config.model.layers[0]
        assert layout.index is not None
        g = torch.Generator().manual_seed(1)
        entries = torch.randn(TOKENS, layout.entry_dim, generator=g)
        keys = torch.randn(TOKENS, layout.index.head_dim, generator=g)
        runtime.add_document("doc", tokens=TOKENS)
        runtime.load_document("doc", 0, entries, keys)
        scope = runtime.scope(documents=["doc"], queries=3)
        everything = torch.arange(TOKENS, dtype=torch.int32).repeat(3, 1)
        query = torch.randn(3, layout.heads, layout.key_dim, generator=g)
        for number in range(GOOD_STEPS + 3):
            if rank == VICTIM and number == GOOD_STEPS:
                setattr(step, where, struck(fault))
            with progress.step():
                runtime.attend(0, query, runtime.selection(everything, scope))


def struck(fault: str) -> Callable[..., Any]:
    """What happens instead of a part of the victim's step."""

    def strike(*_args: Any, **_sizes: Any) -> Any:
        match fault:
            case "raises":
                raise ArithmeticError("boom")
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "is stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
                raise ArithmeticError("was woken up")

    return strike


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("raises", "answer_attend"),
        ("raises", "attend_local"),
        ("is killed", "attend_local"),
        ("is killed", "answer_attend"),
        ("is stopped", "attend_local"),
        ("is stopped", "decide"),
    ],
)
def test_the_others_name_a_rank_that(fault: str, where: str, tmp_path: Path) -> None:
    outcomes = run(tmp_path, decode_steps, where, fault, stopped=fault == "is stopped")
    for rank, outcome in enumerate(outcomes):
        if rank == VICTIM:
            continue
        assert outcome.error.startswith("PeerError"), outcome
        assert outcome.culprits == (VICTIM,), outcome
        # One less if the victim's last answer was not yet out, one more if its next one was.
        assert abs(outcome.steps - GOOD_STEPS) <= 1, outcome
        assert outcome.seconds <= DEADLINE_S, outcome
        assert outcome.exit_code == 0, outcome
    if fault == "raises":
        assert outcomes[VICTIM].error == "ArithmeticError: boom"
        assert outcomes[VICTIM].exit_code == 0
        assert all("ArithmeticError: boom" in outcome.error for outcome in outcomes)
        # An error is told, not waited for.
        assert max(outcome.seconds for outcome in outcomes) < 0.5 * DEADLINE_S


def open_differently(rank: int, _: Progress) -> None:
    with Runtime.open(config(max_blocks=17 if rank == VICTIM else 16)):
        raise AssertionError("it opened")


def test_a_rank_with_another_configuration_is_refused_at_open(tmp_path: Path) -> None:
    outcomes = run(tmp_path, open_differently)
    for outcome in outcomes:
        assert outcome.error.startswith("PeerError"), outcome
        assert (
            "opened with another configuration: max_blocks=17 instead of max_blocks=16"
            in outcome.error
        )
        assert outcome.culprits == (VICTIM,), outcome
        assert outcome.exit_code == 0


def leave_early(rank: int, progress: Progress) -> None:
    with Runtime.open(config()) as runtime:
        runtime.add_document("doc", tokens=TOKENS)
        if rank != VICTIM:
            with progress.step():
                runtime.idle_attend(0)


def test_a_rank_that_leaves_early_is_named(tmp_path: Path) -> None:
    outcomes = run(tmp_path, leave_early)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exit_code == 0
        if rank != VICTIM:
            assert outcome.culprits == (VICTIM,), outcome
            assert "closed its runtime" in outcome.error
