"""Asking and answering: the two halves of an exchange, their columns, and what answers must show.

Letters: N items, W ranks, P routed pairs in holder order, F fetched units, U tokens of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ...kernels.coverage import differs, mix, tagged
from ...partition.layout import Form
from ..errors import CoverageError
from ..scope import Scope, units_visible
from ..transport.base import Column
from ..transport.messages import Header, Message
from ..world import World
from .answer import check_columns, take_pushes
from .attend import Partial
from .index import BestUnits
from .plan import FetchList, RouteLists, Wanted

T = TypeVar("T")
Answer = Callable[[World, Message], Mapping[str, Tensor]]


class FetchedPart(NamedTuple):
    """Fetched rows (F * U, entry_bytes), their stored ids (F * U,), and which are as asked for."""

    rows: Tensor
    ids: Tensor
    came: Tensor


class Complaint(NamedTuple):
    """An item that was not served as asked, by whom, and how."""

    item: int
    holder: int
    what: str


def exchange(
    world: World,
    header: Header,
    columns: list[Column],
    answer: Answer,
    own_work: Callable[[], T],
    replaceable: Tensor | None = None,
) -> tuple[T, list[Message | None]]:
    """Ask everyone, answer everyone, do own work; returns the work's result and everyone's answers.

    The own work comes last, so that it overlaps with the others' answers and reads what peers wrote
    for this rank; all writes are taken before anyone is answered. In service only those are asked of
    whom something is wanted, and the server answers; `replaceable` (W,) bool says instead of whom
    others could be asked.
    """
    if world.service is not None:
        return world.service.exchange(header, columns, own_work, replaceable)
    transport, stats = world.transport, world.stats
    visitors = settle(world, header, columns)
    with stats.phase("answer"):
        answers = [
            {} if visitor is None else blaming(world, rank, answer, visitor)
            for rank, visitor in enumerate(visitors)
        ]
        reply = replace(header, kind=f"{header.kind}-answer")
        transport.post_shares(reply, answers)
    with stats.phase("attend own"):
        own = own_work()
    with stats.phase("wait"):
        given = transport.collect(reply)
    for rank, message in enumerate(given):
        if message is not None:
            blaming(world, rank, check_columns, message)
    world.answered = header
    return own, given


def settle(world: World, header: Header, columns: Sequence[Column] = ()) -> list[Message | None]:
    """Ask everyone, and take the writes of all peers; returns what they ask."""
    if world.service is not None:
        # Whoever is written to confirms it; what they write comes any time.
        world.service.exchange(header, columns, lambda: None)
        return [None] * world.world_size
    world.epoch += 1
    world.answered = None
    proven = len(world.sent)
    world.sent.append((header.layer, world.staged_at(header.layer)))
    with world.stats.phase("send"):
        world.transport.post(header, [*columns, *world.take_pushes(header.layer)])
    with world.stats.phase("wait"):
        visitors = world.transport.collect(header)
    del world.sent[:proven]  # who takes this step took the writes of the last one
    world.settled = world.directory
    with world.stats.phase("answer"):
        for rank, visitor in enumerate(visitors):
            if visitor is not None:
                blaming(world, rank, check_columns, visitor)
                blaming(world, rank, take_pushes, visitor)
    if world.gpu is not None:
        _check_layers(world, header, visitors)
        world.gpu.flush(world)
    return visitors


def _check_layers(world: World, header: Header, visitors: Sequence[Message | None]) -> None:
    """On GPUs a step is of one layer: whatever a rank is asked there, it attends at its own."""
    for rank, visitor in enumerate(visitors):
        if visitor is not None and visitor.header.layer != header.layer:
            raise world.transport.accuse(
                rank,
                f"is at layer {visitor.header.layer}, rank {world.rank} at {header.layer}: with "
                "entries on GPUs all ranks take the same layers in the same order",
            )


def broadcast(name: str, rows: Tensor, world: World, to: Tensor | None = None) -> Column:
    """The same rows for every other rank, or for the ranks `to` (W,) bool."""
    counts = torch.full((world.world_size,), len(rows))
    if to is not None:
        counts = counts * to
    return Column(name, rows, counts, torch.arange(len(rows)).repeat(world.world_size))


def route_columns(
    form: Form, lists: RouteLists, query: Tensor, hidden: Tensor, unit_tokens: int
) -> list[Column]:
    """What travels for routed pairs: query (N, h, D) rows, who they are, and their unit lists."""
    columns = [
        Column(f"{form}.query", query, lists.pairs, lists.items),
        Column(f"{form}.item", lists.items.to(torch.int32), lists.pairs),
        Column(f"{form}.count", lists.units_of.to(torch.int32), lists.pairs),
        Column(f"{form}.units", lists.units, lists.listed),
    ]
    if unit_tokens > 1:
        columns.append(Column(f"{form}.hidden", hidden, lists.pairs, lists.items))
    if lists.offsets is not None:
        columns.append(Column(f"{form}.offsets", lists.offsets, lists.listed))
    return columns


def candidates(
    world: World,
    layer: int,
    own: BestUnits,
    answers: list[Message | None],
    scope: Scope,
    unit_tokens: int,
    askable: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores (Q, M) and unit ids (Q, M) of every rank's best units, own ones first.

    Raises: CoverageError unless every entry in a query's scope was scored, once.
    """
    found = [own]
    queries = len(own.score)
    visible = scope.runs[..., 1].sum(1)
    for rank, message in enumerate(answers):
        if message is None or queries == 0:
            continue
        score, ids = message.columns.get("score"), message.columns.get("id")
        seen = message.columns.get("seen")
        well_formed = (
            score is not None
            and ids is not None
            and seen is not None
            and seen.shape == own.seen.shape
            and seen.dtype == torch.int32
            and score.dtype == own.score.dtype
            and ids.dtype == torch.int32
            and score.dim() == 1
            and score.shape == ids.shape
            and len(score) % queries == 0
        )
        if not well_formed:
            raise world.transport.accuse(rank, f"sent malformed candidates for {queries} queries")
        assert score is not None
        assert ids is not None
        assert seen is not None
        best = BestUnits(score.view(queries, -1), ids.view(queries, -1), seen)
        listed = best.id >= 0
        ordered = best.id.sort(1).values
        repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        foreign = listed & ~units_visible(best.id, scope.runs, unit_tokens)
        block = best.id.long() * unit_tokens // world.config.block_tokens
        foreign |= listed & (world.scorers(block, askable) != rank)
        if bool(repeats.any() | foreign.any() | (listed & ~best.score.isfinite()).any()):
            raise world.transport.accuse(
                rank, "sent candidates that are not its own, nobody may see, twice, or unscored"
            )
        found.append(best)
    scored = torch.stack([best.seen for best in found])
    wrong = (scored.sum(0) != visible).nonzero()[:, 0]
    if len(wrong):
        query = int(wrong[0])
        world.stats.failures["coverage"] += 1
        raise CoverageError(
            f"layer {layer}: query {query} sees {int(visible[query])} entries, index keys of "
            f"{int(scored[:, query].sum())} were scored ({scored[:, query].tolist()} by rank, "
            f"rank {world.rank} first); {len(wrong)} queries in all",
            tuple(range(world.world_size)),
        )
    return torch.cat([b.score for b in found], dim=1), torch.cat([b.id for b in found], dim=1)


def local_complaints(world: World, lacking: Tensor) -> list[Complaint]:
    """A complaint for each item (N,) whose own rank lacked entries."""
    items = lacking.nonzero()[:, 0].tolist()
    return [Complaint(at, world.rank, f"lacked {int(lacking[at])} entries") for at in items]


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
    codec = world.entries.codecs[layer]
    assert codec is not None
    unit_tokens = wanted.entries.shape[2]
    asked = (fetch.counts * unit_tokens).tolist()
    rows = _gathered(world, "fetch.rows", torch.uint8, (codec.entry_bytes,), asked, answers)
    mark = _gathered(world, "fetch.mark", torch.int32, (), asked, answers)
    units = fetch.units[: len(rows) // unit_tokens]
    ids = (units[:, None] + torch.arange(unit_tokens, dtype=torch.int32)).reshape(-1)
    missing = mark != mix(ids, world.generations(ids))
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
    codec = world.entries.codecs[layer]
    assert codec is not None
    if bool(part.out.isfinite().all()):
        return
    unsound = ~codec.decode(rows, world.compute_dtype).isfinite().all(1)
    per_unit = len(rows) // max(int(fetch.counts.sum()), 1)
    holder = torch.arange(world.world_size).repeat_interleave(fetch.counts * per_unit)
    if bool(unsound.any()):
        culprit = int(holder[unsound.nonzero()[0, 0]])
        raise world.transport.accuse(culprit, f"sent rows of layer {layer} with NaN or infinity")


def coverage_error(world: World, layer: int, complaints: list[Complaint]) -> CoverageError:
    """Names layer, queries and holders; the first few in words."""
    world.stats.failures["coverage"] += 1
    branches = world.config.num_branches
    said = [
        f"query {item // branches} at rank {holder} {what}" for item, holder, what in complaints[:4]
    ]
    more = f"; and {len(complaints) - 4} more" if len(complaints) > 4 else ""
    holders = tuple(sorted({complaint.holder for complaint in complaints}))
    return CoverageError(f"layer {layer}: {'; '.join(said)}{more}", holders)


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


def blaming(world: World, rank: int, work: Callable[[World, Message], T], message: Message) -> T:
    """Do the work a peer asked for; what is wrong with its message is its fault."""
    try:
        return work(world, message)
    except ValueError as error:
        raise world.transport.accuse(rank, f"sent what cannot be: {error}") from error
