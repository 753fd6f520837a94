"""What one exchange costs: the formulas of route, fetch and recompute, part by part, in seconds.

    route     = probe + send + wait(h) + project(n) + turn(n) + attend(n, k) + back + merge
    fetch     = (probe + request + pack(k) + transfer + splice) / R + turn(n) + attend(n, k)
                + merge if mixed
    recompute = a * tokens * layers / R
    step      = plan + max(own work, max over holders of its exchange) + merge

After arXiv 2606.01502, with reuse, payload forms and listed units added. An item is one (query,
branch). N items, W ranks. Everything is elementwise float64 torch on broadcastable tensors and
reads nothing back to the host.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
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

    `rope_bytes` are the rotary columns of an entry, `turn_bytes` those of an item's query rows.
    """

    branches: int
    entry_bytes: int
    rope_bytes: int
    turn_bytes: int
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
            turn_bytes=rows * layout.rope_dim * element_bytes,
            attend_flop=2 * rows * (layout.key_dim + layout.value_dim),
            forms=(facts("A", 0), facts("B", weights)) if projection else (facts("A", 0),),
        )


class RouteParts(NamedTuple):
    """Seconds of a routed exchange."""

    probe: Tensor
    send: Tensor
    wait: Tensor
    project: Tensor
    turn: Tensor
    attend: Tensor
    back: Tensor
    merge: Tensor

    @property
    def total(self) -> Tensor:
        return _sum(self)


class FetchParts(NamedTuple):
    """Seconds of a fetching exchange; up to the splice they are already divided by the reuse."""

    probe: Tensor
    request: Tensor
    pack: Tensor
    transfer: Tensor
    splice: Tensor
    turn: Tensor
    attend: Tensor
    merge: Tensor

    @property
    def total(self) -> Tensor:
        return _sum(self)


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
    routes: tuple[RouteParts, ...]
    fetch: FetchParts

    @property
    def total(self) -> Tensor:
        return _sum(route.total for route in self.routes) + self.fetch.total


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """The formulas for one layer on one fabric; every method is a pure function of its tensors.

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

    def route(
        self, form: FormFacts, items: Tensor, units: Tensor, *, wait_s: Tensor, sharers: Tensor
    ) -> RouteParts:
        """Routing `items` that list `units` in all to one holder; nothing if there are none.

        Args:
            wait_s: what the holder is busy with before it starts.
            sharers: holders that this rank talks to at once; they share its egress and ingress.
        """
        items, units, device = items.double(), units.double(), self.profile.device
        used = (items > 0).double()
        listed_bytes = UNIT_ID_BYTES + OFFSET_BYTES * self.shifted
        lists = items * QUERY_META_BYTES + units * listed_bytes
        weights = torch.clamp(items, max=self.facts.branches) * form.weight_bytes
        return RouteParts(
            probe=used * self.profile.path.probe_s,
            send=(used * HEADER_BYTES + items * form.out_bytes + lists) / self._out_rate(sharers),
            wait=used * wait_s,
            project=weights / device.memory_bytes_per_s
            + items * form.project_flop / device.flop_per_s,
            turn=self.turn(items),
            attend=self.attend(items, units),
            back=(used * HEADER_BYTES + items * (form.back_bytes + COVERAGE_BYTES))
            / self._in_rate(sharers),
            merge=self.merge(form, items),
        )

    def fetch(
        self, items: Tensor, units: Tensor, unique: Tensor, *, mixed: Tensor, sharers: Tensor
    ) -> FetchParts:
        """Copying `unique` units from one holder for `items` that list `units` in all.

        A path that can pull reads them one by one; otherwise their ids are sent and the holder
        packs them. `mixed`: others are routed to this holder, so a partial of its own is merged.
        """
        items, unique, device = items.double(), unique.double(), self.profile.device
        used, path, entries = (items > 0).double(), self.profile.path, unique * self.unit_tokens
        if path.can_pull:
            granule = self.unit_tokens * self.facts.entry_bytes
            request = pack = torch.zeros_like(unique)
            in_rate = torch.clamp(path.ingress_bytes_per_s / sharers, max=path.pull_rate(granule))
            reply = entries * self.facts.entry_bytes
        else:
            request = (used * HEADER_BYTES + unique * UNIT_ID_BYTES) / self._out_rate(sharers)
            reply = used * HEADER_BYTES + entries * (self.facts.entry_bytes + MARK_BYTES)
            pack = used * device.pack_s + reply / device.pack_bytes_per_s
            in_rate = self._in_rate(sharers)
        rotated = 2 * entries * self.facts.rope_bytes if self.splice else torch.zeros_like(unique)
        splice = (rotated > 0) * device.splice_s + rotated / device.splice_bytes_per_s
        return FetchParts(
            probe=used * path.probe_s / self.reuse,
            request=request / self.reuse,
            pack=pack / self.reuse,
            transfer=reply / in_rate / self.reuse,
            splice=splice / self.reuse,
            turn=self.turn(items),
            attend=self.attend(items, units),
            merge=mixed.double() * self.merge(self.facts.forms[0], items),
        )

    def exchange(self, load: Load, *, wait_s: Tensor, sharers: Tensor) -> Exchange:
        """Both ways at one holder. Their times add up: they share the path and both probe it."""
        routed = _sum(load.routed_items)
        return Exchange(
            routes=tuple(
                self.route(form, items, units, wait_s=wait_s, sharers=sharers)
                for form, items, units in zip(
                    self.facts.forms, load.routed_items, load.routed_units, strict=True
                )
            ),
            fetch=self.fetch(
                load.fetched_items,
                load.fetched_units,
                load.fetched_unique,
                mixed=routed > 0,
                sharers=sharers,
            ),
        )

    def turn(self, items: Tensor) -> Tensor:
        """Rotating the queries of `items` back by an offset, as the attention reads them."""
        read = 2 * self.facts.turn_bytes / self.profile.device.splice_bytes_per_s
        return items.double() * (read if self.shifted else 0.0)

    def attend(self, items: Tensor, units: Tensor) -> Tensor:
        """Attention of `items` over `units` listed units in all; each reads its own entries."""
        device = self.profile.device
        per_entry = max(
            self.facts.attend_flop / device.flop_per_s,
            self.facts.entry_bytes / device.memory_bytes_per_s,
        )
        return (items > 0).double() * device.attend_s + units.double() * (
            self.unit_tokens * per_entry
        )

    def merge(self, form: FormFacts, items: Tensor) -> Tensor:
        """Merging one partial of each of `items`."""
        device = self.profile.device
        items = items.double()
        return (items > 0).double() * device.merge_s + items * (
            form.back_bytes / device.merge_bytes_per_s
        )

    def recompute(self, tokens: Tensor, *, layers: int, token_layer_s: float) -> Tensor:
        """Prefilling `tokens` here by the engine's callback, measured at `token_layer_s` each."""
        return tokens.double() * (layers * token_layer_s / self.reuse)

    def step(self, own: Tensor, exchanges: Tensor, items: Tensor) -> StepParts:
        """A step whose local attention takes `own` and whose holders take `exchanges`, (W,)."""
        return StepParts(
            plan=torch.full_like(own, self.profile.device.plan_s),
            own=own,
            exchange=exchanges.amax(),
            merge=self.merge(self.facts.forms[0], items),
        )

    def _out_rate(self, sharers: Tensor) -> Tensor:
        path = self.profile.path
        return torch.clamp(path.egress_bytes_per_s / sharers, max=path.push_bytes_per_s)

    def _in_rate(self, sharers: Tensor) -> Tensor:
        path = self.profile.path
        return torch.clamp(path.ingress_bytes_per_s / sharers, max=path.push_bytes_per_s)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(operator.add, parts)
