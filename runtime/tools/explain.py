"""A hypothetical step explained: every candidate's predicted parts, the choice, and where it flips.

`explain_step` is pure and returns JSON-able records; `explain_text.py` has their plain text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import torch
from torch import Tensor

from ...partition.layout import Form, Layout
from ..cost.model import Asked, CostModel, FetchLines, LayerFacts, RouteLines, StepParts
from ..cost.predicate import Decision, Demand, Mode, Reason, Way, decide, predict_step
from ..cost.profile import FabricProfile

MAX_QUERIES = 4096
MAX_HOLDERS = 256
MAX_UNITS = 1 << 24

_WAY_TEXT = {Way.ROUTE_A: "route A", Way.ROUTE_B: "route B", Way.FETCH: "fetch"}
_REASON_TEXT = {
    Reason.LATENCY: "fewer waits and probes",
    Reason.WIRE: "less time on the wire",
    Reason.WORK: "less packing, projecting, attention and merging",
    Reason.REUSE: "the copy is used again; a single use would be routed",
    Reason.SPLIT: "some queries are routed and some fetched",
    Reason.TIE: "equal costs are fetched: a copy can be used again",
}


class Candidate(TypedDict):
    """`parts_us` is None if not priced; `blocked` says why it cannot be chosen, None if it can."""

    way: str
    parts_us: dict[str, float] | None
    total_us: float | None
    blocked: str | None


class Flip(TypedDict):
    """The nearest value of `quantity` at which the choice changes, and what it changes to."""

    quantity: str
    now: int
    down_to: int | None
    down_way: str | None
    up_to: int | None
    up_way: str | None
    scanned: list[int]


class DecisionRecord(TypedDict):
    """One decision, the same for each of `queries` (first, last) and each of `holders`.

    `margin`: the cheapest other candidate that can be executed, over the chosen one, minus 1;
    `margin_of_one_query` is that of `Decision`.
    """

    kind: Literal["decision"]
    queries: list[int]
    holders: list[int]
    units_per_query: int
    unique_units: int
    way: str
    reason: str
    margin: float
    margin_of_one_query: float
    candidates: list[Candidate]
    flips: list[Flip]


class StepRecord(TypedDict):
    """The step in microseconds: parts as decided, and totals by mode.

    `fabric` names the profile and says whether its constants were measured.
    """

    kind: Literal["step"]
    layout: str
    fabric: str
    reuse: float
    overlap: float
    unit_tokens: int
    parts_us: dict[str, float]
    total_us: dict[str, float]


Record = DecisionRecord | StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """A step of rank 0, which holds nothing, with ranks 1 .. as holders."""

    model: CostModel
    forms: tuple[Form, ...]
    queries: int
    holder_units: tuple[int, ...]  # of one query
    overlap: float

    def demand(self) -> Demand:
        """One item per (query, branch); the branches of a query list the same units."""
        num_items = self.queries * self.model.facts.branches
        each = torch.tensor([0, *self.holder_units])
        shared = self._shared(each)
        return Demand(
            pairs_units=each.expand(num_items, -1).contiguous(),
            unique_units=self._unique(each),
            fair_units=(shared / self.queries + (each - shared)).double().repeat(num_items, 1),
        )

    def candidates(self, units: int) -> list[Candidate]:
        """Each way for all items at a holder where each lists `units`, executable or not."""
        each, model = torch.tensor(units), self.model
        items = torch.tensor(self.queries * model.facts.branches)
        sharers = torch.tensor(float(len(self.holder_units)), dtype=torch.float64)
        no_wait, not_mixed = torch.zeros_like(sharers), torch.tensor(False)
        found: list[Candidate] = []
        for form in model.facts.forms:
            route = model.route(form, wait_s=no_wait, sharers=sharers)
            asked = model.asked(items, items * each, torch.zeros_like(each))
            blocked = None if form.form in self.forms else _why_not(form.form)
            found.append(_priced(f"route {form.form}", route, asked, blocked))
        if len(model.facts.forms) == 1:
            found.append(_unpriced("route B", "this layout has no W_UK and W_UV"))
        asked = model.asked(items, items * each, self._unique(each))
        fetch = model.fetch(mixed=not_mixed, sharers=sharers)
        found.append(_priced("fetch", fetch, asked, None))
        if model.shifted:
            moved = replace(model, splice=True, shifted=False)
            lease = moved.fetch(mixed=not_mixed, sharers=sharers)
            found.append(
                _priced(
                    "lease",
                    lease,
                    asked,
                    "a lease is made by `Runtime.copy_document`, not by a step",
                )
            )
        found.append(_unpriced("recompute", "no prefill callback, so its cost is unknown"))
        return found

    def cheapest(self, units: int) -> str:
        """What `decide` does with alike items, for which a split never helps."""
        *routes, fetch = _executable(self.candidates(units))
        return min([fetch, *routes], key=lambda pair: pair[1])[0]

    def _shared(self, each: Tensor) -> Tensor:
        return torch.floor(each * self.overlap + 0.5).long()

    def _unique(self, each: Tensor) -> Tensor:
        """Different units over all items, where each item lists `each`."""
        shared = self._shared(each)
        return self.model.facts.branches * (shared + self.queries * (each - shared))

    def decide(self, mode: Mode = "auto") -> Decision:
        return decide(self.demand(), self.model, rank=0, mode=mode, forms=self.forms)


def explain_step(
    *,
    layout: Layout,
    queries: int,
    units: int,
    holders: int,
    profile: FabricProfile,
    reuse: float,
    forms: tuple[Form, ...] = ("A",),
    entry_bytes: int,
    element_bytes: int = 2,
    unit_tokens: int = 1,
    overlap: float = 0.0,
    splice: bool = False,
    shifted: bool = False,
) -> list[Record]:
    """Explain one layer-step of one requester that holds none of what it needs.

    Args:
        units: of one query over all holders, spread evenly (the first holders get the remainder).
        reuse: expected uses of a fetched unit.
        forms: payload forms that can be executed (B: the holders have W_UK and W_UV).
        entry_bytes: of one stored entry of one branch, by its codec.
        element_bytes: of one number of a row on the wire.
        overlap: fraction of a query's units that all queries list; 0 is disjoint, 1 the same.
        shifted: the units are of documents at other positions, so queries are rotated; a lease,
            whose keys are rotated instead, is priced beside.
    Returns: a record per group of equal decisions, then one for the step.
    Raises: ValueError for a size, an overlap, a reuse or a form that is out of range.
    """
    limits = (("queries", queries, MAX_QUERIES), ("units", units, MAX_UNITS))
    for name, value, high in (*limits, ("holders", holders, MAX_HOLDERS)):
        if not 1 <= value <= high:
            raise ValueError(f"{name} must be in [1, {high}], got {value}")
    if units < holders:
        raise ValueError(f"units must be at least holders ({holders}), got {units}")
    if not 0 <= overlap <= 1:
        raise ValueError(f"overlap must be in [0, 1], got {overlap}")
    facts = LayerFacts.of(layout, entry_bytes=entry_bytes, element_bytes=element_bytes)
    model = CostModel(
        facts=facts,
        profile=profile,
        unit_tokens=unit_tokens,
        reuse=reuse,
        splice=splice,
        shifted=shifted,
    )
    few, more = divmod(units, holders)
    holder_units = (few + 1,) * more + (few,) * (holders - more)
    case = _Case(
        model=model, forms=forms, queries=queries, holder_units=holder_units, overlap=overlap
    )
    groups = [(1, more), (more + 1, holders)] if more else [(1, holders)]
    demand, decision = case.demand(), case.decide()
    records: list[Record] = [
        _decision(case, demand, decision, first, last) for first, last in groups
    ]
    return [*records, _step(case, demand, decision, layout)]


def _decision(
    case: _Case, demand: Demand, decision: Decision, first: int, last: int
) -> DecisionRecord:
    units = case.holder_units[first - 1]
    way = _WAY_TEXT[Way(int(decision.way[0, first]))]
    candidates = case.candidates(units)
    totals = dict(_executable(candidates))
    chosen = totals.pop(way)
    return DecisionRecord(
        kind="decision",
        queries=[0, case.queries - 1],
        holders=[first, last],
        units_per_query=units,
        unique_units=int(demand.unique_units[first]) // case.model.facts.branches,
        way=way,
        reason=_REASON_TEXT[Reason(int(decision.reason[0, first]))],
        margin=min(totals.values()) / chosen - 1,
        margin_of_one_query=float(decision.margin[0, first]),
        candidates=candidates,
        flips=[
            _flip(
                "queries",
                case.queries,
                MAX_QUERIES,
                lambda n: replace(case, queries=n).cheapest(units),
            ),
            _flip("units per query at a holder", units, MAX_UNITS, case.cheapest),
        ],
    )


def _executable(candidates: list[Candidate]) -> list[tuple[str, float]]:
    """(way, microseconds) of those that can be chosen, fetch last."""
    return [
        (found["way"], found["total_us"])
        for found in candidates
        if found["blocked"] is None and found["total_us"] is not None
    ]


def _why_not(form: Form) -> str:
    if form == "A":
        return "this form is not enabled"
    return "the holders have no W_UK and W_UV"


def _priced(
    way: str, lines: RouteLines | FetchLines, asked: Asked, blocked: str | None
) -> Candidate:
    return Candidate(
        way=way,
        parts_us={name: float(line.of(asked)) * 1e6 for name, line in lines._asdict().items()},
        total_us=float(lines.total.of(asked)) * 1e6,
        blocked=blocked,
    )


def _unpriced(way: str, blocked: str) -> Candidate:
    return Candidate(way=way, parts_us=None, total_us=None, blocked=blocked)


def _flip(quantity: str, now: int, limit: int, way_at: Callable[[int], str]) -> Flip:
    """The nearest changes of `way_at` below and above `now`: doubling steps, then bisection.

    A change back and forth between two steps of the doubling is not seen.
    """
    here = way_at(now)
    down, up = _edge(now, 1, here, way_at), _edge(now, limit, here, way_at)
    return Flip(
        quantity=quantity,
        now=now,
        down_to=down,
        down_way=None if down is None else way_at(down),
        up_to=up,
        up_way=None if up is None else way_at(up),
        scanned=[1, limit],
    )


def _edge(now: int, end: int, here: str, way_at: Callable[[int], str]) -> int | None:
    """The value nearest to `now`, towards `end`, at which the way is no longer `here`."""
    same = now
    while same != end:
        probe = min(2 * same, end) if end > now else max(same // 2, end)
        if way_at(probe) != here:
            break
        same = probe
    else:
        return None
    while abs(probe - same) > 1:
        middle = (same + probe) // 2
        if way_at(middle) == here:
            same = middle
        else:
            probe = middle
    return probe


def _step(case: _Case, demand: Demand, decision: Decision, layout: Layout) -> StepRecord:
    model = case.model

    def parts(way: Tensor) -> StepParts:
        return predict_step(way, demand, model, rank=0)

    auto = parts(decision.way)
    modes: tuple[Mode, ...] = ("always-route", "always-fetch")
    return StepRecord(
        kind="step",
        layout=layout.name,
        fabric=model.profile.label,
        reuse=model.reuse,
        overlap=case.overlap,
        unit_tokens=model.unit_tokens,
        parts_us={name: float(part) * 1e6 for name, part in auto._asdict().items()},
        total_us={"auto": float(auto.total) * 1e6}
        | {mode: float(parts(case.decide(mode).way).total) * 1e6 for mode in modes},
    )
