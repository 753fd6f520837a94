"""Fetch and compose, with the regions of several ranks in one process: bitwise, faults included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from qroam.kernels.coverage import coverage, mix
from qroam.kernels.decide import FETCH, LOCAL, ROUTE
from qroam.kernels.pool_layout import PoolLayout

pytest.importorskip("triton")
from qroam.kernels.fetch import compose, fetch
from qroam.kernels.plan import Plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
POISON = torch.iinfo(torch.int32).max
SMALL = PoolLayout(layers=3, keys=21, slots=10, block_tokens=8, entry_bytes=656, staged=200)
RANK = 0  # who fetches


class Region:
    """One rank's memory, random bytes but for its tables, and views of those."""

    def __init__(self, pool: PoolLayout, seed: int) -> None:
        """A random part of the keys in random slots, filled to random lengths."""
        g = torch.Generator().manual_seed(seed)
        self.pool = pool
        self.memory = torch.randint(256, (pool.num_bytes,), generator=g, dtype=torch.uint8)
        self.memory = self.memory.to(DEVICE)
        self.slot_of = self._table(pool.slot_of, pool.keys)
        self.generation = self._table(pool.generation, pool.slots)
        self.fill = self._table(pool.fill, pool.layers * pool.slots).view(pool.layers, pool.slots)
        held = min(pool.slots, pool.keys)
        self.slot_of.fill_(-1)
        keys = torch.randperm(pool.keys, generator=g)[:held].to(DEVICE)
        self.slot_of[keys] = torch.randperm(pool.slots, generator=g)[:held].int().to(DEVICE)
        generations = torch.randint(1, 9, self.generation.shape, generator=g, dtype=torch.int32)
        fills = torch.randint(1, pool.block_tokens + 1, self.fill.shape, generator=g)
        self.generation.copy_(generations)
        self.fill.copy_(fills)

    def _table(self, first: int, numbers: int) -> Tensor:
        return self.memory[first : first + 4 * numbers].view(torch.int32)

    def rows(self, layer: int) -> Tensor:
        """All rows from the layer's first one on."""
        return self.memory[self.pool.entries_of(layer) :].view(-1, self.pool.entry_bytes)

    def find(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of ids of any shape: whether they are there, their entry index and generation."""
        pool, ids = self.pool, ids.long()
        key, offset = ids.div(pool.block_tokens, rounding_mode="floor"), ids % pool.block_tokens
        known = (ids >= 0) & (key < pool.keys)
        slot = torch.where(known, self.slot_of[torch.where(known, key, 0)].long(), -1)
        placed = (slot >= 0) & (slot < pool.slots)
        slot = torch.where(placed, slot, 0)
        there = placed & (offset < self.fill[layer, slot])
        return there, slot * pool.block_tokens + offset, self.generation[slot]


def world_of(pool: PoolLayout, world: int, seed: int = 0) -> tuple[list[Region], Tensor]:
    regions = [Region(pool, 100 * seed + rank) for rank in range(world)]
    return regions, torch.tensor([r.memory.data_ptr() for r in regions], device=DEVICE)


def planned(
    regions: list[Region], layer: int, *, items: int, listed: int, seed: int = 0, absent: bool
) -> Plan:
    """A plan of rank 0 for random lists, with padding; capacity beyond the counts is poisoned.

    A key is asked of one rank; without `absent` only what is there is listed.
    """
    g = torch.Generator().manual_seed(seed)
    pool, world = regions[0].pool, len(regions)
    holders = torch.randint(world, (pool.keys,), generator=g).to(DEVICE)
    num_ids = pool.keys * pool.block_tokens
    ids = torch.stack([torch.randperm(num_ids, generator=g)[:listed] for _ in range(items)])
    ids = torch.where(torch.rand(ids.shape, generator=g) < 0.1, -1, ids).to(DEVICE)
    holder = torch.where(ids >= 0, holders[ids.clamp(min=0) // pool.block_tokens], world)
    found = [region.find(layer, ids) for region in regions]
    if not absent:
        here = torch.stack([there for there, _, _ in found] + [ids < 0])
        holder = torch.where(here.gather(0, holder[None])[0], holder, world)
    way = torch.where(torch.rand(items, world, generator=g) < 0.8, FETCH, ROUTE).to(DEVICE)
    if world > 2:
        way[:, 2] = ROUTE  # nothing is fetched from it
    way[:, RANK] = LOCAL
    plan = Plan.make(
        num_items=items, num_listed=listed, world_size=world, num_forms=1, device=DEVICE
    )
    plan.way.copy_(way)
    for tensor in (plan.fetch_units, plan.local_units):
        tensor.fill_(POISON)
    plan.place.fill_(-1)
    start = 0
    for rank, (there, index, generation) in enumerate(found):
        asked = holder == rank
        plan.expected[:, rank] = coverage(ids, generation, asked & there)
        if rank == RANK:
            plan.counts[rank] = 0
            plan.local_lengths.copy_(asked.sum(1))
            for n in range(items):
                index_or_not = torch.where(there[n], index[n], -1)[asked[n]]
                plan.local_units[n, : len(index_or_not)] = index_or_not.int()
            continue
        asked &= (way[:, rank] == FETCH)[:, None]
        distinct = ids[asked].unique()
        distinct = distinct[torch.randperm(len(distinct), generator=g).to(DEVICE)]
        order = distinct.argsort()
        plan.place[asked] = (start + order[torch.searchsorted(distinct[order], ids[asked])]).int()
        plan.fetch_units[start : start + len(distinct)] = distinct.int()
        plan.counts[rank] = len(distinct)
        start += len(distinct)
    return plan


class Result(NamedTuple):
    came: Tensor
    units: Tensor
    lengths: Tensor
    fault: Tensor


def fetched(
    regions: list[Region],
    peers: Tensor,
    layer: int,
    plan: Plan,
    *,
    uses: Sequence[Tensor | None] = (None, None),
) -> Result:
    """Both launches on rank 0, what they write to poisoned; each with its `uses`."""
    items, listed = plan.place.shape
    shapes = ((items * listed, 2), (items, listed), (items,), (items,))
    result = Result(*(torch.full(s, POISON, dtype=torch.int32, device=DEVICE) for s in shapes))
    own = regions[RANK]
    fetch(
        own.pool,
        layer,
        peers,
        plan.fetch_units,
        plan.counts,
        memory=own.memory,
        came=result.came,
        uses=uses[0],
    )
    compose(
        own.pool,
        layer,
        plan,
        result.came,
        rank=RANK,
        units=result.units,
        lengths=result.lengths,
        fault=result.fault,
        uses=uses[1],
    )
    return result


def due(regions: list[Region], layer: int, plan: Plan) -> tuple[Tensor, Tensor]:
    """What `came` and rank 0's memory must be, the latter if it is so before."""
    pool = regions[RANK].pool
    came = torch.full((len(plan.fetch_units), 2), POISON, dtype=torch.int32, device=DEVICE)
    memory = regions[RANK].memory.clone()
    staged = memory[pool.entries_of(pool.layers) :].view(-1, pool.entry_bytes)
    start = 0
    for region, count in zip(regions, plan.counts.tolist(), strict=True):
        ids = plan.fetch_units[start : start + count]
        there, index, generation = region.find(layer, ids)
        mixed = torch.where(there, mix(ids, generation), 0)
        came[start : start + count] = torch.stack([there.int(), mixed], 1)
        staged[start : start + count][there] = region.rows(layer)[index[there]]
        start += count
    return came, memory


def check_lists(pool: PoolLayout, layer: int, plan: Plan, result: Result) -> None:
    for n, place in enumerate(plan.place.tolist()):
        want = plan.local_units[n, : plan.local_lengths[n]].tolist()
        for seat in filter(lambda seat: seat >= 0, place):
            want.append(pool.first_staged(layer) + seat if result.came[seat, 0] else -1)
        assert int(result.lengths[n]) == len(want)
        assert result.units[n, : len(want)].tolist() == want
        assert bool((result.units[n, len(want) :] == POISON).all())


@pytest.mark.parametrize("entry_bytes", [656, 1152, 2304, 16, 8208])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_rows_come_bitwise_and_nothing_else_is_written(world: int, entry_bytes: int) -> None:
    pool = replace(SMALL, entry_bytes=entry_bytes)
    layer = world % pool.layers
    regions, peers = world_of(pool, world)
    plan = planned(regions, layer, items=3, listed=50, absent=True)
    came, memory = due(regions, layer, plan)
    others = [region.memory.clone() for region in regions[1:]]
    result = fetched(regions, peers, layer, plan)
    assert torch.equal(result.came, came)
    assert torch.equal(regions[RANK].memory, memory)
    assert all(torch.equal(r.memory, o) for r, o in zip(regions[1:], others, strict=True))
    check_lists(pool, layer, plan, result)
    assert world == 1 or 0 < int(plan.counts.sum()) < len(plan.fetch_units)
    assert not bool(result.fault.any())  # what is not there is not expected


@pytest.mark.parametrize(("items", "listed"), [(1, 1), (1, 7), (8, 64), (2, 100)])
def test_lists_reach_the_rows_from_their_layer_on(items: int, listed: int) -> None:
    for layer in range(SMALL.layers):
        pool = replace(SMALL, staged=items * listed)
        regions, peers = world_of(pool, 4, seed=items)
        plan = planned(regions, layer, items=items, listed=listed, seed=layer, absent=False)
        result = fetched(regions, peers, layer, plan)
        check_lists(pool, layer, plan, result)
        assert not bool(result.fault.any())
        for n in range(items):
            seats = plan.place[n][plan.place[n] >= 0].long()
            ids = plan.fetch_units[seats]
            from_1, from_3 = (
                regions[h].rows(layer)[regions[h].find(layer, ids)[1]] for h in (1, 3)
            )
            want = torch.where((seats < plan.counts[1])[:, None], from_1, from_3)
            own = int(plan.local_lengths[n])
            index = result.units[n, own : int(result.lengths[n])].long()
            assert torch.equal(regions[RANK].rows(layer)[index], want)


@pytest.mark.parametrize("world", [1, 3])
def test_what_comes_and_what_is_read_are_counted(world: int) -> None:
    regions, peers = world_of(SMALL, world)
    plan = planned(regions, 1, items=3, listed=60, absent=True)
    fetches = torch.arange(SMALL.keys, dtype=torch.int32, device=DEVICE)
    reads = torch.arange(4, dtype=torch.int32, device=DEVICE)  # of the last slots
    counted = [fetches.clone(), reads.clone()]
    result = fetched(regions, peers, 1, plan, uses=counted)
    total = int(plan.counts.sum())
    keys = plan.fetch_units[:total][result.came[:total, 0] == 1] // SMALL.block_tokens
    slots = torch.cat([u[:n] for u, n in zip(plan.local_units, plan.local_lengths, strict=True)])
    slots = slots[slots >= 0] // SMALL.block_tokens - (SMALL.slots - len(reads))
    assert bool((slots < 0).any())
    assert bool((slots >= 0).any())
    assert world == 1 or 0 < len(keys) < total
    assert torch.equal(counted[0], fetches + keys.bincount(minlength=len(fetches)))
    assert torch.equal(counted[1], reads + slots[slots >= 0].bincount(minlength=len(reads)))
    plain = fetched(regions, peers, 1, plan)
    assert all(map(torch.equal, result, plain))


def test_counts_of_zero() -> None:
    regions, peers = world_of(SMALL, 2)
    plan = planned(regions, 1, items=2, listed=20, absent=False)
    plan.place.fill_(-1)
    plan.counts.zero_()
    plan.way.fill_(LOCAL)
    before = regions[RANK].memory.clone()
    result = fetched(regions, peers, 1, plan)
    assert torch.equal(regions[RANK].memory, before)
    assert bool((result.came == POISON).all())
    assert not bool(result.fault.any())
    assert torch.equal(result.lengths, plan.local_lengths)


def spoil(region: Region, layer: int, unit: int, how: str) -> None:
    """Make the holder's tables differ from what was expected of this entry's block."""
    key, offset = divmod(unit, region.pool.block_tokens)
    slot = int(region.slot_of[key])
    match how:
        case "absent":
            region.slot_of[key] = -1
        case "beyond the slots":
            region.slot_of[key] = region.pool.slots
        case "not written":
            region.fill[layer, slot] = offset
        case "stale":
            region.generation[slot] += 1


@pytest.mark.parametrize("how", ["absent", "beyond the slots", "not written", "stale"])
def test_an_entry_that_is_not_the_expected_one_is_a_fault_of_its_holder(how: str) -> None:
    layer = 2
    regions, peers = world_of(SMALL, 4, seed=1)
    plan = planned(regions, layer, items=4, listed=30, absent=False)
    seat = int(plan.counts[:3].sum())  # the first that rank 3 is asked for
    spoil(regions[3], layer, int(plan.fetch_units[seat]), how)
    came, memory = due(regions, layer, plan)
    result = fetched(regions, peers, layer, plan)
    assert torch.equal(result.came, came)
    assert torch.equal(regions[RANK].memory, memory)
    assert bool(result.came[seat, 0]) == (how == "stale")
    check_lists(SMALL, layer, plan, result)
    lists_it = (plan.place == seat).any(1)
    assert bool(lists_it.any())
    for n in range(4):
        asked = plan.fetch_units[plan.place[n][plan.place[n] >= seat].long()]
        there, _, generation = regions[3].find(layer, asked)
        got = coverage(asked, generation, there)
        differs = not torch.equal(got, plan.expected[n, 3]) and int(plan.way[n, 3]) == FETCH
        assert int(result.fault[n]) == (4 if differs else 0)
        assert differs >= bool(lists_it[n])


@pytest.mark.parametrize("unit", [SMALL.keys * SMALL.block_tokens, POISON, -1, -POISON - 1])
def test_ids_beyond_the_directory_do_not_come(unit: int) -> None:
    regions, peers = world_of(SMALL, 2)
    plan = planned(regions, 0, items=2, listed=20, absent=False)
    seat = int(plan.place.max())
    plan.fetch_units[seat] = unit
    before = regions[RANK].memory.clone()
    result = fetched(regions, peers, 0, plan)
    assert result.came[seat].tolist() == [0, 0]
    row = regions[RANK].rows(0)[SMALL.first_staged(0) + seat]
    assert torch.equal(row, before[SMALL.entries_of(3) :].view(-1, 656)[seat])
    assert torch.equal(result.fault, 2 * (plan.place == seat).any(1).int())


def test_a_local_entry_that_is_missing_is_a_fault_of_this_rank() -> None:
    regions, peers = world_of(SMALL, 2)
    plan = planned(regions, 0, items=3, listed=40, absent=False)
    plan.local_units[1, 0] = -1
    result = fetched(regions, peers, 0, plan)
    assert result.fault.tolist() == [0, 1 + RANK, 0]
    check_lists(SMALL, 0, plan, result)


def test_bad_arguments() -> None:
    regions, peers = world_of(SMALL, 2)
    plan = planned(regions, 0, items=2, listed=20, absent=False)
    came = torch.zeros(40, 2, dtype=torch.int32, device=DEVICE)
    pull: dict[str, Any] = {
        "pool": SMALL,
        "layer": 0,
        "peers": peers,
        "units": plan.fetch_units,
        "counts": plan.counts,
        "memory": regions[RANK].memory,
        "came": came,
    }
    many = torch.zeros(201, dtype=torch.int32, device=DEVICE)
    odd = torch.zeros(SMALL.num_bytes + 8, dtype=torch.uint8, device=DEVICE)[8:]
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"layer must be in \[0, 3\), got 3", {"layer": 3}),
        (r"layer must be in \[0, 3\), got -1", {"layer": -1}),
        (r"peers must be \(2,\) torch.int64", {"peers": peers.int()}),
        (r"peers must be \(2,\)", {"peers": peers[:1]}),
        ("units must be", {"units": plan.fetch_units.long()}),
        ("counts must be", {"counts": plan.counts.long()}),
        ("counts must be of 1 to 64 ranks, got 65", {"counts": many[:65]}),
        (r"memory must be \(\d+,\) torch.uint8", {"memory": regions[RANK].memory[1:]}),
        ("multiple of 16 bytes", {"memory": odd}),
        (r"came must be \(40, 2\)", {"came": came[1:]}),
        (r"uses must be \(21,\) torch.int32", {"uses": many}),
        (
            "as many as staged rows, 200, got 201",
            {"units": many, "came": torch.zeros(201, 2, dtype=torch.int32, device=DEVICE)},
        ),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            fetch(**pull | change)

    listing: dict[str, Any] = {
        "pool": SMALL,
        "layer": 0,
        "plan": plan,
        "came": came,
        "rank": 0,
        "units": torch.zeros(2, 20, dtype=torch.int32, device=DEVICE),
        "lengths": plan.local_lengths.clone(),
        "fault": plan.local_lengths.clone(),
    }
    cases = [
        (r"layer must be in \[0, 3\), got 3", {"layer": 3}),
        (r"rank must be in \[0, 2\), got 2", {"rank": 2}),
        (r"came must be \(40, 2\)", {"came": came[1:]}),
        (r"units must be \(None, None\) torch.int32", {"units": came.long()}),
        (r"way must be \(1, 2\)", {"units": torch.zeros(1, 20, dtype=torch.int32, device=DEVICE)}),
        (r"place must be \(2, 20\)", {"plan": plan._replace(place=plan.place[:1])}),
        (r"lengths must be \(2,\)", {"lengths": came[:, 0]}),
        (r"fault must be \(2,\)", {"fault": came}),
        ("uses may be of 10 slots, got 11", {"uses": many[:11]}),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            compose(**listing | change)


BIG = PoolLayout(
    layers=2, keys=8192, slots=2048, block_tokens=64, entry_bytes=1152, staged=64 * 2048
)  # fmt: skip


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("entry_bytes", [656, 1152, 2304])
def test_full_size(entry_bytes: int) -> None:
    pool = replace(BIG, entry_bytes=entry_bytes)
    regions, peers = world_of(pool, 4)
    plan = planned(regions, 1, items=64, listed=2048, absent=True)
    came, memory = due(regions, 1, plan)
    result = fetched(regions, peers, 1, plan)
    assert torch.equal(result.came, came)
    assert torch.equal(regions[RANK].memory, memory)
    check_lists(pool, 1, plan, result)
    assert not bool(result.fault.any())


@pytest.mark.gpu
@needs_gpu
def test_replay_follows_the_counts_on_the_device() -> None:
    regions, peers = world_of(BIG, 2)
    static, *plans = (
        planned(regions, 1, items=4, listed=2048, seed=s, absent=False) for s in range(4)
    )
    result = fetched(regions, peers, 1, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fetched(regions, peers, 1, static)
    for plan in plans:
        for to, given in zip(static, plan, strict=True):
            to.copy_(given)
        came, memory = due(regions, 1, static)
        graph.replay()
        assert torch.equal(result.came, came)
        assert torch.equal(regions[RANK].memory, memory)
        assert not bool(result.fault.any())
