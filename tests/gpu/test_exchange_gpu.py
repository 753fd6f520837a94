"""The exchange on two GPUs: random plans, long runs of replays with delays, peers that fall silent.

Each rank is a process (`exchange_rank.py`), so that one can be killed. Faults in the protocol are
planted by running on a changed copy of the kernels.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_copies import Changes, environment_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
DEADLINE_S = 2.0

# Every CTA of a launch starts late by a pause in nanoseconds.
LATE = """
from triton.language.extra import cuda


@triton.jit
def _late(cta, rank):
    begun = cuda.globaltimer()
    mixed = (begun.to(tl.uint32) ^ (cta.to(tl.uint32) * 0x9E3779B1)) * 0x2C1B3C6D
    pause = {pause}
    now = begun
    while now - begun < pause:
        now = cuda.globaltimer()
    return cta


@triton.jit(do_not_specialize"""


def late(pause: str) -> list[tuple[str, str]]:
    return [
        ("\n@triton.jit(do_not_specialize", LATE.replace("{pause}", pause)),
        ("cta, ctas = tl.program_id(0),", "cta, ctas = _late(tl.program_id(0), rank),"),
    ]


# A quarter of the CTAs by up to 30 us, others each time; or all those of rank 1 by 300 us.
NOW_AND_THEN = late("tl.where((mixed >> 28) < 4, (mixed >> 8) % 30000, 0).to(tl.int64)")
ALWAYS_ON_RANK_1 = late("rank * 300000")
ONE_PARITY = ("return ((epoch & 1) * W + peer)", "return (peer + epoch * 0)")
NO_CREDIT = ("if (seat >= 0) | (task == 0):", "if seat >= 0:")
DELAYS: Changes = {"exchange/launch.py": NOW_AND_THEN}
CREDIT: Changes = {"exchange/launch.py": ALWAYS_ON_RANK_1, "exchange/roles.py": [ONE_PARITY]}
WITHOUT_CREDIT: Changes = {
    "exchange/launch.py": ALWAYS_ON_RANK_1,
    "exchange/roles.py": [ONE_PARITY, NO_CREDIT],
}


@contextmanager
def ranks(
    folder: Path, job: str, *, environment: dict[str, str] | None = None, **options: object
) -> Iterator[list[subprocess.Popen[str]]]:
    """Both ranks of a job; killed at the end, whatever happened."""
    given = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    children = [
        subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("exchange_rank.py")),
                job,
                str(rank),
                str(folder),
                *given,
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def result(child: subprocess.Popen[str], *, timeout_s: float = 120) -> dict[str, Any]:
    """What the rank printed last."""
    printed, errors = child.communicate(timeout=timeout_s)
    assert child.returncode == 0, errors[-3000:]
    said: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return said


@pytest.mark.parametrize("put", [False, True], ids=["stores", "put"])
def test_random_plans(tmp_path: Path, put: bool) -> None:
    with ranks(tmp_path, "random_plans", put=put, steps=8) as both:
        assert [result(rank)["wrong"] for rank in both] == [0, 0]


@pytest.mark.parametrize(
    ("put", "replays", "changes"),
    [(False, 10_000, {}), (False, 10_000, DELAYS), (True, 2_000, {})],
    ids=["stores", "stores, delays", "put"],
)
def test_replays_without_the_host(
    tmp_path: Path, put: bool, replays: int, changes: Changes
) -> None:
    environment = environment_of(tmp_path, changes)
    with ranks(
        tmp_path, "soak", put=put, replays=replays, idle_rank=-1, deadline_s=10.0,
        environment=environment,
    ) as both:  # fmt: skip
        said = [result(rank) for rank in both]
    assert [rank.get("wrong") for rank in said] == [0, 0], said
    assert [rank["epochs"] for rank in said] == [replays + 1] * 2


@pytest.mark.parametrize("credit", [True, False], ids=["with credit", "without"])
def test_a_rank_that_asks_nothing_must_not_run_ahead(tmp_path: Path, credit: bool) -> None:
    """The wait for bare answers holds a rank so that even one parity would do. Without it one does
    not: beside a slow rank, the next header covers one that was not read yet."""
    environment = environment_of(tmp_path, CREDIT if credit else WITHOUT_CREDIT)
    with ranks(
        tmp_path, "soak", put=False, replays=500, idle_rank=0, deadline_s=DEADLINE_S,
        environment=environment,
    ) as both:  # fmt: skip
        said = [result(rank) for rank in both]
    if credit:
        assert [rank.get("wrong") for rank in said] == [0, 0], said
    else:
        assert any("named" in rank or rank["wrong"] > 0 for rank in said), said


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_silent_peer_is_named_within_the_deadline(tmp_path: Path, how: signal.Signals) -> None:
    with ranks(tmp_path, "silence", deadline_s=DEADLINE_S) as (survivor, victim):
        assert victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        time.sleep(1.0)
        os.kill(victim.pid, how)
        stopped_at = time.time()
        said = result(survivor)
    assert said["named"] == f"rank 1: no answer within {DEADLINE_S:g} s"
    # The victim's device goes on for a moment with what was queued.
    assert said["at"] - stopped_at < DEADLINE_S + 0.2
    assert said["well"]
    assert said["nan"]


def test_blocks_of_a_rank_that_was_killed_are_rescued(tmp_path: Path) -> None:
    blocks = 40
    with ranks(tmp_path, "rescued", deadline_s=DEADLINE_S, blocks=blocks) as (survivor, victim):
        assert victim.stdout is not None
        wanted = json.loads(victim.stdout.readline())
        time.sleep(1.0)
        os.kill(victim.pid, signal.SIGKILL)
        killed_at = time.time()
        said = result(survivor)
    assert said["named"] == f"rank 1: no answer within {DEADLINE_S:g} s"
    assert said["at"] - killed_at < DEADLINE_S + 0.2
    assert said["lacking"] == 1  # the one that is not closed
    wrong = [block for block in wanted if said["had"].get(block) != wanted[block]]
    assert (len(wanted), wrong, len(said["had"])) == (blocks, [], blocks)
