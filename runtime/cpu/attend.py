"""Attention over what this rank can read: its pool and leases, and rows that were just fetched.

Letters: M rows of work, N items, h heads of a branch, K units of an item, U tokens of a unit,
E entries of a row, F fetched units. The arithmetic is `kernels.reference`; here it is given its
entries, tile by tile within the workspace.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels import reference
from ...partition.rope import rotate
from ..world import World
from .plan import FetchList, Wanted


class Partial(NamedTuple):
    """Attention over a subset: out (P, h, D), lse (P, h), of item (P,) int64."""

    out: Tensor
    lse: Tensor
    item: Tensor


def attend_local(world: World, layer: int, rows: Tensor, wanted: Wanted) -> tuple[Partial, Tensor]:
    """Partials of all items, rows (N, h, K), over their units in this rank's pool and leases.

    Also returns how many entries of each item (N,) should be here and were never written.
    """
    here = (wanted.holder == world.rank)[..., None] & wanted.visible
    ids = torch.where(here, wanted.entries, -1).flatten(1)
    index, valid = world.stores.entries.resolve(layer, ids)
    if layer == 0:  # one layer stands for all: a block is used by every one of them
        world.stores.entries.touch(index[valid])
    if world.config.lease_entries:
        lease, leased = world.stores.leases[layer].find(ids, world.tables.generations(ids))
        leased &= ~valid
        index, valid = torch.where(leased, lease, index), valid | leased
        world.stores.leases[layer].touch(lease[leased])
        world.stats.leases["hit"] += int(leased.sum())
    offsets = entry_offsets(wanted.offsets, wanted.entries.shape[2])
    out, lse = attend_at(
        world, layer, rows, index, valid, pool_reader(world, layer), offsets=offsets
    )
    # Of the corpus the plan knows which entries exist; a request has all its tokens up to itself.
    private = wanted.entries // world.config.block_tokens >= len(world.directory.owners)
    lacking = ((wanted.exists | private) & here).flatten(1) & ~valid
    return Partial(out, lse, torch.arange(len(rows))), lacking.sum(1)


def attend_fetched(
    world: World, layer: int, rows: Tensor, wanted: Wanted, fetch: FetchList, fetched: Tensor
) -> Partial:
    """Partials of all items over fetched entries (F * U, entry_bytes), in the order of `fetch`."""
    unit_tokens = wanted.entries.shape[2]
    index = fetch.place[..., None] * unit_tokens + torch.arange(unit_tokens)
    valid = (fetch.place >= 0)[..., None] & wanted.exists
    codec = world.stores.entries.codecs[layer]
    assert codec is not None

    def read(at: Tensor) -> Tensor:
        entries = codec.decode(fetched.index_select(0, at.flatten()), world.compute_dtype)
        return entries.view(*at.shape, codec.dim)

    index = torch.where(valid, index, 0).flatten(1)
    offsets = entry_offsets(wanted.offsets, unit_tokens)
    out, lse = attend_at(world, layer, rows, index, valid.flatten(1), read, offsets=offsets)
    return Partial(out, lse, torch.arange(len(rows)))


def keep_leases(world: World, layer: int, ids: Tensor, came: Tensor, fetched: Tensor) -> None:
    """Keep fetched rows (n, entry_bytes) of stored ids (n,) that `came` and are not leased yet."""
    if world.config.lease_entries == 0:
        return
    generations = world.tables.generations(ids)
    new = came & ~world.stores.leases[layer].find(ids, generations)[1]
    world.stats.leases["evicted"] += world.stores.leases[layer].admit(
        ids[new], generations[new], fetched[new]
    )


def entry_offsets(offsets: Tensor | None, unit_tokens: int) -> Tensor | None:
    """Offsets (N, K) of units as those of their entries (N, K * U)."""
    return None if offsets is None else offsets.repeat_interleave(unit_tokens, dim=1)


def attend_at(
    world: World,
    layer: int,
    rows: Tensor,
    index: Tensor,
    valid: Tensor,
    read: Callable[[Tensor], Tensor],
    *,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `attend_entries`, with each entry attached `offsets` (M, E) positions from its own.

    A score depends on the distance alone, so the query is rotated back rather than the entry on:
    once for every offset that a row meets, whose partials are merged here.
    """
    rope = world.config.model.layers[layer].rope
    if offsets is None or rope is None:
        return attend_entries(world, layer, rows, index, valid, read)
    row, offset = valid.nonzero()[:, 0], offsets[valid].long()
    distinct, which = (row * 2**32 + offset + 2**31).unique(return_inverse=True)
    of, offset = distinct // 2**32, distinct % 2**32 - 2**31
    row_bytes = rows.shape[1] * rows.shape[2] * rows.element_size()
    if len(distinct) * row_bytes > world.config.workspace_bytes and len(rows) > 1:
        halves = (slice(0, len(rows) // 2), slice(len(rows) // 2, len(rows)))
        parts = [
            attend_at(world, layer, rows[h], index[h], valid[h], read, offsets=offsets[h])
            for h in halves
        ]
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out, lse
    rest, rotary = rows[of].tensor_split((-rope.dim,), dim=-1)
    turned = torch.cat((rest, rotate(rotary, -offset, rope)), dim=-1)
    listed = index[valid][which.argsort(stable=True)]
    listed = padded_lists(listed, torch.bincount(which, minlength=len(distinct)))
    out, lse = attend_entries(world, layer, turned, listed.clamp(min=0), listed >= 0, read)
    return reference.merge(out, lse, of, len(rows))


def padded_lists(values: Tensor, counts: Tensor) -> Tensor:
    """Consecutive lists of `counts` values each, as rows padded with -1."""
    counts = counts.long()
    at = torch.arange(int(counts.max()) if len(counts) else 0)
    index = (counts.cumsum(0) - counts)[:, None] + at
    listed = at < counts[:, None]
    return torch.where(listed, values[torch.where(listed, index, 0)], -1)


def attend_entries(
    world: World,
    layer: int,
    rows: Tensor,
    index: Tensor,
    valid: Tensor,
    read: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`reference.attend` in tiles of rows that stay within the workspace.

    Args:
        rows: (M, h, K) absorbed queries. index: (M, E) int64 entry indices for `read`, valid: (M, E).
    Returns: out (M, h, C) and lse (M, h) in the computing dtype.
    """
    layout = world.config.model.layers[layer]
    index, valid = _packed(index, valid)
    width = rows.element_size() * index.shape[1]
    row_bytes = width * (2 * layout.entry_dim + 3 * layout.branch_heads) + 1
    step = max(world.config.workspace_bytes // row_bytes, 1)
    out = rows.new_empty(len(rows), layout.branch_heads, layout.value_dim)
    lse = rows.new_empty(len(rows), layout.branch_heads)
    for start in range(0, len(rows), step):
        tile = slice(start, start + step)
        out[tile], lse[tile] = reference.attend(
            rows[tile],
            read(index[tile]),
            valid[tile],
            value_dim=layout.value_dim,
            scale=layout.softmax_scale,
        )
    return out, lse


def pool_reader(world: World, layer: int) -> Callable[[Tensor], Tensor]:
    """Reads decoded entries of the pool (leases included) by entry index."""
    return lambda index: world.stores.entries.read(layer, index, world.compute_dtype)


def by_branch(
    rows: Tensor, branch: Tensor, weight: Tensor, verb: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`verb` with each row's own branch weights: rows (P, h, D), branch (P,), weight (G, ...)."""
    parts = [(branch == b).nonzero()[:, 0] for b in range(len(weight))]
    done = [verb(rows[at][:, None], weight[b : b + 1])[:, 0] for b, at in enumerate(parts)]
    out = done[0].new_empty(len(rows), *done[0].shape[1:])
    for at, part in zip(parts, done, strict=True):
        out[at] = part
    return out


def _packed(index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Valid entries first, columns cut to the longest row."""
    longest = int(valid.sum(1).max()) if valid.numel() else 0
    if longest == valid.shape[1]:
        return index, valid
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    return index.gather(1, order), valid.gather(1, order)
