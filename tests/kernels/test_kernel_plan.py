"""The plan kernels against the runtime's plan and predicate: all integers and ways exactly."""

from __future__ import annotations

import faulthandler
import os
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from effort import slow_after
from on_cpu import COMPILER, Launcher
from plan_cases import DEVICE, POISON, Case, Drawn, check, directory_of, named, run
from torch import Tensor

from qroam.kernels import nvrtc
from qroam.kernels import plan as plan_module
from qroam.kernels.decide import SOURCE, PlanMode, PriceTable, decide
from qroam.kernels.plan import BlockTable, Plan, PlanWorkspace, plan
from qroam.partition.layout import Form
from qroam.partition.presets import named_layout
from qroam.runtime import load_profile
from qroam.runtime.cost import predicate
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.predicate import Demand, Way
from qroam.runtime.cost.prices import prices_of
from qroam.runtime.cost.profile import PROFILE_NAMES, FabricProfile

pytestmark = pytest.mark.xdist_group("plan")  # each worker would compile the kernels
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
V32 = LayerFacts.of(named_layout("mla-v3.2"), entry_bytes=1152, element_bytes=2)


def table_of(
    profile: FabricProfile, *, world: int, forms: tuple[Form, ...] = ("A",), **options: float
) -> PriceTable:
    unit_tokens = int(options.pop("unit_tokens", 1))
    model = CostModel(facts=V32, profile=profile, unit_tokens=unit_tokens, **options)  # type: ignore[arg-type]
    return prices_of(model, world=world, forms=forms, device=DEVICE)


@pytest.fixture(
    autouse=True, params=["one launch", "a launch a stage"] if DEVICE == "cpu" else ["gpu"]
)
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launcher | None:
    """Without a GPU the kernels run as fibers, on a device of many SMs or of none."""
    if DEVICE == "cuda":
        return None
    if COMPILER is None:
        pytest.skip("needs a C++ compiler to run CUDA C++ on a CPU")
    launcher = Launcher(seed=zlib.crc32(request.node.name.encode()))
    num_sms = 132 if request.param == "one launch" else 0
    monkeypatch.setattr(nvrtc, "launch", launcher)
    monkeypatch.setattr(plan_module, "num_sms", lambda device: num_sms)
    monkeypatch.setattr(plan_module, "shared_of_sm", lambda device: 228 << 10)
    monkeypatch.setattr(plan_module, "has_clusters", lambda device: True)
    monkeypatch.setattr(nvrtc, "load", lambda source, kernel, device: None)
    return launcher


# The decision alone


def random_demand(items: int, world: int, *, seed: int, most: int) -> Demand:
    """Units of items drawn from pools of several sizes, so that holders differ in sharing.

    Fair shares are rounded as the kernel rounds them: then any order of addition gives their sum.
    """
    g = torch.Generator().manual_seed(seed)
    pairs = torch.zeros(items, world, dtype=torch.int64)
    fair = torch.zeros(items, world, dtype=torch.float64)
    unique = torch.zeros(world, dtype=torch.int64)
    for holder in range(world):
        pool = int(torch.randint(1, 4 * most, (1,), generator=g))
        asks = torch.rand(items, generator=g) < 0.7
        lists = [
            torch.randperm(pool, generator=g)[: int(torch.randint(0, most, (1,), generator=g))]
            for _ in range(items)
        ]
        lists = [units if ask else units[:0] for units, ask in zip(lists, asks, strict=True)]
        times = torch.bincount(torch.cat(lists), minlength=pool)
        unique[holder] = (times > 0).sum()
        for item, units in enumerate(lists):
            pairs[item, holder] = len(units)
            shares = torch.round(2**28 / times[units].double()) / 2**28
            fair[item, holder] = shares.sum()
    return Demand(pairs_units=pairs, unique_units=unique, fair_units=fair)


def device_decide(
    demand: Demand,
    prices: PriceTable,
    *,
    rank: int,
    mode: predicate.Mode,
    wait_s: Tensor | None = None,
) -> Tensor:
    assert mode != "random"
    out = torch.full(demand.pairs_units.shape, POISON, dtype=torch.int8, device=DEVICE)
    decide(
        demand.pairs_units.int().to(DEVICE),
        demand.unique_units.int().to(DEVICE),
        demand.fair_units.to(DEVICE),
        prices,
        rank=rank,
        mode=mode,
        wait_s=None if wait_s is None else wait_s.to(DEVICE),
        out=out,
    )
    return out.cpu()


@pytest.mark.parametrize("name", slow_after(1, PROFILE_NAMES))
@pytest.mark.parametrize("forms", [("A",), ("B",), ("A", "B")], ids="".join)
def test_ways_are_the_predicates(name: str, forms: tuple[Form, ...]) -> None:
    profile, seen = load_profile(name), set()
    for seed, (items, world, most) in enumerate([(1, 2, 600), (7, 5, 1500), (16, 3, 2000)]):
        demand = random_demand(items, world, seed=seed, most=most)
        reuse, splice = (1.0, False) if seed % 2 else (3.0, True)
        prices = table_of(profile, world=world, forms=forms, reuse=reuse, splice=splice)
        wait_s = torch.rand(world, dtype=torch.float64) * 1e-5 if seed % 2 else None
        modes: tuple[predicate.Mode, ...] = ("auto", "always-route", "always-fetch")
        for mode in modes[: 3 if seed == 1 else 1]:
            model = CostModel(facts=V32, profile=profile, reuse=reuse, splice=splice)
            ways = predicate.decide(
                demand, model, rank=1, mode=mode, forms=forms, wait_s=wait_s
            ).way
            got = device_decide(demand, prices, rank=1, mode=mode, wait_s=wait_s)
            assert torch.equal(got, ways), (seed, mode)
            seen |= set(ways.unique().tolist())
    assert {int(Way.LOCAL), int(Way.FETCH)} <= seen
    assert seen & {int(Way.ROUTE_A), int(Way.ROUTE_B)}


def test_some_holders_are_split() -> None:
    """The mix is really taken: otherwise the cases above would not show it."""
    profile, split = load_profile("ibgda-ndr200"), 0
    for seed in range(3):
        few = random_demand(24, 3, seed=seed, most=8)
        many = random_demand(4, 3, seed=seed + 50, most=4000)
        demand = Demand(
            torch.cat((few.pairs_units, many.pairs_units)),
            few.unique_units + many.unique_units,
            torch.cat((few.fair_units, many.fair_units)),
        )
        ways = device_decide(demand, table_of(profile, world=3), rank=0, mode="auto")
        expected = predicate.decide(demand, CostModel(facts=V32, profile=profile), rank=0).way
        assert torch.equal(ways, expected)
        split += int(((ways == Way.FETCH).any(0) & (ways == Way.ROUTE_A).any(0)).sum())
    assert split > 0


def test_equal_costs_are_fetched() -> None:
    """With every constant that differs removed, both ways cost the same to the last bit."""
    row = torch.zeros(3, 16, dtype=torch.float64, device=DEVICE)
    row[:, 0] = row[:, 8] = 1e-6  # of each exchange, routed or fetched
    row[:, 15] = 1
    free = PriceTable(row, num_forms=1, first_way=2)
    demand = random_demand(5, 3, seed=3, most=40)
    remote = (demand.pairs_units > 0) & (torch.arange(3) != 0)
    tie = device_decide(demand, free, rank=0, mode="auto")
    assert bool((tie[remote] == Way.FETCH).all())
    row[:, 11] = 1e-15  # of each fetched unit
    routed = device_decide(demand, free, rank=0, mode="auto")
    assert bool((routed[remote] == Way.ROUTE_A).all())


# The whole plan


CASES = [
    Case(queries=1, listed=5),
    Case(queries=1, listed=40, branches=2, copies=2),
    Case(queries=3, listed=1, world=2, rank=0),
    Case(queries=2, listed=63, blocks=20),
    Case(queries=3, listed=64, copies=2, rank=3),
    Case(queries=2, listed=65, world=8, rank=5, copies=3),
    Case(queries=2, listed=20, branches=2, unit_tokens=4, world=3, rank=2),
    Case(queries=3, listed=9, unit_tokens=16, blocks=40, world=5),
    Case(queries=2, listed=30, world=11, rank=9, blocks=30),
    Case(queries=2, listed=7, world=1, rank=0),
    Case(queries=3, listed=10, padding=1.0),
]
# With one launch: items over clusters of 8 and of 4, items of one block, and 4 and 8 words of bits.
SPREAD = [
    Case(queries=3, listed=300, blocks=40, copies=2),
    Case(queries=1, listed=500, blocks=70, world=8),
    Case(queries=4, listed=260, blocks=40, branches=2, rank=0),
    Case(queries=20, listed=70, blocks=20),
    Case(queries=70, listed=6, world=3),
    Case(queries=130, listed=4, world=3),
]


@pytest.mark.parametrize(
    ("case", "mode"),
    slow_after(
        2,
        [
            *(
                (case, mode)
                for case, mode in zip(CASES, ["auto", "always-fetch"] * 6, strict=False)
            ),
            (CASES[3], "always-fetch"),
            (CASES[4], "always-route"),
        ],
    ),
    ids=lambda value: value if isinstance(value, str) else named(value),
)
def test_plan(case: Case, mode: predicate.Mode) -> None:
    assert mode != "random"
    drawn, profile = case.draw(), load_profile("nvlink4")
    prices = table_of(profile, world=case.world, unit_tokens=case.unit_tokens)
    got = run(case, drawn, prices, mode=mode).plan
    seen = Demand(got.pairs_units.long(), got.unique_units.long(), got.fair_units)
    model = CostModel(facts=V32, profile=profile, unit_tokens=case.unit_tokens)
    ways = predicate.decide(seen, model, rank=case.rank, mode=mode).way
    assert torch.equal(got.way, ways)
    check(case, drawn, got, ("A",), fill=True)


@pytest.mark.parametrize(
    "case",
    slow_after(1, [*(CASES[i] for i in (1, 4, 5, 6, 8)), Case(queries=33, listed=6, world=3)]),
    ids=named,
)
def test_any_ways(case: Case) -> None:
    """Ways that no closed form would choose, so that every holder is split."""
    forms: tuple[Form, ...] = ("A", "B") if case.queries > 2 else ("B",)
    drawn = case.draw()
    g = torch.Generator().manual_seed(case.seed + 1)
    ways = torch.tensor([0, 4, 4, *(int(predicate.way_of(form)) for form in forms)])
    way = ways[torch.randint(len(ways), (len(drawn.units), case.world), generator=g)].to(torch.int8)
    way[:, case.rank] = int(Way.LOCAL)
    prices = table_of(load_profile("nvlink4"), world=case.world, forms=forms)
    got = run(case, drawn, prices, mode="given", way=way, fill=False).plan
    assert torch.equal(got.way, way)
    check(case, drawn, got, forms, fill=False)


@pytest.mark.parametrize("case", slow_after(1, SPREAD), ids=named)
@pytest.mark.parametrize("mode", ["given", "auto"])
def test_items_over_several_blocks(case: Case, mode: PlanMode) -> None:
    drawn, prices = case.draw(), table_of(load_profile("nvlink4"), world=case.world)
    g = torch.Generator().manual_seed(case.seed + 1)
    ways = torch.tensor([0, 2, 4, 4])[torch.randint(4, (len(drawn.units), case.world), generator=g)]
    ways[:, case.rank] = int(Way.LOCAL)
    got = run(case, drawn, prices, mode=mode, way=ways.to(torch.int8)).plan
    check(case, drawn, got, ("A",), fill=True)


# What keeps blocks in order, and what it is replaced by.
BARRIERS = {
    "no gate before bits are read": ("    wait<F>(s, ticket);  // 1\n", ""),
    "no gate before those who fetch first are counted": ("wait<F>(s, arrive<F>(s));  // 3", ";"),
    "parts do not meet before their coverage is read": (
        "        sync_parts<F>();\n        if (int h = threadIdx.x; h < W && part == 0) {\n"
        "            s.expected",
        "        __syncthreads();\n        if (int h = threadIdx.x; h < W && part == 0) {\n"
        "            s.expected",
    ),
    "parts do not meet before flagged units are summed": (
        "        sync_parts<F>();\n        if (int h = threadIdx.x; h < W) {\n            Column& c",
        "        __syncthreads();\n        if (int h = threadIdx.x; h < W) {\n            Column& c",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the order of turns is drawn on a CPU only")
@pytest.mark.parametrize("launcher", ["one launch"], indirect=True)
@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_shows(
    name: str, launcher: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, instead = BARRIERS[name]
    source = SOURCE.read_text()
    assert there in source
    for header in SOURCE.parent.glob("*.cuh"):
        (tmp_path / header.name).write_text(header.read_text())
    broken = tmp_path / "plan.cu"
    broken.write_text(source.replace(there, instead))

    def goes_wrong(case: Case, source: Path, *, orders: int) -> bool:
        """In some order of turns; in a child, because it may write anywhere."""
        monkeypatch.setattr(plan_module, "SOURCE", source)
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            for launcher.seed in range(1, orders + 1):
                g = torch.Generator().manual_seed(launcher.seed)
                drawn, prices = case.draw(), table_of(load_profile("nvlink4"), world=case.world)
                way = torch.tensor([2, 4])[
                    torch.randint(2, (len(drawn.units), case.world), generator=g)
                ]
                way[:, case.rank] = int(Way.LOCAL)
                try:
                    got = run(case, drawn, prices, mode="given", way=way.to(torch.int8)).plan
                    check(case, drawn, got, ("A",), fill=True)
                except BaseException:
                    os._exit(1)
            os._exit(0)
        return os.waitpid(child, 0)[1] != 0

    case = CASES[4] if "bits" in name else SPREAD[0]
    assert not goes_wrong(case, SOURCE, orders=4)
    assert goes_wrong(case, broken, orders=60)


def test_what_is_owned_and_not_yet_here_is_not_read() -> None:
    case = Case(queries=2, listed=30, blocks=20)
    drawn = case.draw()
    slots = torch.where(torch.arange(len(drawn.slot_of)) % 2 == 0, -1, drawn.slot_of)
    prices = table_of(load_profile("nvlink4"), world=case.world)
    lacking = drawn._replace(slot_of=slots.int())
    got = run(case, lacking, prices, mode="always-fetch").plan
    check(case, lacking, got, ("A",), fill=True)


def test_a_lost_copy_is_not_asked() -> None:
    owners = torch.tensor([[-1, 2], [1, 2], [1, 0], [-1, -1]], dtype=torch.int32)
    i32 = torch.int32

    def asked(askable: Tensor | None) -> list[int]:
        directory = BlockTable.of(
            owners, torch.zeros(4, dtype=i32), torch.ones(4, dtype=i32), torch.zeros(0, dtype=i32),
            rank=0, block_tokens=1, num_branches=1, askable=askable,
        )  # fmt: skip
        return directory.records[:, 0].tolist()

    assert asked(None) == [2, 1, 1, -1]
    assert asked(torch.tensor([2, 0, 2], dtype=torch.uint8)) == [2, 2, 0, -1]
    assert asked(torch.tensor([2, 1, 0], dtype=torch.uint8)) == [-1, 1, 0, -1]


def test_two_runs_and_a_workspace_used_before_give_the_same() -> None:
    case = Case(queries=3, listed=64, copies=2, rank=3)
    other = replace(case, seed=9, queries=2)
    prices = table_of(load_profile("nvlink4"), world=case.world)
    first = run(case, case.draw(), prices, mode="auto")
    run(other, other.draw(), prices, mode="always-fetch", workspace=first.workspace)
    again = run(case, case.draw(), prices, mode="auto", workspace=first.workspace)
    for name in Plan._fields:
        assert torch.equal(getattr(first.plan, name), getattr(again.plan, name)), name


def test_ids_beyond_the_tables_are_padding() -> None:
    case = Case(queries=2, listed=8, padding=0.0)
    drawn = case.draw()
    units = drawn.units.clone()
    units[:, 3] = len(drawn.owners) * case.block_tokens + 5
    units[:, 5] = 2**31 - 1
    padded = torch.where(units >= len(drawn.owners) * case.block_tokens, -1, units)
    prices = table_of(load_profile("nvlink4"), world=case.world)
    got = run(case, drawn._replace(units=units), prices, mode="always-fetch").plan
    check(case, drawn._replace(units=padded), got, ("A",), fill=True)


@pytest.mark.parametrize(("queries", "listed"), [(0, 4), (2, 0)])
def test_nothing_to_plan(queries: int, listed: int) -> None:
    case = Case(queries=queries, listed=listed)
    prices = table_of(load_profile("nvlink4"), world=case.world)
    got = run(case, case.draw(), prices, mode="auto").plan
    for counts in (got.pairs, got.listed, got.counts, got.unique_units, got.pairs_units):
        assert not bool(counts.any())


def test_what_does_not_fit_is_named() -> None:
    case = Case(queries=2, listed=8)
    drawn = case.draw()
    prices = table_of(load_profile("nvlink4"), world=case.world)
    good = run(case, drawn, prices, mode="auto").workspace
    with pytest.raises(ValueError, match=r"units must be .*int32"):
        run(case, drawn._replace(units=drawn.units.long()), prices, mode="auto")
    with pytest.raises(ValueError, match="unit_tokens must divide block_tokens 16, got 3"):
        run(replace(case, unit_tokens=3), drawn, prices, mode="auto", workspace=good)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 4\), got 4"):
        run(replace(case, rank=4), drawn, prices, mode="auto")
    with pytest.raises(ValueError, match="mode must be one of auto"):
        run(case, drawn, prices, mode="random")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the workspace is for 2 items, got 3"):
        run(replace(case, queries=3), replace(case, queries=3).draw(), prices, mode="auto",
            workspace=good)  # fmt: skip
    with pytest.raises(ValueError, match=r"prices must be \(3, 16\)"):
        decide(
            torch.zeros(1, 3, dtype=torch.int32, device=DEVICE),
            torch.zeros(3, dtype=torch.int32, device=DEVICE),
            torch.zeros(1, 3, dtype=torch.float64, device=DEVICE),
            table_of(load_profile("nvlink4"), world=2),
            rank=0,
        )
    with pytest.raises(ValueError, match="forms must be some of A, B, in that order"):
        table_of(load_profile("nvlink4"), world=2, forms=())


BIG = [
    Case(queries=q, listed=2048, world=8, block_tokens=64, blocks=blocks, padding=0.02)
    for q, blocks in ((1, 4096), (8, 4096), (64, 4096), (65, 1024), (200, 256), (256, 4096))
]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["auto", "always-route", "always-fetch", "given"])
@pytest.mark.parametrize("case", BIG, ids=named)
def test_full_size_in_one_launch(
    case: Case, mode: PlanMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, launched, launch = case.draw(), [], nvrtc.launch

    def counted(source: Path, kernel: str, *arguments: object, **options: object) -> None:
        launched.append(kernel)
        launch(source, kernel, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(nvrtc, "launch", counted)
    prices = table_of(load_profile("nvlink4"), world=case.world)
    g = torch.Generator().manual_seed(case.seed + 1)
    way = torch.tensor([2, 4])[torch.randint(2, (case.queries, case.world), generator=g)]
    way[:, case.rank] = int(Way.LOCAL)
    got = run(case, drawn, prices, mode=mode, way=way.to(torch.int8)).plan
    assert len(launched) == 1
    check(case, drawn, got, ("A",), fill=True)


@pytest.mark.gpu
@needs_gpu
def test_replays_of_a_graph_plan_new_selections() -> None:
    case = BIG[1]
    drawn = [replace(case, seed=seed).draw() for seed in range(4)]
    prices = table_of(load_profile("nvlink4"), world=case.world)
    tables = Drawn(*(tensor.to(DEVICE) for tensor in drawn[0]))
    directory = directory_of(case, tables)
    workspace = PlanWorkspace.make(
        num_items=case.queries, num_branches=1, world_size=case.world, device=DEVICE,
        num_units=len(tables.owners) * case.block_tokens,
    )  # fmt: skip
    out = Plan.make(
        num_items=case.queries, num_listed=case.listed, world_size=case.world, num_forms=1,
        device=DEVICE,
    )  # fmt: skip

    def launch() -> None:
        plan(tables.units, directory, prices, workspace, rank=case.rank, hidden=tables.hidden,
             fill=tables.fill, out=out)  # fmt: skip

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for other in drawn * 2:
        tables.units.copy_(other.units)
        tables.hidden.copy_(other.hidden)
        for tensor in out:
            tensor.fill_(POISON)
        graph.replay()
        got = Plan(*(tensor.cpu() for tensor in out))
        now = drawn[0]._replace(units=other.units, hidden=other.hidden)
        check(case, now, got, ("A",), fill=True)
