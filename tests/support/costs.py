"""Cost models, demands and parts of a cost, for the tests of the cost model and of the predicate."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qroam.partition.presets import named_layout
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.predicate import Decision, Demand, decide
from qroam.runtime.cost.profile import Device, FabricProfile, load_profile

V32 = LayerFacts.of(named_layout("mla-v3.2"), entry_bytes=656, element_bytes=2)


ONE = torch.tensor(1.0, dtype=torch.float64)


FREE_DEVICE = Device(
    plan_s=0,
    attend_s=0,
    flop_per_s=1e18,
    memory_bytes_per_s=1e15,
    pack_s=0,
    pack_bytes_per_s=1e15,
    merge_s=0,
    merge_bytes_per_s=1e15,
    splice_s=0,
    splice_bytes_per_s=1e15,
)


def n(value: int) -> Tensor:
    return torch.tensor(value)


def paper() -> FabricProfile:
    return load_profile("ibgda-ndr200")


def wire_only(profile: FabricProfile) -> FabricProfile:
    return replace(profile, device=FREE_DEVICE)


class RouteParts(NamedTuple):
    """Seconds of each part, and of all."""

    probe: Tensor
    send: Tensor
    project: Tensor
    rotate: Tensor
    attend: Tensor
    back: Tensor
    merge: Tensor
    wait: Tensor
    total: Tensor


class FetchParts(NamedTuple):
    probe: Tensor
    request: Tensor
    pack: Tensor
    transfer: Tensor
    splice: Tensor
    rotate: Tensor
    attend: Tensor
    merge: Tensor
    total: Tensor


def route(
    model: CostModel, items: int, units: int, form: int = 0, sharers: Tensor = ONE
) -> RouteParts:
    lines = model.route(model.facts.forms[form], wait_s=0 * ONE, sharers=sharers)
    asked = model.asked(n(items), n(units), n(0))
    return RouteParts(*(line.of(asked) for line in (*lines, lines.total)))


def fetch(
    model: CostModel,
    items: int,
    units: int,
    unique: int,
    *,
    mixed: bool = False,
    sharers: Tensor = ONE,
) -> FetchParts:
    lines = model.fetch(mixed=torch.tensor(mixed), sharers=sharers)
    asked = model.asked(n(items), n(units), n(unique))
    return FetchParts(*(line.of(asked) for line in (*lines, lines.total)))


def demand_of(lists: list[list[set[int]]]) -> Demand:
    """From the units that item i lists at holder h, `lists[i][h]`."""
    pairs = torch.tensor([[len(units) for units in row] for row in lists])
    listed = [Counter(unit for row in lists for unit in row[h]) for h in range(len(lists[0]))]
    fair = [
        [sum(1 / listed[h][unit] for unit in units) for h, units in enumerate(row)] for row in lists
    ]
    return Demand(
        pairs_units=pairs,
        unique_units=torch.tensor([len(units) for units in listed]),
        fair_units=torch.tensor(fair, dtype=torch.float64),
    )


def same_units(items: int, units: int) -> Demand:
    """Rank 0 asks rank 1: every item lists the same `units`."""
    return demand_of([[set(), set(range(units))] for _ in range(items)])


def decided(
    demand: Demand,
    profile: FabricProfile,
    *,
    reuse: float = 1.0,
    splice: bool = False,
    shifted: bool = False,
    **options: object,
) -> Decision:
    model = CostModel(facts=V32, profile=profile, reuse=reuse, splice=splice, shifted=shifted)
    return decide(demand, model, rank=0, **options)  # type: ignore[arg-type]
