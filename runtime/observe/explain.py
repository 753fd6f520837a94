"""Why the last attention step asked whom for what: its decisions, a line each."""

from __future__ import annotations

from typing import NamedTuple

from ..cost.predicate import Reason, Way, predict_step
from ..world import World


class DecisionLine(NamedTuple):
    """One (query, branch, holder). Times are of the whole exchange with that holder, microseconds.

    `margin`: how much longer, relatively, the exchange would take if this query went the other way.
    """

    layer: int
    query: int
    branch: int
    holder: int
    units: int
    way: str
    reason: str
    margin: float
    route_us: float
    fetch_us: float


def explain_last(world: World) -> list[DecisionLine]:
    """The decisions of the last `attend` of this rank; empty before the first."""
    last = world.last_step()
    if last is None:
        return []
    layer, _, demand, decision, _ = last
    branches = world.config.num_branches
    return [
        DecisionLine(
            layer=layer,
            query=item // branches,
            branch=item % branches,
            holder=holder,
            units=int(demand.pairs_units[item, holder]),
            way=Way(int(decision.way[item, holder])).name,
            reason=Reason(int(decision.reason[item, holder])).name,
            margin=float(decision.margin[item, holder]),
            route_us=float(decision.route_s[holder]) * 1e6,
            fetch_us=float(decision.fetch_s[holder]) * 1e6,
        )
        for item, holder in (decision.way != Way.NONE).nonzero().tolist()
    ]


def predicted_last(world: World) -> float:
    """Seconds predicted for the last `attend` of this rank, own work and merge included."""
    last = world.last_step()
    if last is None:
        return 0.0
    layer, unit_tokens, demand, decision, shifted = last
    parts = predict_step(
        decision.way,
        demand,
        world.facts[layer],
        world.config.fabric,
        rank=world.rank,
        unit_tokens=unit_tokens,
        reuse=world.config.reuse,
        shifted=shifted,
    )
    return float(parts.total)
