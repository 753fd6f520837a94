"""The plan against straightforward Python loops, without host reads, and blind to unused capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_loopback
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qroam.kernels import reference
from qroam.kernels.coverage import mix
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig, load_profile
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.predicate import Mode, Way, decide
from qroam.runtime.cpu import plan
from qroam.runtime.stores import entry_codec
from qroam.runtime.transport.base import Transport

B = 4  # tokens of a block
WAYS = (Way.ROUTE_A, Way.ROUTE_B, Way.FETCH)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A selection over a small corpus: ids (Q, K) or (Q, G, K), and who holds what."""

    ids: Tensor
    hidden: Tensor
    unit_tokens: int
    branches: int
    world: int
    rank: int
    tokens: Tensor
    owners: Tensor
    generations: Tensor
    local: Tensor
    way: Tensor

    @property
    def sizes(self) -> dict[str, int]:
        return {"block_tokens": B, "num_branches": self.branches}

    def stored(self) -> tuple[Tensor, int]:
        return plan.stored_units(self.ids, unit_tokens=self.unit_tokens, **self.sizes)

    def wanted(self) -> plan.Wanted:
        units, unit_tokens = self.stored()
        hidden = self.hidden.repeat_interleave(self.branches, 0)
        entries, visible = plan.unit_entries(units, hidden, unit_tokens=unit_tokens, **self.sizes)
        return plan.want(
            units,
            entries,
            visible,
            plan.existing(entries, visible, self.tokens, **self.sizes),
            self.local,
            self.owners,
            rank=self.rank,
            world_size=self.world,
            block_tokens=B,
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    branches, world = draw(st.sampled_from((1, 2))), draw(st.integers(1, 4))
    unit_tokens = draw(st.sampled_from((1, 2, B, 2 * B)))
    queries, listed, blocks = draw(st.integers(0, 4)), draw(st.integers(0, 4)), 6
    copies = draw(st.integers(1, min(2, world)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    num_units = blocks * B // unit_tokens
    shape = (queries, branches) if draw(st.booleans()) else (queries,)
    unit_order = torch.rand(*shape, num_units, generator=g).argsort(-1)
    ids = unit_order[..., :listed]
    ids = torch.where(torch.rand(ids.shape, generator=g) < 0.3, -1, ids).to(torch.int32)
    start = torch.randint(blocks * B, (queries,), generator=g)
    hidden = torch.stack((start, start + torch.randint(3, (queries,), generator=g)), dim=1)
    owners = torch.stack(
        [torch.randperm(world, generator=g)[:copies] for _ in range(blocks * branches)]
    )
    used = blocks - draw(st.integers(0, 2))  # the last blocks may belong to no document
    owners[used * branches :] = -1
    tokens = torch.randint(1, B + 1, (blocks,), generator=g)
    tokens[used:] = 0
    items = queries * branches
    stored_listed = ids.shape[-1] * max(unit_tokens // B, 1)
    return Case(
        ids=ids,
        hidden=hidden.to(torch.int32),
        unit_tokens=unit_tokens,
        branches=branches,
        world=world,
        rank=draw(st.integers(0, world - 1)),
        tokens=tokens.to(torch.int32),
        owners=owners.to(torch.int32),
        generations=torch.randint(3, (blocks * branches,), generator=g).to(torch.int32),
        local=torch.rand(items, stored_listed, generator=g) < 0.3,
        way=torch.randint(0, len(Way), (items, world), generator=g).to(torch.int8),
    )


def rows_of(case: Case) -> list[list[int]]:
    """Unit ids of each item, query-major."""
    ids = case.ids if case.ids.dim() == 3 else case.ids[:, None].expand(-1, case.branches, -1)
    return [row for query in ids.tolist() for row in query]


def loop_units(case: Case) -> list[list[int]]:
    """Stored id of each unit's first entry; a unit larger than a block becomes its blocks."""
    found = []
    for item, row in enumerate(rows_of(case)):
        branch, stored = item % case.branches, []
        for unit in row:
            for part in range(max(case.unit_tokens // B, 1)):
                entry = unit * case.unit_tokens + part * B
                key = entry // B * case.branches + branch
                stored.append(-1 if unit < 0 else key * B + entry % B)
        found.append(stored)
    return found


@given(case=cases())
def test_stored_units(case: Case) -> None:
    units, unit_tokens = case.stored()
    assert unit_tokens == min(case.unit_tokens, B)
    assert units.dtype == torch.int32
    assert units.tolist() == loop_units(case)


@given(case=cases())
def test_entries_visible_and_existing(case: Case) -> None:
    wanted = case.wanted()
    width = min(case.unit_tokens, B)
    for item, row in enumerate(loop_units(case)):
        low, high = case.hidden[item // case.branches].tolist()
        for k, unit in enumerate(row):
            for offset in range(width):
                stored = unit + offset if unit >= 0 else -1
                block = stored // B // case.branches
                entry = block * B + stored % B
                seen = unit >= 0 and not low <= entry < high
                there = seen and stored % B < int(case.tokens[block])
                assert int(wanted.entries[item, k, offset]) == stored
                assert bool(wanted.visible[item, k, offset]) == seen
                assert bool(wanted.exists[item, k, offset]) == there


def loop_holders(case: Case) -> list[list[int]]:
    """Who is asked for each unit; the world size where nobody is."""
    copies = case.owners.shape[1]
    found = []
    for item, row in enumerate(loop_units(case)):
        holders = []
        for k, unit in enumerate(row):
            holder = int(case.owners[max(unit, 0) // B, case.rank % copies])
            if bool(case.local[item, k]):
                holder = case.rank
            holders.append(holder if unit >= 0 and holder >= 0 else case.world)
        found.append(holders)
    return found


@given(case=cases())
def test_holders_and_demand(case: Case) -> None:
    wanted, units, holders = case.wanted(), loop_units(case), loop_holders(case)
    assert wanted.holder.tolist() == holders
    lists: dict[int, list[tuple[int, int]]] = {w: [] for w in range(case.world)}
    for item, row in enumerate(holders):
        for k, holder in enumerate(row):
            if holder < case.world:
                lists[holder].append((item, units[item][k]))
    demand = wanted.demand
    for holder, listed in lists.items():
        ids = [unit for _, unit in listed]
        away = holder != case.rank
        assert int(demand.unique_units[holder]) == (len(set(ids)) if away else 0)
        for item in range(len(units)):
            mine = [unit for i, unit in listed if i == item]
            assert int(demand.pairs_units[item, holder]) == len(mine)
            fair = sum(1 / ids.count(unit) for unit in mine) if away else 0.0
            assert float(demand.fair_units[item, holder]) == pytest.approx(fair, abs=1e-12)


@pytest.mark.parametrize("form", [Way.ROUTE_A, Way.ROUTE_B], ids=lambda way: way.name)
@given(case=cases())
def test_route_lists(form: Way, case: Case) -> None:
    wanted, units, holders = case.wanted(), loop_units(case), loop_holders(case)
    lists = plan.route(wanted, case.way, form, case.generations, block_tokens=B)
    items, counts, expected, listed = [], [], [], []
    pairs, per_holder = [0] * case.world, [0] * case.world
    for holder in range(case.world):
        for item, row in enumerate(holders):
            mine = [k for k, h in enumerate(row) if h == holder]
            if not mine or int(case.way[item, holder]) != form:
                continue
            there = wanted.exists[item, mine]
            ids = wanted.entries[item, mine][there]
            generations = case.generations[ids.long() // B]
            mixed = int(mix(ids, generations).sum()) % 2**32
            items.append(item)
            counts.append(len(mine))
            expected.append([len(ids), mixed - 2**32 * (mixed >= 2**31)])
            listed += [units[item][k] for k in mine]
            pairs[holder] += 1
            per_holder[holder] += len(mine)
    total = sum(pairs)
    assert lists.pairs.tolist() == pairs
    assert lists.listed.tolist() == per_holder
    assert lists.items[:total].tolist() == items
    assert lists.units_of[:total].tolist() == counts
    assert lists.expected[:total].tolist() == expected
    assert lists.units[: sum(per_holder)].tolist() == listed


@given(case=cases())
def test_fetch_list(case: Case) -> None:
    wanted, units, holders = case.wanted(), loop_units(case), loop_holders(case)
    # The plan fetches from others only; `decide` never gives the own column this way.
    way = case.way.clone()
    way[:, case.rank] = Way.LOCAL
    fetch = plan.fetch(wanted, way, Way.FETCH)
    fetched: list[tuple[int, int]] = sorted(
        {
            (holder, units[item][k])
            for item, row in enumerate(holders)
            for k, holder in enumerate(row)
            if holder < case.world and int(way[item, holder]) == Way.FETCH
        }
    )
    total = int(fetch.counts.sum())
    assert fetch.units[:total].tolist() == [unit for _, unit in fetched]
    assert fetch.counts.tolist() == [
        sum(holder == rank for holder, _ in fetched) for rank in range(case.world)
    ]
    for item, row in enumerate(holders):
        for k, holder in enumerate(row):
            asked = holder < case.world and int(way[item, holder]) == Way.FETCH
            place = fetched.index((holder, units[item][k])) if asked else -1
            assert int(fetch.place[item, k]) == place


def test_replicas_are_asked_by_different_ranks() -> None:
    owners = torch.tensor([[0, 2]] * 4, dtype=torch.int32)
    units = torch.arange(0, 4 * B, B, dtype=torch.int32)[None]
    entries, visible = plan.unit_entries(
        units, torch.zeros(1, 2, dtype=torch.int32), unit_tokens=B, block_tokens=B, num_branches=1
    )
    nothing = torch.zeros(1, 4, dtype=torch.bool)

    def asked(rank: int) -> set[int]:
        wanted = plan.want(
            units,
            entries,
            visible,
            visible,
            nothing,
            owners,
            rank=rank,
            world_size=4,
            block_tokens=B,
        )
        return set(wanted.holder.flatten().tolist())

    assert (asked(1), asked(3)) == ({2}, {2})
    wide = torch.tensor([[0, 1, 2]] * 4, dtype=torch.int32)
    owners = wide
    assert [asked(rank) for rank in (3, 4, 5)] == [{0}, {1}, {2}]


@pytest.mark.parametrize("unit_tokens", [1, 2, 2 * B])
@pytest.mark.parametrize("mode", ["auto", "random", "always-fetch", "always-route"])
def test_plan_and_merge_run_without_data(mode: Mode, unit_tokens: int) -> None:
    """Under FakeTensorMode a shape that depends on data, or a value read to the host, raises."""
    queries, listed, world, blocks = 5, 7, 4, 16
    layout = named_layout("mla-tiny")
    facts = LayerFacts.of(layout, entry_bytes=entry_codec(layout).entry_bytes, element_bytes=4)
    with FakeTensorMode():
        units, width = plan.stored_units(
            torch.empty(queries, listed, dtype=torch.int32),
            unit_tokens=unit_tokens,
            block_tokens=B,
            num_branches=1,
        )
        hidden = torch.empty(queries, 2, dtype=torch.int32)
        entries, visible = plan.unit_entries(
            units, hidden, unit_tokens=width, block_tokens=B, num_branches=1
        )
        tokens = torch.empty(blocks, dtype=torch.int32)
        exists = plan.existing(entries, visible, tokens, block_tokens=B, num_branches=1)
        wanted = plan.want(
            units,
            entries,
            visible,
            exists,
            torch.empty(units.shape, dtype=torch.bool),
            torch.empty(blocks, 2, dtype=torch.int32),
            rank=1,
            world_size=world,
            block_tokens=B,
        )
        decision = decide(
            wanted.demand,
            CostModel(facts=facts, profile=load_profile("nvlink4"), unit_tokens=width),
            rank=1,
            mode=mode,
            forms=("A", "B"),
        )
        generations = torch.empty(blocks, dtype=torch.int32)
        for way in (Way.ROUTE_A, Way.ROUTE_B):
            lists = plan.route(wanted, decision.way, way, generations, block_tokens=B)
            assert lists.items.shape == lists.units_of.shape == (world * queries,)
            assert lists.expected.shape == (world * queries, 2)
            assert lists.units.shape == (units.numel(),)
            assert lists.pairs.shape == lists.listed.shape == (world,)
        fetch = plan.fetch(wanted, decision.way, Way.FETCH)
        assert fetch.units.shape == (units.numel(),)
        assert fetch.place.shape == units.shape
        out, lse = reference.merge(
            torch.empty(world * queries, 4, 8),
            torch.empty(world * queries, 4),
            lists.items,
            queries,
        )
        assert (out.shape, lse.shape) == ((queries, 4, 8), (queries, 4))


def poisoned_route(route: Callable[..., plan.RouteLists]) -> Callable[..., plan.RouteLists]:
    def wrapped(*args: object, **sizes: int) -> plan.RouteLists:
        lists = route(*args, **sizes)
        pairs, listed = int(lists.pairs.sum()), int(lists.listed.sum())
        for tensor, used in (
            (lists.items, pairs),
            (lists.units_of, pairs),
            (lists.expected, pairs),
            (lists.units, listed),
        ):
            tensor[used:] = -(2**30)
        return lists

    return wrapped


def poisoned_fetch(fetch: Callable[..., plan.FetchList]) -> Callable[..., plan.FetchList]:
    def wrapped(*args: object) -> plan.FetchList:
        lists = fetch(*args)
        lists.units[int(lists.counts.sum()) :] = -(2**30)
        return lists

    return wrapped


@pytest.mark.parametrize("mode", ["random", "always-fetch", "always-route"])
def test_unused_capacity_may_hold_anything(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = loopback_outputs(mode)
    monkeypatch.setattr(plan, "route", poisoned_route(plan.route))
    monkeypatch.setattr(plan, "fetch", poisoned_fetch(plan.fetch))
    for poisoned, want in zip(loopback_outputs(mode), clean, strict=True):
        assert torch.equal(poisoned, want)


def loopback_outputs(mode: Mode) -> list[Tensor]:
    """What three ranks get for queries over entries of all of them, some not listed at all."""
    layout = named_layout("mla-tiny")
    config = RuntimeConfig(
        model=uniform_model(layout, 1),
        max_blocks=6,
        block_tokens=B,
        mode=mode,
    )
    g = torch.Generator().manual_seed(3)
    entries = torch.randn(22, layout.entry_dim, generator=g)
    keys = torch.randn(22, 32, generator=g)
    query = torch.randn(3, 5, 4, layout.key_dim, generator=g)
    ids = torch.stack([torch.randperm(22, generator=g)[:9] for _ in range(15)]).to(torch.int32)
    ids[::4, 2:] = -1

    def worker(transport: Transport) -> Tensor:
        with Runtime.open(config, transport) as runtime:
            runtime.add_document("doc", tokens=22)
            runtime.load_document("doc", 0, entries, keys)
            scope = runtime.scope(documents=["doc"], queries=5)
            mine = ids[5 * runtime.rank : 5 * runtime.rank + 5]
            return runtime.attend(0, query[runtime.rank], runtime.selection(mine, scope))

    return run_loopback(3, worker)
