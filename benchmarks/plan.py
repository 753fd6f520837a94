"""From selected units to who is asked for what (`kernels/plan.py`): 2048 units a query, 8 holders.

Units are single entries of a corpus of 262144 in blocks of 64, dealt at random to 8 ranks of which
this is one. Prices are those of NVLink peers, so small batches fetch and large ones route; the
modes that do only one of it show what its lists cost. Beside it stands the plain-torch definition
(`runtime/cpu/plan.py`), captured on the device with the ways given: without the decision.

    python benchmarks/plan.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from gpu import DEVICE, Bench, Variant
from torch import Tensor

from qroam.kernels.decide import FETCH, ROUTE, PlanMode
from qroam.kernels.plan import BlockTable, Plan, PlanWorkspace, plan
from qroam.partition.presets import named_layout
from qroam.runtime import load_profile
from qroam.runtime.cost import predicate
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.predicate import Demand
from qroam.runtime.cost.prices import prices_of
from qroam.runtime.cpu import plan as definition

CORPUS, LISTED, WORLD, RANK, BLOCK_TOKENS = 262144, 2048, 8, 3, 64
_DEFINED_CALLS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    batch: int
    mode: PlanMode = "auto"

    @property
    def name(self) -> str:
        return f"{LISTED} units over {WORLD} holders, B={self.batch}, {self.mode}"

    @property
    def num_bytes(self) -> float:
        """Per listed unit its id, a record, a bit that is set, read and cleared, and its place."""
        return 36 * self.batch * LISTED


CASES = (
    *(Case(batch=batch) for batch in (1, 8, 64, 256)),
    Case(batch=64, mode="always-route"),
    Case(batch=64, mode="always-fetch"),
)


def cost_model() -> CostModel:
    """Of 128 heads of MLA in bf16, over NVLink."""
    facts = LayerFacts.of(named_layout("mla-v3.2"), entry_bytes=1152, element_bytes=2)
    return CostModel(facts=facts, profile=load_profile("nvlink4"), unit_tokens=1)


class Tables(NamedTuple):
    """What `runtime/cpu/plan.py` reads, and `BlockTable.of` takes."""

    owners: Tensor
    generations: Tensor
    tokens: Tensor
    slot_of: Tensor

    def directory(self) -> BlockTable:
        return BlockTable.of(*self, rank=RANK, block_tokens=BLOCK_TOKENS, num_branches=1)


def tables() -> Tables:
    blocks = CORPUS // BLOCK_TOKENS
    owners = torch.randint(0, WORLD, (blocks, 1), dtype=torch.int32, device=DEVICE)
    here = owners[:, 0] == RANK
    return Tables(
        owners=owners,
        generations=torch.randint(0, 99, (blocks,), dtype=torch.int32, device=DEVICE),
        tokens=torch.full((blocks,), BLOCK_TOKENS, dtype=torch.int32, device=DEVICE),
        slot_of=torch.where(here, here.cumsum(0) - 1, -1).to(torch.int32),
    )


def wanted(units: Tensor, tables: Tables) -> definition.Wanted:
    """`runtime/cpu/plan.py` up to the demand; nothing is hidden and every entry exists."""
    hidden = torch.zeros(len(units), 2, dtype=torch.int32)
    entries, visible = definition.unit_entries(
        units, hidden, unit_tokens=1, block_tokens=BLOCK_TOKENS, num_branches=1
    )
    return definition.want(
        units,
        entries,
        visible,
        visible,
        tables.slot_of[units.long() // BLOCK_TOKENS] >= 0,
        tables.owners,
        rank=RANK,
        world_size=WORLD,
        block_tokens=BLOCK_TOKENS,
    )


def lists(
    want: definition.Wanted, way: Tensor, tables: Tables
) -> tuple[definition.RouteLists, definition.FetchList]:
    routed = definition.route(want, way, ROUTE, tables.generations, block_tokens=BLOCK_TOKENS)
    return routed, definition.fetch(want, way, FETCH)


def checked(
    case: Case, given: Sequence[Tensor], tables: Tables
) -> Callable[[Sequence[Plan]], None]:
    on_host = Tables(*(table.cpu() for table in tables))

    def check(results: Sequence[Plan]) -> None:
        for call in (0, len(results) - 1):
            found = Plan(*(tensor.cpu() for tensor in results[call]))
            want = wanted(given[call].cpu(), on_host)
            _same_demand(found, want.demand)
            seen = Demand(found.pairs_units.long(), found.unique_units.long(), found.fair_units)
            model = cost_model()
            assert case.mode != "given"
            way = predicate.decide(seen, model, rank=RANK, mode=case.mode).way
            _same("way", found.way, way)
            _same_lists(found, given[call].cpu(), *lists(want, found.way, on_host))

    return check


def _same_demand(found: Plan, demand: Demand) -> None:
    _same("pairs_units", found.pairs_units, demand.pairs_units)
    _same("unique_units", found.unique_units, demand.unique_units)
    others = [holder for holder in range(WORLD) if holder != RANK]
    off = float((found.fair_units - demand.fair_units)[:, others].abs().max())
    assert off < 1e-4, f"fair shares are off by {off:.1e}"


def _same_lists(
    found: Plan, units: Tensor, routed: definition.RouteLists, fetched: definition.FetchList
) -> None:
    _same("pairs", found.pairs[0], routed.pairs)
    _same("listed", found.listed[0], routed.listed)
    pairs, listed = int(routed.pairs.sum()), int(routed.listed.sum())
    _same("items", found.items[0, :pairs], routed.items[:pairs])
    _same("units_of", found.units_of[0, :pairs], routed.units_of[:pairs])
    _same("items_expected", found.items_expected[0, :pairs], routed.expected[:pairs])
    _same("route_units", found.route_units[0, :listed], routed.units[:listed])
    _same("counts", found.counts, fetched.counts)
    ends = fetched.counts.cumsum(0).tolist()
    for holder, end in enumerate(ends):  # the order inside a holder is the kernel's own
        part = slice(end - int(fetched.counts[holder]), end)
        one, other = found.fetch_units[part].sort()[0], fetched.units[part].sort()[0]
        _same(f"fetch_units of holder {holder}", one, other)
    _same("place", found.place >= 0, fetched.place >= 0)
    at = found.place >= 0
    _same("fetch_units at their places", found.fetch_units[found.place[at].long()], units[at])


def _same(name: str, found: Tensor, want: Tensor) -> None:
    differ = int((found.long() != want.long()).sum())
    assert differ == 0, f"{name}: {differ} of {want.numel()} differ"


def main() -> int:
    bench = Bench("plan", __doc__)
    torch.manual_seed(0)
    stored, table = tables(), prices_of(cost_model(), world=WORLD, device=DEVICE)
    directory = stored.directory()
    for case in CASES:
        if not bench.wants(case.name):
            continue
        workspace = PlanWorkspace.make(
            num_items=case.batch,
            num_branches=1,
            num_units=CORPUS,
            world_size=WORLD,
            device=DEVICE,
        )
        given = [
            torch.rand(case.batch, CORPUS, device=DEVICE).topk(LISTED)[1].to(torch.int32)
            for _ in range(bench.rotations(case.num_bytes))
        ]

        def call(
            units: Tensor, case: Case = case, workspace: PlanWorkspace = workspace
        ) -> Callable[[], Plan]:
            out = Plan.make(
                num_items=case.batch,
                num_listed=LISTED,
                world_size=WORLD,
                num_forms=1,
                device=DEVICE,
            )
            return lambda: plan(
                units, directory, table, workspace, rank=RANK, mode=case.mode, out=out
            )

        ours = Variant(
            name="qroam",
            calls=[call(units) for units in given],
            check=checked(case, given, stored),
        )
        ways = [ours.calls[n]().way.clone() for n in range(min(_DEFINED_CALLS, len(given)))]

        def defined(units: Tensor, way: Tensor) -> Callable[[], object]:
            def run() -> object:
                with torch.device(DEVICE):
                    routed, fetched = lists(wanted(units, stored), way, stored)
                return tuple(routed), tuple(fetched)

            return run

        baseline = Variant(
            name="torch operations, ways given",
            calls=[defined(*both) for both in zip(given, ways, strict=False)],
            check=lambda results: None,
        )
        bench.case(case.name, ours, [baseline], num_bytes=case.num_bytes)
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
