"""What one exchange costs: the formulas of route, fetch and recompute, part by part, in seconds.

    route     = probe + send + wait(h) + project(n) + rotate(n) + attend(n, k) + back + merge
    fetch     = (probe + request + pack(k) + transfer + splice) / R + rotate(n) + attend(n, k)
                + merge if mixed
    recompute = a * tokens * layers / R
    step      = plan + max(own work, max over holders of its exchange) + merge

After arXiv 2606.01502, with reuse, payload forms and listed units added. An item is one (query,
branch). N items, W ranks. Every part is a `Line`: so much once, per item, per unit. Lines are added
before anything is multiplied, so a decision takes a few products, on a device (`prices.py`) the
same ones in the same order. Everything is elementwise float64 torch on broadcastable tensors and
reads nothing back to the host.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ...partition.layout import Form, Layout
from .profile import FabricProfile

UNIT_ID_BYTES = 4
OFFSET_BYTES = 4  # with each listed unit, if any is attached elsewhere
QUERY_META_BYTES = 16  # item, number of units, and the span of hidden entries, int32 each
COVERAGE_BYTES = 8  # entries that went in, and a 32-bit mix of their ids
MARK_BYTES = 4  # with each packed entry, a 32-bit mix of its id
HEADER_BYTES = 208  # of a message, its columns described

Number = float | Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FormFacts:
    """One payload form of one item: row bytes out and back, and what projecting adds at the holder.

    `weight_bytes` are the two matrices of one branch, read once an exchange; `project_flop` is
    per item.
    """

    form: Form
    out_bytes: int
    back_bytes: int
    weight_bytes: int
    project_flop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """What the formulas need of a layout; build it with `of`. Bytes and flop are of one branch.

    `rope_bytes` are the rotary columns of an entry, `rotate_bytes` those of an item's query rows.
    """

    branches: int
    entry_bytes: int
    rope_bytes: int
    rotate_bytes: int
    attend_flop: int
    forms: tuple[FormFacts, ...]

    @staticmethod
    def of(layout: Layout, *, entry_bytes: int, element_bytes: int) -> LayerFacts:
        """Args:
        entry_bytes: of one stored entry of one branch, by its codec.
        element_bytes: of one number of a row on the wire, and of a projection weight.
        """
        if min(entry_bytes, element_bytes) <= 0:
            raise ValueError(
                "entry_bytes and element_bytes must be positive, "
                f"got {entry_bytes} and {element_bytes}"
            )
        rows, projection = layout.branch_heads, layout.projection
        weights = (
            rows
            * (projection.nope_dim * layout.absorbed_dim + layout.value_dim * projection.out_dim)
            if projection
            else 0
        )

        def facts(form: Form, num_weights: int) -> FormFacts:
            out, back = layout.payload_bytes(form, element_bytes)
            return FormFacts(
                form=form,
                out_bytes=out // layout.num_branches,
                back_bytes=back // layout.num_branches,
                weight_bytes=num_weights * element_bytes,
                project_flop=2 * num_weights,
            )

        return LayerFacts(
            branches=layout.num_branches,
            entry_bytes=entry_bytes,
            rope_bytes=layout.rope_dim * element_bytes,
            rotate_bytes=rows * layout.rope_dim * element_bytes,
            attend_flop=2 * rows * (layout.key_dim + layout.value_dim),
            forms=(facts("A", 0), facts("B", weights)) if projection else (facts("A", 0),),
        )


class Asked(NamedTuple):
    """What an exchange asks of a holder, float64: `used` and `found` are 0 or 1.

    used: is anything asked. units: listed by all items. unique: different ones that would be
    copied. found: is there any of those. weights: items that still have to load a branch's weights.
    """

    used: Tensor
    items: Tensor
    units: Tensor
    unique: Tensor
    found: Tensor
    weights: Tensor

    @staticmethod
    def of(items: Tensor, units: Tensor, unique: Tensor, *, branches: int) -> Asked:
        items, unique = items.double(), unique.double()
        return Asked(
            used=(items > 0).double(),
            items=items,
            units=units.double(),
            unique=unique,
            found=(unique > 0).double(),
            weights=torch.clamp(items, max=branches),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Seconds of each of what is `Asked`."""

    used: Number = 0.0
    items: Number = 0.0
    units: Number = 0.0
    unique: Number = 0.0
    found: Number = 0.0
    weights: Number = 0.0

    @property
    def coefficients(self) -> tuple[Number, ...]:
        return (self.used, self.items, self.units, self.unique, self.found, self.weights)

    def __add__(self, other: Line) -> Line:
        pairs = zip(self.coefficients, other.coefficients, strict=True)
        return _line(*(a + b for a, b in pairs))

    def __mul__(self, factor: Number) -> Line:
        return _line(*(a * factor for a in self.coefficients))

    def __truediv__(self, divisor: Number) -> Line:
        return _line(*(a / divisor for a in self.coefficients))

    def of(self, asked: Asked) -> Tensor:
        products = zip(asked, self.coefficients, strict=True)
        return reduce(operator.add, (amount * seconds for amount, seconds in products))


def _line(*coefficients: Number) -> Line:
    return Line(**dict(zip(Asked._fields, coefficients, strict=True)))


class RouteLines(NamedTuple):
    """Parts of a routed exchange."""

    probe: Line
    send: Line
    project: Line
    rotate: Line
    attend: Line
    back: Line
    merge: Line
    wait: Line

    @property
    def total(self) -> Line:
        return reduce(operator.add, self)


class FetchLines(NamedTuple):
    """Parts of a fetching exchange; up to the splice they are already divided by the reuse."""

    probe: Line
    request: Line
    pack: Line
    transfer: Line
    splice: Line
    rotate: Line
    attend: Line
    merge: Line

    @property
    def total(self) -> Line:
        return reduce(operator.add, self)


class StepParts(NamedTuple):
    """Seconds of one step; `exchange` is that of the slowest holder and overlaps `own`."""

    plan: Tensor
    own: Tensor
    exchange: Tensor
    merge: Tensor

    @property
    def total(self) -> Tensor:
        return self.plan + torch.maximum(self.own, self.exchange) + self.merge


class Load(NamedTuple):
    """What is asked of a holder: items, units they list, and the units that would be copied.

    `routed_items[f]` and `routed_units[f]` belong to the f-th of `LayerFacts.forms`.
    """

    routed_items: tuple[Tensor, ...]
    routed_units: tuple[Tensor, ...]
    fetched_items: Tensor
    fetched_units: Tensor
    fetched_unique: Tensor


class Exchange(NamedTuple):
    """Lines with what each of them asks, of every form and of the fetch."""

    routes: tuple[tuple[RouteLines, Asked], ...]
    fetch: tuple[FetchLines, Asked]

    @property
    def total(self) -> Tensor:
        """(W,) seconds."""
        lines, copied = self.fetch
        routed = [route.total.of(asked) for route, asked in self.routes]
        return reduce(operator.add, [*routed, lines.total.of(copied)])


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The formulas for one layer on one fabric; every method is a pure function.

    Args:
        unit_tokens: entries of one unit.
        reuse: expected uses R of a fetched unit, at least 1. Attention is paid at every use.
        splice: fetched units lie at other positions, so their rope keys are rotated once, as in a
            lease of a whole document.
        shifted: units lie at other positions, and queries are rotated where they meet them, once
            for each offset; one is counted.
    """

    facts: LayerFacts
    profile: FabricProfile
    unit_tokens: int = 1
    reuse: float = 1.0
    splice: bool = False
    shifted: bool = False

    def __post_init__(self) -> None:
        if self.unit_tokens < 1:
            raise ValueError(f"unit_tokens must be at least 1, got {self.unit_tokens}")
        if not (math.isfinite(self.reuse) and self.reuse >= 1):
            raise ValueError(f"reuse must be finite and at least 1, got {self.reuse}")

    def route(self, form: FormFacts, *, wait_s: Tensor, sharers: Tensor) -> RouteLines:
        """Routing items to one holder.

        Args:
            wait_s: what the holder is busy with before it starts.
            sharers: holders that this rank talks to at once; they share its egress and ingress.
        """
        device = self.profile.device
        listed_bytes = UNIT_ID_BYTES + OFFSET_BYTES * self.shifted
        sent = Line(used=HEADER_BYTES, items=form.out_bytes + QUERY_META_BYTES, units=listed_bytes)
        answered = Line(used=HEADER_BYTES, items=form.back_bytes + COVERAGE_BYTES)
        return RouteLines(
            probe=Line(used=self.profile.path.probe_s),
            send=sent / self._out_rate(sharers),
            project=Line(
                items=form.project_flop / device.flop_per_s,
                weights=form.weight_bytes / device.memory_bytes_per_s,
            ),
            rotate=self.rotate(),
            attend=self.attend(),
            back=answered / self._in_rate(sharers),
            merge=self.merge(form),
            wait=Line(used=wait_s),
        )

    def fetch(self, *, mixed: Tensor, sharers: Tensor) -> FetchLines:
        """Copying units from one holder.

        A path that can pull reads them one by one; otherwise their ids are sent and the holder
        packs them. `mixed`: others are routed to this holder, so a partial of its own is merged.
        """
        device, path, facts = self.profile.device, self.profile.path, self.facts
        if path.can_pull:
            granule = self.unit_tokens * facts.entry_bytes
            request = pack = Line()
            in_rate = torch.clamp(path.ingress_bytes_per_s / sharers, max=path.pull_rate(granule))
            reply = Line(unique=granule)
        else:
            request = Line(used=HEADER_BYTES, unique=UNIT_ID_BYTES) / self._out_rate(sharers)
            reply = Line(
                used=HEADER_BYTES, unique=self.unit_tokens * (facts.entry_bytes + MARK_BYTES)
            )
            pack = Line(used=device.pack_s) + reply / device.pack_bytes_per_s
            in_rate = self._in_rate(sharers)
        splice = Line()
        if self.splice and facts.rope_bytes:
            rotated = 2 * self.unit_tokens * facts.rope_bytes
            splice = Line(found=device.splice_s, unique=rotated / device.splice_bytes_per_s)
        return FetchLines(
            probe=Line(used=path.probe_s) / self.reuse,
            request=request / self.reuse,
            pack=pack / self.reuse,
            transfer=reply / in_rate / self.reuse,
            splice=splice / self.reuse,
            rotate=self.rotate(),
            attend=self.attend(),
            merge=self.merge(facts.forms[0]) * mixed.double(),
        )

    def asked(self, items: Tensor, units: Tensor, unique: Tensor) -> Asked:
        """Of one way at a holder; `unique` units are copied, so none where items are routed."""
        return Asked.of(items, units, unique, branches=self.facts.branches)

    def exchange(self, load: Load, *, wait_s: Tensor, sharers: Tensor) -> Exchange:
        """Both ways at one holder. Their times add up: they share the path and both probe it."""
        routed = reduce(operator.add, load.routed_items)
        none = torch.zeros_like(load.fetched_unique)
        return Exchange(
            routes=tuple(
                (
                    self.route(form, wait_s=wait_s, sharers=sharers),
                    self.asked(items, units, none),
                )
                for form, items, units in zip(
                    self.facts.forms, load.routed_items, load.routed_units, strict=True
                )
            ),
            fetch=(
                self.fetch(mixed=routed > 0, sharers=sharers),
                self.asked(load.fetched_items, load.fetched_units, load.fetched_unique),
            ),
        )

    def rotate(self) -> Line:
        """Rotating queries back by an offset, as the attention reads them."""
        read = 2 * self.facts.rotate_bytes / self.profile.device.splice_bytes_per_s
        return Line(items=read if self.shifted else 0.0)

    def attend(self) -> Line:
        """Attention over listed units; each item reads its own entries."""
        device = self.profile.device
        per_entry = max(
            self.facts.attend_flop / device.flop_per_s,
            self.facts.entry_bytes / device.memory_bytes_per_s,
        )
        return Line(used=device.attend_s, units=self.unit_tokens * per_entry)

    def merge(self, form: FormFacts) -> Line:
        """Merging one partial of each item."""
        device = self.profile.device
        return Line(used=device.merge_s, items=form.back_bytes / device.merge_bytes_per_s)

    def recompute(self, tokens: Tensor, *, layers: int, token_layer_s: float) -> Tensor:
        """Prefilling `tokens` here by the engine's callback, measured at `token_layer_s` each."""
        return tokens.double() * (layers * token_layer_s / self.reuse)

    def step(self, own: Tensor, exchanges: Tensor, items: Tensor) -> StepParts:
        """A step whose local attention takes `own` and whose holders take `exchanges`, (W,)."""
        none = torch.zeros_like(items)
        return StepParts(
            plan=torch.full_like(own, self.profile.device.plan_s),
            own=own,
            exchange=exchanges.amax(),
            merge=self.merge(self.facts.forms[0]).of(self.asked(items, none, none)),
        )

    def _out_rate(self, sharers: Tensor) -> Tensor:
        path = self.profile.path
        return torch.clamp(path.egress_bytes_per_s / sharers, max=path.push_bytes_per_s)

    def _in_rate(self, sharers: Tensor) -> Tensor:
        path = self.profile.path
        return torch.clamp(path.ingress_bytes_per_s / sharers, max=path.push_bytes_per_s)
