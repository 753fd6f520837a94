"""Route, fetch or local, per (item, holder): the closed form that the plan uses.

Pure, vectorised, of static shape; nothing is read back to the host. N items, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...partition.layout import Form
from .model import CostModel, Exchange, FormFacts, LayerFacts, Load, StepParts

Mode = Literal["auto", "always-route", "always-fetch", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)
_LOW = 0xFFFFFFFF


class Way(IntEnum):
    NONE = 0
    LOCAL = 1
    ROUTE_A = 2
    ROUTE_B = 3
    FETCH = 4


class Reason(IntEnum):
    """Why: the group of parts in which the chosen way gains most over the other way for all."""

    NONE = 0
    LOCAL = 1  # held here
    FORCED = 2  # by the mode
    LATENCY = 3  # probe, wait
    WIRE = 4  # bytes
    WORK = 5  # pack, splice, project, rotate, attend, merge
    REUSE = 6  # a single use would have been routed
    SPLIT = 7  # some of this holder's items are routed and some fetched
    TIE = 8  # equal costs are fetched: a copy can be used again


class Demand(NamedTuple):
    """What this rank's items need, by holder (replicas chosen, leases in the own column).

    Fields:
        pairs_units: (N, W) int64, units of each item at each holder; the own column is local.
        unique_units: (W,) int64, different units at the holder over all items.
        fair_units: (N, W) float64, the item's units there, each divided by the number of items
            that list it; sums to `unique_units`.
    """

    pairs_units: Tensor
    unique_units: Tensor
    fair_units: Tensor


class Decision(NamedTuple):
    """What is done, and what it is predicted to take.

    Fields:
        way: (N, W) int8, see `Way`.
        margin: (N, W) float64, relative: the holder's exchange with this item alone changed
            between route and fetch, over the exchange as decided, minus 1. 0 where there is no
            choice. Below 0 where a mix that is not among the three would have been better.
        reason: (N, W) int8, see `Reason`.
        predicted: (W,) float64, seconds of the exchange as decided.
        route_s, fetch_s: (W,) float64, seconds if all items there were routed (by the best form
            that is allowed), or fetched.
    """

    way: Tensor
    margin: Tensor
    reason: Tensor
    predicted: Tensor
    route_s: Tensor
    fetch_s: Tensor


def way_of(form: Form) -> Way:
    return Way.ROUTE_A if form == "A" else Way.ROUTE_B


def decide(
    demand: Demand,
    model: CostModel,
    *,
    rank: int,
    mode: Mode = "auto",
    forms: tuple[Form, ...] = ("A",),
    seed: int = 0,
    step: int = 0,
    wait_s: Tensor | None = None,
) -> Decision:
    """Choose a way for every (item, holder).

    Per holder, `auto` takes the cheapest of: fetch all, route all, route exactly the items whose
    marginal route cost is below that of fetching their fair share. Each is priced in full, both
    fixed costs included, so no holder is predicted to take longer than under `always-route` or
    `always-fetch`, and neither is the step (`predict_step`). Equal costs are fetched.

    Args:
        rank: this rank; its column of the demand is local.
        forms: payload forms that the opened runtime can execute.
        seed, step: `random` is a pure function of (seed, step, rank, item, holder).
        wait_s: (W,) what each holder is busy with before it starts, seconds; None is none.
    Raises:
        ValueError: for a demand, rank, mode or form that is out of range.
    """
    _check(demand, rank=rank, wait_s=wait_s)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    allowed = _allowed(model.facts, forms)
    holders = _Holders.of(demand, model, rank=rank, wait_s=wait_s)
    all_fetch, fetched = holders.uniform(Way.FETCH), holders.exchange(holders.uniform(Way.FETCH))
    route = holders.best_route(allowed)
    home = route.home

    match mode:
        case "always-fetch":
            way = all_fetch
        case "always-route":
            way = route.way
        case "random":
            draw = _draw(len(allowed) + 1, seed=seed, step=step, rank=rank, like=holders.rest)
            way = all_fetch
            for choice, form in enumerate(allowed, start=1):
                way = torch.where(draw == choice, holders.uniform(way_of(form.form)), way)
        case "auto":
            way = torch.where(route.total < fetched.total, route.way, all_fetch)
            best_s = torch.minimum(route.total, fetched.total)
            for form in allowed:
                routed = holders.uniform(way_of(form.form))
                mix = torch.where(holders.prefers_route(form), routed, all_fetch)
                mix_s = holders.exchange(mix).total
                way = torch.where(mix_s < best_s, mix, way)
                home = torch.where(mix_s < best_s, int(way_of(form.form)), home)
                best_s = torch.minimum(best_s, mix_s)

    predicted = holders.exchange(way).total
    change = holders.flipped(way, home) / predicted.clamp(min=1e-30) - 1
    if mode == "auto":
        reason = holders.reasons(way, route, fetched)
    else:
        reason = torch.where(holders.remote, int(Reason.FORCED), holders.rest)
    return Decision(
        way=way.to(torch.int8),
        margin=torch.where(holders.remote, change, 0.0),
        reason=reason.to(torch.int8),
        predicted=predicted,
        route_s=route.total,
        fetch_s=fetched.total,
    )


def all_local(demand: Demand) -> Decision:
    """What `decide` says where nobody else holds anything that is wanted, without pricing holders."""
    nothing = torch.zeros_like(demand.fair_units)
    free = torch.zeros(demand.fair_units.shape[1], dtype=torch.float64)
    listed = demand.pairs_units > 0
    return Decision(
        way=torch.where(listed, int(Way.LOCAL), int(Way.NONE)).to(torch.int8),
        margin=nothing,
        reason=torch.where(listed, int(Reason.LOCAL), int(Reason.NONE)).to(torch.int8),
        predicted=free,
        route_s=free,
        fetch_s=free,
    )


def predict_step(
    way: Tensor,
    demand: Demand,
    model: CostModel,
    *,
    rank: int,
    wait_s: Tensor | None = None,
) -> StepParts:
    """What a step takes if every (item, holder) goes its `way`, (N, W), as in `Decision`.

    Own work is the attention over local units. Attention over fetched units is counted in the
    exchange of its holder, after whose transfer alone it can start.
    """
    _check(demand, rank=rank, wait_s=wait_s)
    if way.shape != demand.pairs_units.shape:
        raise ValueError(f"way must be {tuple(demand.pairs_units.shape)}, got {tuple(way.shape)}")
    holders = _Holders.of(demand, model, rank=rank, wait_s=wait_s)
    local = demand.pairs_units[:, rank]
    return model.step(
        own=(model.attend() + model.rotate()).of(
            model.asked((local > 0).sum(), local.sum(), torch.zeros_like(local.sum()))
        ),
        exchanges=holders.exchange(way).total,
        items=(demand.pairs_units > 0).any(1).sum(),
    )


class _BestRoute(NamedTuple):
    """Every item routed, holder by holder in its cheapest form."""

    way: Tensor  # (N, W) int64
    home: Tensor  # (W,) int64, that form's way
    total: Tensor  # (W,) seconds
    groups: Tensor  # (3, W) seconds, see `_groups`


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Holders:
    """A demand with the model that prices it; (W,) unless stated otherwise."""

    model: CostModel
    demand: Demand
    remote: Tensor  # (N, W) bool: a choice is to be made
    rest: Tensor  # (N, W) int64: LOCAL or NONE where there is none (`Reason` has the same values)
    private: Tensor  # (N, W) float64: at least so many units no other item lists
    wait_s: Tensor
    sharers: Tensor  # scalar: holders that share this rank's egress and ingress

    @staticmethod
    def of(demand: Demand, model: CostModel, *, rank: int, wait_s: Tensor | None) -> _Holders:
        wanted = demand.pairs_units > 0
        here = torch.arange(wanted.shape[1], device=wanted.device) == rank
        remote = wanted & ~here
        return _Holders(
            model=model,
            demand=demand,
            remote=remote,
            rest=(wanted & here).long() * int(Way.LOCAL),
            # A unit that others list too adds at most a half to the fair share.
            private=(2 * demand.fair_units - demand.pairs_units).clamp(min=0),
            wait_s=torch.zeros_like(demand.unique_units).double() if wait_s is None else wait_s,
            sharers=remote.any(0).sum().clamp(min=1).double(),
        )

    def uniform(self, way: Way) -> Tensor:
        """(N, W): `way` wherever there is a choice."""
        return torch.where(self.remote, int(way), self.rest)

    def load(self, way: Tensor) -> Load:
        units = self.demand.pairs_units

        def sums(which: Way) -> tuple[Tensor, Tensor]:
            mine = self.remote & (way == int(which))
            return mine.sum(0), torch.where(mine, units, 0).sum(0)

        routes = [sums(way_of(form.form)) for form in self.model.facts.forms]
        items, listed = sums(Way.FETCH)
        routed = self.remote & (way != int(Way.FETCH))
        return Load(
            routed_items=tuple(pair[0] for pair in routes),
            routed_units=tuple(pair[1] for pair in routes),
            fetched_items=items,
            fetched_units=listed,
            fetched_unique=self._unique(torch.where(routed, self.private, 0.0).sum(0), listed),
        )

    def _unique(self, routed_private: Tensor, fetched_listed: Tensor) -> Tensor:
        """Different units of the fetched items, if the others have `routed_private` of their own.

        Which units a subset shares is not known here; this bound never under-estimates.
        """
        return torch.minimum(self.demand.unique_units - routed_private, fetched_listed.double())

    def price(self, load: Load) -> Exchange:
        return self.model.exchange(load, wait_s=self.wait_s, sharers=self.sharers)

    def exchange(self, way: Tensor) -> Exchange:
        return self.price(self.load(way))

    def best_route(self, allowed: tuple[FormFacts, ...]) -> _BestRoute:
        best: _BestRoute | None = None
        for form in allowed:
            kind = way_of(form.form)
            way = self.uniform(kind)
            parts = self.exchange(way)
            home = torch.full_like(self.demand.unique_units, int(kind))
            this = _BestRoute(way=way, home=home, total=parts.total, groups=_groups(parts))
            if best is None:
                best = this
            else:
                better = this.total < best.total
                pairs = zip(this, best, strict=True)
                best = _BestRoute(*(torch.where(better, new, old) for new, old in pairs))
        assert best is not None
        return best

    def prefers_route(self, form: FormFacts) -> Tensor:
        """(N, W) bool: routing the item adds less than fetching its fair share, all else equal."""
        items, units = self.remote.sum(0), torch.where(self.remote, self.demand.pairs_units, 0)
        listed, unique = units.sum(0), self.demand.unique_units.double()

        alone = torch.zeros_like(self.sharers)
        route = self.model.route(form, wait_s=self.wait_s, sharers=self.sharers).total
        fetch = self.model.fetch(mixed=alone, sharers=self.sharers).total
        others = (unique - self.demand.fair_units).clamp(min=0)
        with_it = self.model.asked(items, listed, unique)
        without = self.model.asked(items - 1, listed - units, others)
        # Routed items copy nothing, and a route's line has no term for it.
        route_s = route.of(with_it) - route.of(without)
        fetch_s = fetch.of(with_it) - fetch.of(without)
        return self.remote & (route_s < fetch_s)

    def flipped(self, way: Tensor, home: Tensor) -> Tensor:
        """(N, W) seconds of the holder's exchange with this item alone changed.

        A routed item is fetched; a fetched one is routed by its holder's form, `home`.
        """
        load, units = self.load(way), self.demand.pairs_units
        from_fetch = (self.remote & (way == int(Way.FETCH))).long()
        to_fetch = self.remote.long() - from_fetch
        change = to_fetch - from_fetch  # +1: one more is fetched
        deltas = [
            from_fetch * (home == int(way_of(form.form)))
            - to_fetch * (way == int(way_of(form.form)))
            for form in self.model.facts.forms
        ]
        fetched_units = load.fetched_units + change * units
        routed = self.remote & (way != int(Way.FETCH))
        routed_private = torch.where(routed, self.private, 0.0).sum(0) - change * self.private
        changed = Load(
            routed_items=tuple(n + d for n, d in zip(load.routed_items, deltas, strict=True)),
            routed_units=tuple(
                n + d * units for n, d in zip(load.routed_units, deltas, strict=True)
            ),
            fetched_items=load.fetched_items + change,
            fetched_units=fetched_units,
            fetched_unique=self._unique(routed_private, fetched_units),
        )
        return self.price(changed).total

    def reasons(self, way: Tensor, route: _BestRoute, fetched: Exchange) -> Tensor:
        """(N, W) int64, for choosing `way` rather than the other way for all items."""
        gain = _groups(fetched) - route.groups  # > 0: routing saves
        by_route = int(Reason.LATENCY) + gain.argmax(0)
        by_fetch = int(Reason.LATENCY) + (-gain).argmax(0)
        once = replace(self, model=replace(self.model, reuse=1.0))
        once_s = once.exchange(self.uniform(Way.FETCH)).total
        by_fetch = torch.where(once_s > route.total, int(Reason.REUSE), by_fetch)
        by_fetch = torch.where(fetched.total == route.total, int(Reason.TIE), by_fetch)
        is_fetch = self.remote & (way == int(Way.FETCH))
        is_split = is_fetch.any(0) & (self.remote & ~is_fetch).any(0)
        reason = torch.where(is_fetch, by_fetch, by_route)
        reason = torch.where(is_split, int(Reason.SPLIT), reason)
        return torch.where(self.remote, reason, self.rest)


def _groups(exchange: Exchange) -> Tensor:
    """(3, W) seconds in the order of LATENCY, WIRE, WORK."""
    fetch, copied = exchange.fetch
    latency, wire = fetch.probe.of(copied), (fetch.request + fetch.transfer).of(copied)
    for route, asked in exchange.routes:
        latency = latency + (route.probe + route.wait).of(asked)
        wire = wire + (route.send + route.back).of(asked)
    return torch.stack([latency, wire, exchange.total - latency - wire])


def _draw(choices: int, *, seed: int, step: int, rank: int, like: Tensor) -> Tensor:
    """(N, W) int64 in [0, choices): a 32-bit mix of seed, step, rank, item and holder."""
    num_items, world = like.shape
    mixed = torch.arange(num_items * world, device=like.device).view(num_items, world)
    for salt in (seed, step, rank):
        mixed = (mixed + (salt & _LOW) * 0x9E3779B9) & _LOW
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _LOW
        mixed = mixed ^ (mixed >> 16)
    return mixed % choices


def _allowed(facts: LayerFacts, forms: tuple[Form, ...]) -> tuple[FormFacts, ...]:
    """The facts of `forms`, in the layout's order."""
    known = [form.form for form in facts.forms]
    if not forms or not set(forms) <= set(known):
        raise ValueError(f"forms must be some of {', '.join(known)} for this layout, got {forms}")
    return tuple(form for form in facts.forms if form.form in forms)


def _check(demand: Demand, *, rank: int, wait_s: Tensor | None) -> None:
    if demand.pairs_units.dim() != 2:
        raise ValueError(f"pairs_units must be (N, W), got {tuple(demand.pairs_units.shape)}")
    num_items, world = demand.pairs_units.shape
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    expected = {
        "pairs_units": (demand.pairs_units, (num_items, world), torch.int64),
        "unique_units": (demand.unique_units, (world,), torch.int64),
        "fair_units": (demand.fair_units, (num_items, world), torch.float64),
    }
    if wait_s is not None:
        expected["wait_s"] = (wait_s, (world,), torch.float64)
    for name, (tensor, shape, dtype) in expected.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
