"""From a selection to who is asked for what: tensors of static capacity, counts on the device.

Letters: Q queries, G branches, N = Q * G items (one (query, branch) each), K units of an item,
W ranks, B tokens of a block, U tokens of a unit. A unit is named by the stored id of its first
entry. Nothing here depends on data for its shape or reads a value to the host, so a plan runs under
FakeTensorMode, and on a device without a round trip. Capacity beyond the counts holds anything.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.coverage import coverage, to_int32
from ..cost.predicate import Demand
from ..tables import chosen_copy

_NOWHERE = torch.iinfo(torch.int64).max


class Wanted(NamedTuple):
    """What the items of a step want, with holders chosen and local units known.

    units: (N, K) int32, -1 padding. entries: (N, K, U) int32, the stored ids inside each unit.
    visible: (N, K, U) bool, listed and not ahead of the query. exists: (N, K, U) bool, visible and
    in a document of the corpus. holder: (N, K) int64, who is asked; `rank` for local units, W for
    padding. demand: what the predicate reads. run: (N * K,) int64, which distinct (holder, unit)
    each listed unit is; run_unit, run_holder: (N * K,) its value. offsets: (N, K) int32, how far
    each unit is attached from its own positions, None if none is.
    """

    units: Tensor
    entries: Tensor
    visible: Tensor
    exists: Tensor
    holder: Tensor
    demand: Demand
    run: Tensor
    run_unit: Tensor
    run_holder: Tensor
    offsets: Tensor | None = None


class RouteLists(NamedTuple):
    """Routed (item, holder) pairs of one payload form, grouped by holder, items ascending.

    items, units_of: (W * N,) item and number of units of each pair. expected: (W * N, 2) int32
    coverage each answer must show. units: (N * K,) int32 the units of pair after pair, and their
    offsets if any differs from 0. pairs, listed: (W,) pairs and units per holder.
    """

    items: Tensor
    units_of: Tensor
    expected: Tensor
    units: Tensor
    pairs: Tensor
    listed: Tensor
    offsets: Tensor | None


class FetchList(NamedTuple):
    """Distinct units to fetch, grouped by holder.

    units: (N * K,) int32. counts: (W,). place: (N, K) int64 position of each listed unit in
    `units`, -1 where it is not fetched.
    """

    units: Tensor
    counts: Tensor
    place: Tensor


def stored_units(
    ids: Tensor, *, unit_tokens: int, block_tokens: int, num_branches: int
) -> tuple[Tensor, int]:
    """Stored ids of the units' first entries, one row per item.

    Args:
        ids: (Q, K) shared by the branches, or (Q, G, K), int32 unit ids, -1 padding. A unit larger
            than a block becomes its blocks.
    Returns:
        (N, K') int32 and the tokens U of each unit, at most a block.
    """
    if ids.dim() == 2:
        ids = ids[:, None, :].expand(-1, num_branches, -1)
    per_block = max(unit_tokens // block_tokens, 1)
    part = torch.arange(per_block) * block_tokens
    first = ids.long()[..., None] * unit_tokens + part
    branch = torch.arange(num_branches)[:, None, None]
    stored = (first // block_tokens * num_branches + branch) * block_tokens + first % block_tokens
    stored = torch.where(ids[..., None] >= 0, stored, -1).to(torch.int32)
    shape = (ids.shape[0] * num_branches, ids.shape[2] * per_block)
    return stored.reshape(shape), min(unit_tokens, block_tokens)


def unit_entries(
    units: Tensor, hidden: Tensor, *, unit_tokens: int, block_tokens: int, num_branches: int
) -> tuple[Tensor, Tensor]:
    """Stored ids (N, K, U) of the entries of each unit, and which of them are not hidden or padding.

    Args: hidden: (N, 2) int32; entry ids in [hidden[0], hidden[1]) lie ahead of the query.
    """
    ids = units[..., None] + torch.arange(unit_tokens, dtype=torch.int32)
    listed = units[..., None] >= 0
    block = ids // (block_tokens * num_branches)
    entry = block * block_tokens + ids % block_tokens
    ahead = (entry >= hidden[:, None, None, 0]) & (entry < hidden[:, None, None, 1])
    return torch.where(listed, ids, -1), listed & ~ahead


def want(
    units: Tensor,
    entries: Tensor,
    visible: Tensor,
    exists: Tensor,
    local: Tensor,
    owners: Tensor,
    *,
    rank: int,
    world_size: int,
    block_tokens: int,
    offsets: Tensor | None = None,
    askable: Tensor | None = None,
) -> Wanted:
    """Choose a holder for every unit and count what each holder is asked for.

    Args:
        local: (N, K) bool, units owned, replicated or leased here. Among the copies of other units
        a rank prefers copy `rank % R`, so that its requests meet few holders and different
        ranks different ones.
        askable: as for `chosen_copy`. Who cannot be asked for any copy of a unit has no holder for
        it, as padding has none.
    """
    num_items, num_listed = units.shape
    keys = (units.long() // block_tokens).clamp(0, len(owners) - 1)
    copies = owners[keys]
    holder = torch.where(local, rank, chosen_copy(copies, rank % copies.shape[-1], askable))
    holder = torch.where((units >= 0) & (holder >= 0), holder, world_size)
    counts = torch.zeros(num_items, world_size + 1, dtype=torch.int64)
    counts = counts.scatter_add(1, holder, torch.ones_like(holder))[:, :world_size]

    flat = num_items * num_listed
    remote = (holder != rank) & (holder < world_size)
    distinct = torch.where(remote, holder * 2**31 + units.long(), _NOWHERE).reshape(-1)
    ordered, order = distinct.sort(stable=True)
    starts = torch.ones(flat, dtype=torch.int64)
    starts[1:] = (ordered[1:] != ordered[:-1]).long()
    run_ordered = starts.cumsum(0) - 1
    run = torch.empty(flat, dtype=torch.int64).scatter(0, order, run_ordered)
    sharers = torch.zeros(flat, dtype=torch.int64).scatter_add(0, run, torch.ones_like(run))
    run_key = torch.full((flat,), _NOWHERE).scatter(0, run_ordered, ordered)
    run_used = run_key != _NOWHERE
    run_holder = torch.where(run_used, run_key // 2**31, world_size)
    run_unit = torch.where(run_used, run_key % 2**31, -1).to(torch.int32)

    share = 1.0 / sharers.double()[run].reshape(num_items, num_listed)
    fair = torch.where(remote, share, 0.0)
    fair_units = torch.zeros(num_items, world_size + 1, dtype=torch.float64)
    fair_units = fair_units.scatter_add(1, holder, fair)[:, :world_size]
    unique = torch.zeros(world_size + 1, dtype=torch.int64)
    unique = unique.scatter_add(0, run_holder, run_used.long())[:world_size]
    demand = Demand(pairs_units=counts, unique_units=unique, fair_units=fair_units)
    return Wanted(
        units, entries, visible, exists, holder, demand, run, run_unit, run_holder, offsets
    )


def existing(
    entries: Tensor, visible: Tensor, tokens: Tensor, *, block_tokens: int, num_branches: int
) -> Tensor:
    """(N, K, U) bool: the visible entries that documents of the corpus have; `tokens` per block."""
    block = entries.long() // (block_tokens * num_branches)
    known = visible & (block < len(tokens))
    return known & (entries % block_tokens < tokens[block.clamp(0, len(tokens) - 1)])


def route(
    wanted: Wanted, way: Tensor, form: int, generations: Tensor, *, block_tokens: int
) -> RouteLists:
    """The pairs whose way (N, W) is `form`, and what their answers must cover."""
    (num_items, num_listed), world_size = wanted.units.shape, way.shape[1]
    pairs = world_size * num_items
    item = torch.arange(num_items)[:, None].expand(-1, num_listed)
    holder = wanted.holder.clamp(max=world_size - 1)
    chosen = (wanted.holder < world_size) & (way[item, holder] == form)
    pair = torch.where(chosen, holder * num_items + item, pairs).reshape(-1)
    order = pair.argsort(stable=True)
    offsets = None if wanted.offsets is None else wanted.offsets.reshape(-1)[order]

    ones = torch.ones_like(pair)
    units_of = torch.zeros(pairs + 1, dtype=torch.int64).scatter_add(0, pair, ones)[:pairs]
    keys = (wanted.entries.long() // block_tokens).clamp(0, len(generations) - 1)
    per_unit = coverage(wanted.entries, generations[keys], wanted.exists).reshape(-1, 2)
    expected = torch.zeros(pairs + 1, 2, dtype=torch.int64).index_add(0, pair, per_unit.long())

    asked = units_of > 0
    seat = torch.where(asked, asked.long().cumsum(0) - 1, pairs)
    items = torch.arange(num_items).repeat(world_size)
    return RouteLists(
        items=_seated(items, seat),
        units_of=_seated(units_of, seat),
        expected=_seated(to_int32(expected[:pairs]), seat),
        units=wanted.units.reshape(-1)[order],
        pairs=asked.reshape(world_size, num_items).sum(1),
        listed=units_of.reshape(world_size, num_items).sum(1),
        offsets=offsets,
    )


def fetch(wanted: Wanted, way: Tensor, fetched: int) -> FetchList:
    """The distinct units of the pairs whose way (N, W) is `fetched`."""
    (num_items, num_listed), world_size = wanted.units.shape, way.shape[1]
    flat = num_items * num_listed
    item = torch.arange(num_items)[:, None].expand(-1, num_listed)
    holder = wanted.holder.clamp(max=world_size - 1)
    chosen = ((wanted.holder < world_size) & (way[item, holder] == fetched)).reshape(-1)
    run_chosen = torch.zeros(flat, dtype=torch.int64).scatter_add(0, wanted.run, chosen.long()) > 0
    seat = torch.where(run_chosen, run_chosen.long().cumsum(0) - 1, flat)
    counts = torch.zeros(world_size + 1, dtype=torch.int64)
    counts = counts.scatter_add(0, wanted.run_holder, run_chosen.long())[:world_size]
    place = torch.where(chosen, seat[wanted.run], -1).reshape(num_items, num_listed)
    return FetchList(units=_seated(wanted.run_unit, seat), counts=counts, place=place)


def no_fetch(wanted: Wanted, world_size: int) -> FetchList:
    """A list of nothing."""
    return FetchList(
        units=wanted.units.new_empty(0),
        counts=torch.zeros(world_size, dtype=torch.int64),
        place=torch.full(wanted.units.shape, -1),
    )


def _seated(values: Tensor, seat: Tensor) -> Tensor:
    """Move row i to row seat[i]; a seat equal to the length drops the row."""
    room = torch.zeros(len(seat) + 1, *values.shape[1:], dtype=values.dtype)
    index = seat.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return room.scatter(0, index, values)[:-1]
