"""RECEIVE and MERGE: what answers must show, and their partials as one softmax per branch.

Letters: N items, W ranks, P routed pairs in holder order, F fetched units, U tokens of a unit, h heads
of a branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.coverage import differs, mix, tagged
from ...partition.layout import Form
from ..errors import Complaint
from ..transport.messages import Message
from ..world import World
from .attend import Partial
from .plan import FetchList, RouteLists, Wanted


class FetchedPart(NamedTuple):
    """Fetched rows (F * U, entry_bytes), their stored ids (F * U,), and which are as asked for."""

    rows: Tensor
    ids: Tensor
    came: Tensor


def routed_answers(
    world: World, layer: int, form: Form, lists: RouteLists, answers: list[Message | None]
) -> tuple[Partial, list[Complaint]]:
    """The partials of one form's pairs, and a complaint for each whose coverage is not as asked."""
    layout = world.config.model.layers[layer]
    asked, dim = lists.pairs.tolist(), layout.routed_dims(form)[1]
    heads, lse_dtype = layout.branch_heads, world.compute_dtype
    out = _gathered(world, f"{form}.out", world.config.dtype, (heads, dim), asked, answers)
    lse = _gathered(world, f"{form}.lse", lse_dtype, (heads,), asked, answers)
    covered = _gathered(world, f"{form}.covered", torch.int32, (2,), asked, answers)
    item = lists.items[: len(out)]
    expected = tagged(lists.expected[: len(out)], item)
    uncovered = differs(covered, expected)
    holder = torch.arange(world.world_size).repeat_interleave(lists.pairs)
    complaints = [
        Complaint(
            int(item[at]), int(holder[at]), f"covered {covered[at, 0]} of {expected[at, 0]} entries"
        )
        for at in uncovered.nonzero()[:, 0]
    ]
    unsound = ~out.isfinite().flatten(1).all(1) | (lse.isnan() | (lse == torch.inf)).any(1)
    unsound &= ~uncovered
    if bool(unsound.any()):
        culprit = int(holder[unsound.nonzero()[0, 0]])
        raise world.transport.accuse(culprit, f"answered layer {layer} with NaN or infinity")
    return Partial(out.to(lse_dtype), lse, item), complaints


def fetched_answers(
    world: World, layer: int, wanted: Wanted, fetch: FetchList, answers: list[Message | None]
) -> tuple[FetchedPart, list[Complaint]]:
    """The fetched rows, and a complaint for each item that needs an entry which did not come."""
    codec = world.stores.entries.codecs[layer]
    assert codec is not None
    unit_tokens = wanted.entries.shape[2]
    asked = (fetch.counts * unit_tokens).tolist()
    rows = _gathered(world, "fetch.rows", torch.uint8, (codec.entry_bytes,), asked, answers)
    mark = _gathered(world, "fetch.mark", torch.int32, (), asked, answers)
    units = fetch.units[: len(rows) // unit_tokens]
    ids = (units[:, None] + torch.arange(unit_tokens, dtype=torch.int32)).reshape(-1)
    missing = mark != mix(ids, world.tables.generations(ids))
    if not bool(missing.any()):
        return FetchedPart(rows, ids, ~missing), []
    place = fetch.place[..., None] * unit_tokens + torch.arange(unit_tokens)
    needed = (fetch.place >= 0)[..., None] & wanted.exists
    lost = needed & missing[torch.where(needed, place, 0)]
    holders = torch.where(lost.any(-1), wanted.holder, -1)
    complaints = [
        Complaint(item, holder, f"lacked {int(lost[item][holders[item] == holder].sum())} entries")
        for item in lost.flatten(1).any(1).nonzero()[:, 0].tolist()
        for holder in sorted(set(holders[item].tolist()) - {-1})
    ]
    return FetchedPart(rows, ids, ~missing), complaints


def check_fetched(world: World, layer: int, part: Partial, fetch: FetchList, rows: Tensor) -> None:
    """Accuse the rank whose fetched rows (F * U, entry_bytes) put NaN or infinity into a partial."""
    codec = world.stores.entries.codecs[layer]
    assert codec is not None
    if bool(part.out.isfinite().all()):
        return
    unsound = ~codec.decode(rows, world.compute_dtype).isfinite().all(1)
    per_unit = len(rows) // max(int(fetch.counts.sum()), 1)
    holder = torch.arange(world.world_size).repeat_interleave(fetch.counts * per_unit)
    if bool(unsound.any()):
        culprit = int(holder[unsound.nonzero()[0, 0]])
        raise world.transport.accuse(culprit, f"sent rows of layer {layer} with NaN or infinity")


def local_complaints(world: World, lacking: Tensor) -> list[Complaint]:
    """A complaint for each item (N,) whose own rank lacked entries."""
    items = lacking.nonzero()[:, 0].tolist()
    return [Complaint(at, world.rank, f"lacked {int(lacking[at])} entries") for at in items]


def merge_parts(
    world: World, layer: int, parts: Mapping[str, Sequence[Partial]], num_items: int
) -> tuple[Tensor, Tensor]:
    """All partials of each item merged: out (N, h, out_dim) and lse (N, h).

    Partials of form A are merged before W_UV is applied, those of form B come projected.
    """
    out, lse = _merge(parts["A"], num_items)
    weights = world.weights[layer]
    if weights is not None:
        latent = out.unflatten(0, (-1, world.config.num_branches))
        out = reference.project(latent, weights.w_uv).flatten(0, 1)
        everyone = torch.arange(num_items)
        out, lse = _merge([Partial(out, lse, everyone), *parts.get("B", ())], num_items)
    return out, lse


def _merge(parts: Sequence[Partial], num_items: int) -> tuple[Tensor, Tensor]:
    outs, lses, items = (torch.cat(column) for column in zip(*parts, strict=True))
    return reference.merge(outs, lses, items, num_items)


def _gathered(
    world: World,
    name: str,
    dtype: torch.dtype,
    trailing: tuple[int, ...],
    asked: list[int],
    answers: list[Message | None],
) -> Tensor:
    """One column of all answers in rank order; each rank must send just the rows it was asked for."""
    parts = [torch.empty(0, *trailing, dtype=dtype)]
    for rank, (count, message) in enumerate(zip(asked, answers, strict=True)):
        if message is None or (count == 0 and name not in message.columns):
            continue
        rows = message.columns.get(name)
        if rows is None or rows.dtype != dtype or rows.shape != (count, *trailing):
            got = "nothing" if rows is None else f"{rows.dtype} {tuple(rows.shape)}"
            raise world.transport.accuse(
                rank, f"answered {name!r} with {got}, asked for {dtype} {(count, *trailing)}"
            )
        parts.append(rows)
    return torch.cat(parts)
