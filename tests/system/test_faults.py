"""A rank that raises, dies or stalls in the middle of a step, over gloo with four processes.

Every other rank must name exactly that rank within the deadline, and end in peace.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from effort import slow_after
from faults import VICTIM, Progress, run

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.cpu import step

GOOD_STEPS = 3
DEADLINE_S = 5.0
TOKENS = 250


def config(**changes: Any) -> RuntimeConfig:
    model = uniform_model(named_layout("mla-tiny"), 1)
    sizes: dict[str, Any] = {
        "max_blocks": 16,
        "block_tokens": 16,
        "deadline_s": DEADLINE_S,
        "mode": "random",
    }
    return RuntimeConfig(model=model, **(sizes | changes))


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
    slow_after(
        1,
        [
            ("raises", "answer_attend"),
            ("raises", "attend_local"),
            ("is killed", "attend_local"),
            ("is killed", "answer_attend"),
            ("is stopped", "attend_local"),
            ("is stopped", "decide"),
        ],
    ),
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
