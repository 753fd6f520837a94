"""The central property: for any placement and any plan, the step equals dense attention.

`cases.run_case` plays a random world and compares every step on every rank: outputs with dense fp64
attention, selections with the exact top-k, counters with what was decided.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from cases import STORAGE, Architecture, Case, Picks, Player, make_config, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RankPool, RanksFailedError, run_loopback

from qroam.partition.placement import PLACEMENT_POLICIES
from qroam.runtime.cost.predicate import MODES
from qroam.runtime.runtime import Runtime
from qroam.runtime.transport.base import LoopbackTransport, Transport

EVERYWHERE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def cases(draw: st.DrawFn, worlds: tuple[int, ...]) -> Case:
    """Any case of these world sizes, small enough for dense attention."""
    world = draw(st.sampled_from(worlds))
    architecture = draw(st.sampled_from(get_args(Architecture)))
    # An fp8 entry has a latent of whole tiles; the made-up layouts have none.
    storage = [name for name in STORAGE if architecture != "mixed" or not name.startswith("fp8")]
    block_tokens = draw(st.sampled_from((4, 8, 16)))
    picks = draw(st.sampled_from(get_args(Picks)))
    units = {1, 2, 4, block_tokens} | (set() if picks == "select" else {2 * block_tokens})
    tokens = st.one_of(st.sampled_from((1, block_tokens, 2 * block_tokens)), st.integers(2, 45))
    documents = tuple(draw(st.lists(tokens, min_size=1, max_size=4)))
    return Case(
        seed=draw(st.integers(0, 2**31 - 1)),
        world=world,
        architecture=architecture,
        heads=draw(st.integers(1, 2)),
        storage=draw(st.sampled_from(storage)),
        weights=draw(st.booleans()),
        layers=draw(st.integers(1, 2)),
        block_tokens=block_tokens,
        documents=documents,
        prefilled=draw(st.integers(0, len(documents))),
        chunk=draw(st.integers(11, 30)),
        policy=draw(st.sampled_from(PLACEMENT_POLICIES)),
        run=draw(st.integers(1, 3)),
        copies=draw(st.integers(1, min(world, 3))),
        index_placement=draw(st.sampled_from(("with-blocks", "replicated"))),
        mode=draw(st.sampled_from(MODES)),
        lease_entries=draw(st.sampled_from((0, 3, 40, 400))),
        reuse=draw(st.sampled_from((1.0, 16.0))),
        picks=picks,
        unit_tokens=draw(st.sampled_from(sorted(units))),
        per_branch=draw(st.booleans()),
        sink=draw(st.booleans()),
        steps=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 2)),
        queries=tuple(draw(st.lists(st.integers(0, 8), min_size=world, max_size=world))),
        requests=draw(st.integers(0, 2)),
        stranger=draw(st.none() | st.integers(0, len(documents) - 1)),
        offsets=draw(st.booleans()),
    )


def play(case: Case) -> list[torch.Tensor]:
    """The case on a loopback world: all outputs, rank by rank."""
    ranks = run_loopback(case.world, lambda transport: run_case(transport, case))
    return [output for outputs in ranks for output in outputs]


@given(case=cases(worlds=(4,)))
@settings(EVERYWHERE, max_examples=170)
def test_step_equals_dense_attention_on_four_processes(four_ranks: RankPool, case: Case) -> None:
    four_ranks.run(run_case, case)


@given(case=cases(worlds=(1, 2, 3)))
@settings(EVERYWHERE, max_examples=130)
def test_step_equals_dense_attention(case: Case) -> None:
    play(case)


@given(case=cases(worlds=(8,)))
@settings(EVERYWHERE, max_examples=10)
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
@settings(EVERYWHERE, max_examples=20)
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
