"""The central property: for any placement and any plan, the step equals dense attention.

`cases.run_case` plays a random world and compares every step on every rank: outputs with dense fp64
attention, selections with the exact top-k, counters with what was decided.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, make_config
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from player import Player, run_case
from ranks import RankPool, RanksFailedError, run_loopback
from strategies import EVERYWHERE, cases

from qroam.runtime.runtime import Runtime
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport


def play(case: Case) -> list[torch.Tensor]:
    """The case on a loopback world: all outputs, rank by rank."""
    ranks = run_loopback(case.world, lambda transport: run_case(transport, case))
    return [output for outputs in ranks for output in outputs]


@given(case=cases(worlds=(4,)))
@settings(EVERYWHERE, max_examples=examples(170, quick=16))
def test_step_equals_dense_attention_on_four_processes(four_ranks: RankPool, case: Case) -> None:
    four_ranks.run(run_case, case)


@given(case=cases(worlds=(1, 2, 3)))
@settings(EVERYWHERE, max_examples=examples(130, quick=42))
def test_step_equals_dense_attention(case: Case) -> None:
    play(case)


@given(case=cases(worlds=(8,)))
@settings(EVERYWHERE, max_examples=examples(10, quick=2))
def test_step_equals_dense_attention_on_eight_ranks(case: Case) -> None:
    play(case)


@pytest.mark.parametrize(
    "facts",
    [
        {"mode": "random", "unit_tokens": 4},
        {"mode": "always-route", "picks": "all", "storage": "fp32"},
        {"mode": "always-fetch", "lease_entries": 60, "repeats": 2},
        {"mode": "auto", "architecture": "mixed", "per_branch": True, "sink": True},
        {"mode": "auto", "picks": "select", "storage": "bf16"},
    ],
    ids=lambda facts: facts["mode"],
)
def test_thousands_of_queries_beside_idle_ranks(facts: dict[str, Any]) -> None:
    play(Case(seed=11, world=4, heads=1, steps=1, queries=(4096, 0, 37, 1), requests=0, **facts))


@given(case=cases(worlds=(1, 3, 4)), stranger=st.integers(0, 3))
@settings(EVERYWHERE, max_examples=examples(20, quick=5))
def test_unattached_document_changes_nothing(case: Case, stranger: int) -> None:
    documents = (9, *case.documents)
    loaded = len(documents) - case.prefilled  # a document being prefilled is attended
    case = replace(case, documents=documents, stranger=stranger % loaded)
    before, after = play(case), play(replace(case, perturbed=case.stranger))
    assert all(map(torch.equal, before, after))
    assert len(before) == len(after)


def test_attached_document_changes_outputs() -> None:
    """The control of the test above: it would notice."""
    case = Case(seed=1, picks="all", documents=(40, 40))
    before, after = play(case), play(replace(case, perturbed=0))
    assert not all(map(torch.equal, before, after))


def test_leases_are_hit_and_evicted_within_their_bound() -> None:
    case = Case(seed=5, mode="always-fetch", picks="all", repeats=3, lease_entries=30, steps=3)

    def worker(transport: Transport) -> dict[str, Any]:
        with Runtime.open(make_config(case), transport) as runtime:
            player = Player(runtime, case)
            player.add_documents()
            for _ in range(case.steps):
                player.decode()
            return runtime.stats()

    for stats in run_loopback(case.world, worker):
        assert stats["leases"]["hit"] > 0
        assert stats["leases"]["evicted"] > 0


def test_what_is_leased_is_local_in_the_next_step() -> None:
    case = Case(seed=5, mode="always-fetch", lease_entries=500, weights=False)

    def worker(transport: Transport) -> list[set[str]]:
        with Runtime.open(make_config(case), transport) as runtime:
            player = Player(runtime, case)
            player.add_documents()
            scope = runtime.scope(documents=["d0", "d1"], queries=2)
            everything = torch.arange(40 + 21, dtype=torch.int32).repeat(2, 1)
            query = torch.ones(2, case.heads, player.layout.key_dim, dtype=torch.float64)
            ways = []
            for _ in range(3):
                runtime.attend(0, query, runtime.selection(everything, scope))
                ways.append({line.way for line in runtime.explain()})
            return ways

    for ways in run_loopback(case.world, worker):
        assert ways == [{"LOCAL", "FETCH"}, {"LOCAL"}, {"LOCAL"}]


def broken(transport: Transport, case: Case) -> None:
    """A job in which rank 1 fails while the others wait for it."""
    with Runtime.open(make_config(case), transport) as runtime:
        if runtime.rank == 1:
            raise ValueError("rank 1 had enough")
        runtime.idle_attend(0)


def test_pool_reports_every_rank_and_serves_on(four_ranks: RankPool) -> None:
    with pytest.raises(RanksFailedError, match="rank 1 had enough") as failed:
        four_ranks.run(broken, Case(seed=1, world=4))
    assert str(failed.value).count("PeerError: rank 1: raised ValueError") >= 3
    four_ranks.run(run_case, Case(seed=1, world=4))


def test_transport_that_was_given_outlives_its_runtimes() -> None:
    (end,) = LoopbackTransport.world(1)
    for seed in (1, 2):
        run_case(end, Case(seed=seed, world=1))


@pytest.mark.slow
@pytest.mark.processes
def test_example_checks_a_layout_on_its_own_ranks(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "dense_check.py"
    options = {"layout": "mlra-4", "ranks": 2, "mode": "random", "codec": "fp64", "tokens": 70}
    command = [
        sys.executable,
        str(script),
        *(f"--{name}={value}" for name, value in options.items()),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
