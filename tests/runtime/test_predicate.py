"""The predicate against published figures, by hand, and by property."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from costs import ONE, V32, decided, demand_of, fetch, n, paper, route, same_units, wire_only
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qroam.partition.layout import Form
from qroam.partition.presets import named_layout
from qroam.runtime.cost.model import (
    CostModel,
    LayerFacts,
)
from qroam.runtime.cost.predicate import (
    MODES,
    Decision,
    Demand,
    Mode,
    Reason,
    Way,
    all_local,
    decide,
    predict_step,
)
from qroam.runtime.cost.profile import (
    PROFILE_NAMES,
    Device,
    FabricProfile,
    Path,
    load_profile,
)


@pytest.mark.parametrize(("queries", "way"), [(1, Way.ROUTE_A), (4, Way.ROUTE_A), (5, Way.FETCH)])
def test_bytes_tie_at_4_8_queries(queries: int, way: Way) -> None:
    """V3.2, 2,048 shared fp8 entries: 279,040 B a routed query against 1,343,488 B."""
    form = V32.forms[0]
    assert 2048 * V32.entry_bytes / (form.out_bytes + form.back_bytes) == pytest.approx(
        4.8, abs=0.05
    )
    decision = decided(same_units(queries, 2048), wire_only(paper()))
    assert decision.way[:, 1].tolist() == [way] * queries
    assert decision.reason[:, 1].tolist() == [Reason.WIRE] * queries


def test_reuse_turns_a_route_into_a_fetch() -> None:
    once, often = (decided(same_units(1, 2048), paper(), reuse=reuse) for reuse in (1.0, 10.0))
    assert once.way[0, 1] == Way.ROUTE_A
    assert often.way[0, 1] == Way.FETCH
    assert often.reason[0, 1] == Reason.REUSE


def test_equal_costs_are_fetched() -> None:
    """Every rate is a power of two, so that the sums are exact and a wait can make them equal."""
    free = {name: 2.0**45 if name.endswith("per_s") else 0.0 for name in Device.__slots__}
    profile = FabricProfile(
        name="tie",
        description="",
        path=Path(
            probe_s=1.0,
            push_bytes_per_s=2.0**20,
            pull_bytes_per_s=((1, 2.0**20),),
            egress_bytes_per_s=2.0**20,
            ingress_bytes_per_s=2.0**20,
        ),
        device=Device(**free),
        sources=(),
    )
    demand = same_units(1, 2048)
    plain = decided(demand, profile)
    assert plain.way[0, 1] == Way.ROUTE_A
    tied = decided(demand, profile, wait_s=plain.fetch_s - plain.route_s)
    assert tied.route_s[1] == tied.fetch_s[1]
    assert tied.way[0, 1] == Way.FETCH
    assert tied.reason[0, 1] == Reason.TIE


def test_local_units_are_no_choice() -> None:
    decision = decided(demand_of([[{1, 2}, set()], [set(), {7}]]), paper())
    assert decision.way.tolist() == [[Way.LOCAL, Way.NONE], [Way.NONE, Way.FETCH]]
    assert decision.reason[:, 0].tolist() == [Reason.LOCAL, Reason.NONE]
    assert decision.margin[:, 0].tolist() == [0, 0]
    assert decision.predicted[0] == decision.route_s[0] == decision.fetch_s[0] == 0


def test_a_busy_holder_is_fetched_from() -> None:
    demand = same_units(1, 2048)
    busy = torch.tensor([0, 1e-3], dtype=torch.float64)
    assert decided(demand, paper()).way[0, 1] == Way.ROUTE_A
    decision = decided(demand, paper(), wait_s=busy)
    assert decision.way[0, 1] == Way.FETCH
    assert decision.reason[0, 1] == Reason.LATENCY


def split_case() -> Demand:
    """Three items that want many units of their own, and forty that share a selection."""
    own = [[set(), set(range(10_000 * i, 10_000 * i + 8000))] for i in range(1, 4)]
    return demand_of([*own, *([set(), set(range(2048))] for _ in range(40))])


def test_a_split_beats_both_pure_mixes() -> None:
    demand = split_case()
    decision = decided(demand, paper())
    assert decision.way[:, 1].tolist() == [Way.ROUTE_A] * 3 + [Way.FETCH] * 40
    assert set(decision.reason[:, 1].tolist()) == {Reason.SPLIT}
    assert decision.predicted[1] < torch.minimum(decision.route_s, decision.fetch_s)[1]
    # Both fixed costs, and exactly the units that the fetched items share.
    model = CostModel(facts=V32, profile=paper())
    routed = route(model, 3, 24_000).total
    fetched = fetch(model, 40, 40 * 2048, 2048, mixed=True).total
    assert decision.predicted[1].item() == pytest.approx((routed + fetched).item())


@pytest.mark.parametrize("mode", MODES)
def test_margin_is_the_cost_of_one_change(mode: Mode) -> None:
    demand = split_case()
    decision = decided(demand, paper(), mode=mode, seed=3)
    for item in (0, 2, 3, 42):
        way = decision.way.clone()
        way[item, 1] = Way.ROUTE_A if way[item, 1] == Way.FETCH else Way.FETCH
        step = predict_step(way, demand, CostModel(facts=V32, profile=paper()), rank=0)
        expected = step.exchange.item() / decision.predicted[1].item() - 1
        assert decision.margin[item, 1].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_form_b_is_chosen_only_if_it_can_be_executed() -> None:
    demand = demand_of([[set(), set(range(i * 2048, i * 2048 + 2048))] for i in range(8)])
    assert set(decided(demand, paper()).way[:, 1].tolist()) == {Way.ROUTE_A}
    both: tuple[Form, ...] = ("A", "B")
    assert set(decided(demand, paper(), forms=both).way[:, 1].tolist()) == {Way.ROUTE_B}
    assert decided(demand, paper(), forms=both).predicted[1] < decided(demand, paper()).predicted[1]
    plain = LayerFacts.of(
        replace(named_layout("mla-v3.2"), projection=None), entry_bytes=656, element_bytes=2
    )
    with pytest.raises(ValueError, match="forms must be some of A for this layout"):
        decide(demand, CostModel(facts=plain, profile=paper()), rank=0, forms=both)


Lists = list[list[set[int]]]


@st.composite
def selections(draw: st.DrawFn) -> tuple[Lists, int]:
    """Up to 12 items on up to 4 ranks, with units shared in every way; and the own rank."""
    world, num_items = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    scale = draw(st.sampled_from([1, 40, 900]))
    unit_sets = st.sets(st.integers(0, 9), max_size=10)
    lists = [
        [{scale * u + i for u in draw(unit_sets) for i in range(scale)} for _ in range(world)]
        for _ in range(num_items)
    ]
    return lists, draw(st.integers(0, world - 1))


@settings(deadline=None, max_examples=100)
@given(case=selections(), mode=st.sampled_from(["auto", "random"]), seed=st.integers(0, 99))
def test_a_mix_is_never_under_estimated(case: tuple[Lists, int], mode: Mode, seed: int) -> None:
    """Against the true number of different units among those fetched."""
    lists, rank = case
    demand = demand_of(lists)
    model = CostModel(facts=V32, profile=paper())
    decision = decide(demand, model, rank=rank, mode=mode, seed=seed)
    talked_to = [h != rank and any(row[h] for row in lists) for h in range(len(lists[0]))]
    sharers = ONE * max(1, sum(talked_to))
    for h in range(len(talked_to)):
        ways = decision.way[:, h].tolist()
        routed = [row[h] for row, way in zip(lists, ways, strict=True) if way == Way.ROUTE_A]
        fetched = [row[h] for row, way in zip(lists, ways, strict=True) if way == Way.FETCH]
        true_s = route(model, len(routed), sum(map(len, routed)), sharers=sharers).total
        true_s = (
            true_s
            + fetch(
                model,
                len(fetched),
                sum(map(len, fetched)),
                len(set().union(*fetched)),
                mixed=len(routed) > 0,
                sharers=sharers,
            ).total
        )
        assert decision.predicted[h].item() >= true_s.item() * (1 - 1e-12)


def test_no_items() -> None:
    empty = torch.zeros(0, 3)
    demand = Demand(empty.long(), torch.zeros(3).long(), empty.double())
    for mode in MODES:
        decision = decided(demand, paper(), mode=mode)
        assert decision.way.shape == (0, 3)
        assert decision.predicted.tolist() == [0, 0, 0]


@settings(deadline=None, max_examples=examples(150, quick=40))
@given(
    case=selections(),
    name=st.sampled_from(PROFILE_NAMES),
    layout=st.sampled_from(["mla-v3.2", "mlra-4", "mla-tiny"]),
    forms=st.sampled_from([("A",), ("B",), ("A", "B")]),
    reuse=st.sampled_from([1.0, 3.0, 50.0]),
    unit_tokens=st.sampled_from([1, 16]),
    splice=st.booleans(),
)
def test_auto_is_never_predicted_worse_than_either_pure_mode(
    case: tuple[Lists, int],
    name: str,
    layout: str,
    forms: tuple[Form, ...],
    reuse: float,
    unit_tokens: int,
    splice: bool,
) -> None:
    lists, rank = case
    demand = demand_of(lists)
    profile = load_profile(name)
    facts = LayerFacts.of(named_layout(layout), entry_bytes=656, element_bytes=2)

    model = CostModel(
        facts=facts, profile=profile, unit_tokens=unit_tokens, reuse=reuse, splice=splice
    )

    def run(mode: Mode) -> tuple[Decision, float]:
        decision = decide(demand, model, rank=rank, mode=mode, forms=forms)
        return decision, predict_step(decision.way, demand, model, rank=rank).total.item()

    (auto, auto_s), (routed, route_s), (fetched, fetch_s) = (
        run("auto"),
        run("always-route"),
        run("always-fetch"),
    )
    assert torch.equal(routed.predicted, auto.route_s)
    assert torch.equal(fetched.predicted, auto.fetch_s)
    assert bool((auto.predicted <= torch.minimum(auto.route_s, auto.fetch_s)).all())
    assert auto_s <= min(route_s, fetch_s)
    wanted = demand.pairs_units > 0
    here = torch.arange(wanted.shape[1]) == rank
    for decision in (auto, routed, fetched):
        assert torch.equal(decision.way != Way.NONE, wanted)
        assert torch.equal(decision.way == Way.LOCAL, wanted & here)
        assert torch.equal(decision.reason == Reason.NONE, ~wanted)
        assert bool(decision.margin.isfinite().all())
    assert not bool((fetched.way == Way.ROUTE_A).any())
    assert not bool((routed.way == Way.FETCH).any())
    if forms == ("A",):
        assert not bool((auto.way == Way.ROUTE_B).any())


def test_random_is_a_pure_function_of_its_seed() -> None:
    demand = demand_of([[{0}, {1}, {2}, {3}] for _ in range(300)])

    def ways(seed: int, step: int, forms: tuple[Form, ...] = ("A", "B")) -> Tensor:
        return decided(demand, paper(), mode="random", seed=seed, step=step, forms=forms).way

    assert torch.equal(ways(1, 2), ways(1, 2))
    assert not torch.equal(ways(1, 2), ways(2, 2))
    assert not torch.equal(ways(1, 2), ways(1, 3))
    assert not torch.equal(ways(1, 2), ways(2, 1))
    remote = ways(-7, 2**40)[:, 1:]
    for way in (Way.ROUTE_A, Way.ROUTE_B, Way.FETCH):
        assert 200 < (remote == way).sum().item() < 400  # of 900, 300 expected
    assert set(ways(1, 2, ("A",))[:, 1:].flatten().tolist()) == {Way.ROUTE_A, Way.FETCH}
    assert set(ways(1, 2)[:, 0].tolist()) == {Way.LOCAL}


@pytest.mark.parametrize("mode", MODES)
def test_shapes_are_static_and_nothing_is_read(mode: Mode) -> None:
    """Under FakeTensorMode there are no values: an `.item()` or `nonzero` raises."""
    with FakeTensorMode():
        demand = Demand(
            pairs_units=torch.zeros(6, 4, dtype=torch.int64),
            unique_units=torch.zeros(4, dtype=torch.int64),
            fair_units=torch.zeros(6, 4, dtype=torch.float64),
        )
        decision = decided(demand, paper(), mode=mode, forms=("A", "B"), reuse=2.0, splice=True)
        step = predict_step(decision.way, demand, CostModel(facts=V32, profile=paper()), rank=0)
        assert decision.way.shape == decision.margin.shape == decision.reason.shape == (6, 4)
        assert decision.way.dtype == decision.reason.dtype == torch.int8
        assert decision.predicted.shape == decision.route_s.shape == decision.fetch_s.shape == (4,)
        assert step.total.shape == ()


def test_a_step_is_a_maximum() -> None:
    demand = demand_of([[set(range(5000)), set(range(100)), set(range(300))]])
    profile = paper()
    decision = decided(demand, profile, mode="always-fetch")
    model = CostModel(facts=V32, profile=profile)
    step = predict_step(decision.way, demand, model, rank=0)
    assert step.own == model.attend().of(model.asked(n(1), n(5000), n(0)))
    assert step.exchange == decision.predicted.max() == decision.predicted[2]
    expected = step.plan + torch.maximum(step.own, step.exchange) + step.merge
    assert step.total == expected
    assert step.plan.item() == profile.device.plan_s


def test_what_the_predicate_refuses() -> None:
    demand = same_units(2, 3)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        decide(demand, CostModel(facts=V32, profile=paper()), rank=2)
    with pytest.raises(ValueError, match="mode must be one of auto, always-route"):
        decided(demand, paper(), mode="best")
    with pytest.raises(ValueError, match="forms must be some of A, B for this layout"):
        decided(demand, paper(), forms=())
    with pytest.raises(ValueError, match="reuse must be finite and at least 1"):
        decided(demand, paper(), reuse=0.0)
    with pytest.raises(ValueError, match=r"unique_units must be \(2,\) torch.int64"):
        decided(demand._replace(unique_units=torch.zeros(3).long()), paper())
    with pytest.raises(ValueError, match=r"fair_units must be \(2, 2\) torch.float64"):
        decided(demand._replace(fair_units=demand.fair_units.float()), paper())
    with pytest.raises(ValueError, match=r"pairs_units must be \(N, W\)"):
        decided(demand._replace(pairs_units=demand.unique_units), paper())
    with pytest.raises(ValueError, match=r"wait_s must be \(2,\)"):
        decided(demand, paper(), wait_s=torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"way must be \(2, 2\)"):
        predict_step(torch.zeros(3, 2), demand, CostModel(facts=V32, profile=paper()), rank=0)


@pytest.mark.parametrize("mode", ["auto", "always-route", "always-fetch", "random"])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (3, 1)])
def test_where_all_is_local_nothing_is_priced(world: int, rank: int, mode: Mode) -> None:
    lists: Lists = [[set() for _ in range(world)] for _ in range(4)]
    for item in (0, 1, 3):
        lists[item][rank] = set(range(item, 5))
    demand = demand_of(lists)
    model = CostModel(facts=V32, profile=paper())
    for got, want in zip(
        all_local(demand), decide(demand, model, rank=rank, mode=mode), strict=True
    ):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
