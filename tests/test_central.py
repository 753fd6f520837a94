"""The central property: for any placement and any plan, the step equals dense attention.

`cases.run_case` plays a random world and compares every step on every rank: outputs with dense fp64
attention, selections with the exact top-k, counters with what was decided.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from cases import STORAGE, Architecture, Case, Picks, Player, make_config, run_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RankPool, RanksFailedError, run_loopback

from qroam.partition.placement import POLICIES
from qroam.runtime.cost.predicate import MODES
from qroam.runtime.runtime import Runtime
from qroam.runtime.transport import LoopbackTransport, Transport

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
        policy=draw(st.sampled_from(POLICIES)),
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
    )


def play(case: Case) -> list[list[torch.Tensor]]:
    """The case on a loopback world: every rank's outputs."""
    return run_loopback(case.world, lambda transport: run_case(transport, case))


@given(case=cases(worlds=(4,)))
@settings(EVERYWHERE, max_examples=100)
def test_step_equals_dense_attention_on_four_processes(four_ranks: RankPool, case: Case) -> None:
    four_ranks.run(run_case, case)


@given(case=cases(worlds=(1, 2, 3, 4)))
@settings(EVERYWHERE, max_examples=200)
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
    before, after = play(case), play(replace(case, perturbed=True))
    assert [len(outputs) for outputs in before] == [len(outputs) for outputs in after]
    for one, other in zip(sum(before, []), sum(after, []), strict=True):
        assert torch.equal(one, other)


def test_perturbing_an_attached_document_is_noticed() -> None:
    case = Case(seed=1, world=3)
    attached = replace(case, documents=(40, 40), stranger=None)
    before, after = play(attached), play(replace(attached, seed=2))
    assert not all(map(torch.equal, sum(before, []), sum(after, [])))


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


def test_large_leases_spare_the_second_fetch() -> None:
    """Once everything is leased, the same step is local: nothing but empty messages travel."""
    case = Case(seed=5, mode="always-fetch", picks="all", steps=1, lease_entries=500, requests=0)

    def worker(transport: Transport) -> list[int]:
        with Runtime.open(make_config(case), transport) as runtime:
            player = Player(runtime, case)
            player.add_documents()
            sent = []
            for _ in range(3):
                before = transport.bytes_sent["attend-answer"]
                player.decode()
                sent.append(transport.bytes_sent["attend-answer"] - before)
            return sent

    case = replace(case, queries=(3, 3, 3))
    for first, second, third in run_loopback(case.world, worker):
        assert first > second == third


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
