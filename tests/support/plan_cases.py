"""Selections for the plan kernels: a case, what the plan is by definition, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qroam.kernels.decide import PlanMode, PriceTable
from qroam.kernels.plan import BlockTable, Plan, PlanWorkspace, plan
from qroam.partition.layout import Form
from qroam.runtime.cost import predicate
from qroam.runtime.cost.predicate import Way
from qroam.runtime.cpu import plan as definition

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


POISON = 0x5A


@dataclass(frozen=True, kw_only=True)
class Case:
    """A selection (N, K) over a corpus, and who holds what."""

    queries: int
    listed: int
    branches: int = 1
    world: int = 4
    rank: int = 1
    block_tokens: int = 16
    unit_tokens: int = 1
    blocks: int = 12
    copies: int = 1
    padding: float = 0.2
    seed: int = 0

    def draw(self) -> Drawn:
        g = torch.Generator().manual_seed(self.seed)
        per_block = self.block_tokens // self.unit_tokens
        keys = self.blocks * self.branches
        items = self.queries * self.branches

        def chance(p: float, *shape: int) -> Tensor:
            return torch.rand(*shape, generator=g) < p

        # Queries draw from a part of the corpus, so that they share units.
        order = torch.rand(self.queries, self.branches, self.blocks * per_block, generator=g)
        order[:, :, self.blocks * per_block // 2 :] += 0.5
        ids = order.argsort(-1)[..., : self.listed]
        block, offset = ids // per_block, ids % per_block * self.unit_tokens
        branch = torch.arange(self.branches)[:, None]
        stored = (block * self.branches + branch) * self.block_tokens + offset
        stored = torch.where(chance(self.padding, *stored.shape), -1, stored)
        owners = torch.stack(
            [torch.randperm(self.world, generator=g)[: self.copies] for _ in range(keys)]
        )
        owners[-self.branches :] = -1  # the last block belongs to no document
        tokens = torch.randint(1, self.block_tokens + 1, (self.blocks,), generator=g)
        tokens[-1] = 0
        held = (owners == self.rank).any(1) | chance(0.1, keys)
        slots = torch.where(held, held.cumsum(0) - 1, -1)
        start = torch.randint(self.blocks * self.block_tokens, (items,), generator=g)
        return Drawn(
            units=stored.flatten(0, 1).int(),
            hidden=torch.stack((start, start + torch.randint(6, (items,), generator=g)), 1).int(),
            owners=owners.int(),
            generations=torch.randint(5, (keys,), generator=g).int(),
            tokens=tokens.int(),
            slot_of=slots.int(),
            fill=torch.randint(0, self.block_tokens + 1, (int(held.sum()) + 1,), generator=g).int(),
        )


class Drawn(NamedTuple):
    units: Tensor
    hidden: Tensor
    owners: Tensor
    generations: Tensor
    tokens: Tensor
    slot_of: Tensor
    fill: Tensor


def directory_of(case: Case, drawn: Drawn) -> BlockTable:
    return BlockTable.of(
        drawn.owners, drawn.generations, drawn.tokens, drawn.slot_of, rank=case.rank,
        block_tokens=case.block_tokens, num_branches=case.branches,
    )  # fmt: skip


def defined(case: Case, drawn: Drawn) -> definition.Wanted:
    sizes = {"block_tokens": case.block_tokens, "num_branches": case.branches}
    entries, visible = definition.unit_entries(
        drawn.units, drawn.hidden, unit_tokens=case.unit_tokens, **sizes
    )
    keys = (drawn.units.long() // case.block_tokens).clamp(0, len(drawn.slot_of) - 1)
    return definition.want(
        drawn.units,
        entries,
        visible,
        definition.existing(entries, visible, drawn.tokens, **sizes),
        (drawn.units >= 0) & (drawn.slot_of[keys] >= 0),
        drawn.owners,
        rank=case.rank,
        world_size=case.world,
        block_tokens=case.block_tokens,
    )


class Run(NamedTuple):
    plan: Plan
    workspace: PlanWorkspace


def run(
    case: Case,
    drawn: Drawn,
    prices: PriceTable,
    *,
    mode: PlanMode,
    way: Tensor | None = None,
    workspace: PlanWorkspace | None = None,
    fill: bool = True,
) -> Run:
    items, listed = drawn.units.shape
    num_units = len(drawn.owners) * case.block_tokens // case.unit_tokens
    if workspace is None:
        workspace = PlanWorkspace.make(
            num_items=items, num_branches=case.branches, num_units=num_units,
            world_size=case.world, device=DEVICE,
        )  # fmt: skip
        for scratch in (workspace.demand, workspace.reps, workspace.seats):
            scratch.fill_(-7)
    out = Plan.make(
        num_items=items, num_listed=listed, world_size=case.world, num_forms=prices.num_forms,
        device=DEVICE,
    )  # fmt: skip
    for tensor in out:
        tensor.fill_(POISON)
    if way is not None:
        out.way.copy_(way)
    on_device = Drawn(*(tensor.to(DEVICE) for tensor in drawn))
    directory = directory_of(case, on_device)
    result = plan(
        on_device.units, directory, prices, workspace, rank=case.rank, mode=mode, out=out,
        unit_tokens=case.unit_tokens, hidden=on_device.hidden,
        fill=on_device.fill if fill else None,
    )  # fmt: skip
    assert result is out
    assert not bool(workspace.listers.any()), "the bits are left as they were found"
    return Run(Plan(*(tensor.cpu() for tensor in out)), workspace)


def check(case: Case, drawn: Drawn, got: Plan, forms: tuple[Form, ...], *, fill: bool) -> None:
    """Everything in a plan, given its ways, against the definition."""
    wanted = defined(case, drawn)
    demand = wanted.demand
    assert torch.equal(got.pairs_units.long(), demand.pairs_units)
    assert torch.equal(got.unique_units.long(), demand.unique_units)
    most = case.listed * 2.0**-29 + 1e-9
    assert torch.allclose(got.fair_units, demand.fair_units, rtol=0, atol=most)
    check_expected(case, drawn, wanted, got)
    for f, form in enumerate(forms):
        check_routes(case, drawn, wanted, got, f, form)
    check_fetch(case, wanted, got)
    check_local(case, drawn, wanted, got, fill=fill)


def check_expected(case: Case, drawn: Drawn, wanted: definition.Wanted, got: Plan) -> None:
    """All columns at once: as if every pair, the own one too, were routed."""
    everywhere = torch.full((len(drawn.units), case.world), int(Way.ROUTE_A), dtype=torch.int8)
    lists = definition.route(
        wanted, everywhere, Way.ROUTE_A, drawn.generations, block_tokens=case.block_tokens
    )
    used = int(lists.pairs.sum())
    holder = torch.arange(case.world).repeat_interleave(lists.pairs)
    mine = got.expected[lists.items[:used], holder]
    assert torch.equal(mine, lists.expected[:used])
    assert int(got.expected[..., 0].sum()) == int(lists.expected[:used, 0].sum())


def check_routes(
    case: Case, drawn: Drawn, wanted: definition.Wanted, got: Plan, f: int, form: Form
) -> None:
    lists = definition.route(
        wanted, got.way, predicate.way_of(form), drawn.generations, block_tokens=case.block_tokens
    )
    assert torch.equal(got.pairs[f].long(), lists.pairs)
    assert torch.equal(got.listed[f].long(), lists.listed)
    pairs, listed = int(lists.pairs.sum()), int(lists.listed.sum())
    assert torch.equal(got.items[f, :pairs].long(), lists.items[:pairs])
    assert torch.equal(got.units_of[f, :pairs].long(), lists.units_of[:pairs])
    expected = got.items_expected[f, :pairs]
    assert torch.equal(expected, lists.expected[:pairs])
    assert torch.equal(got.route_units[f, :listed], lists.units[:listed])
    for tensor, used in (
        (got.items, pairs),
        (got.units_of, pairs),
        (got.items_expected, pairs),
        (got.route_units, listed),
    ):
        poison = torch.full_like(tensor[f, used:], 0).fill_(POISON)
        assert torch.equal(tensor[f, used:], poison), "nothing is written behind the counts"


def check_fetch(case: Case, wanted: definition.Wanted, got: Plan) -> None:
    """The same units per holder; in them, the order of their first fetching listers."""
    fetch = definition.fetch(wanted, got.way, Way.FETCH)
    assert torch.equal(got.counts.long(), fetch.counts)
    total, order = int(fetch.counts.sum()), []
    for holder in range(case.world):
        seen: dict[int, None] = {}
        for n, row in enumerate(wanted.units.tolist()):
            if int(got.way[n, holder]) == Way.FETCH:
                here = wanted.holder[n].tolist()
                seen |= {u: None for u, h in zip(row, here, strict=True) if h == holder}
        order += list(seen)
    assert got.fetch_units[:total].tolist() == order
    assert sorted(order) == sorted(fetch.units[:total].tolist())
    assert torch.equal(got.place >= 0, fetch.place >= 0)
    assert bool((got.place[got.place < 0] == -1).all())
    at = got.place.clamp(min=0).long()
    assert torch.equal(got.fetch_units[at][got.place >= 0], wanted.units[got.place >= 0])


def check_local(
    case: Case, drawn: Drawn, wanted: definition.Wanted, got: Plan, *, fill: bool
) -> None:
    for n, (row, here) in enumerate(
        zip(wanted.units.tolist(), wanted.holder.tolist(), strict=True)
    ):
        local = []
        for k, (unit, holder) in enumerate(zip(row, here, strict=True)):
            if unit < 0 or holder != case.rank:
                continue
            slot, offset = int(drawn.slot_of[unit // case.block_tokens]), unit % case.block_tokens
            if not fill:
                local.append(unit)
                continue
            shown = case.unit_tokens > 1 or bool(wanted.visible[n, k, 0])
            there = slot >= 0 and offset < int(drawn.fill[slot]) and shown
            local.append(slot * case.block_tokens + offset if there else -1)
        length = int(got.local_lengths[n])
        assert got.local_units[n, :length].tolist() == local


def named(case: Case) -> str:
    return (
        f"{case.queries}x{case.branches}x{case.listed}-W{case.world}-U{case.unit_tokens}"
        f"-pad{case.padding}"
    )
