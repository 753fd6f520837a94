"""ATTEND OTHERS: what a rank does for those who ask it. It attends over its blocks, hands out copies of
entries, and scores its index keys.

Columns arrive with the dtypes and dimensions of `transport/schema.py`. What they say is checked against
the layout before it is used: a ValueError here names the sender. Ids of the corpus that are not here,
or not written, add nothing, and the coverage says so.

Letters: P routed pairs of one message, h heads of a branch, U listed units, F units to fetch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.coverage import coverage, mix, tagged
from ...partition.layout import Form
from ..scope import MAX_OFFSETS, MAX_TOP_K
from ..transport.messages import Message
from ..transport.schema import FORMS, column
from ..world import World
from ..writes import check_ids
from .attend import attend_at, by_branch, entry_offsets, padded_lists, pool_reader
from .index import best_units
from .plan import unit_entries

_LISTED_BYTES = 128  # ids, indices, masks and their sorts, for one listed entry


def answer_attend(world: World, message: Message) -> dict[str, Tensor]:
    """The answer's columns: `(out, lse, covered)` of every routed pair, and the fetched rows."""
    columns, layer = message.columns, _layer(world, message)
    answer: dict[str, Tensor] = {}
    for form in FORMS:
        if any(name.startswith(f"{form}.") for name in columns):
            answer |= _routed(world, layer, form, message)
    if "fetch" in columns:
        answer |= _fetched(world, layer, message)
    return answer


def _routed(world: World, layer: int, form: Form, message: Message) -> dict[str, Tensor]:
    layout, config, columns = world.config.model.layers[layer], world.config, message.columns
    if form not in world.forms(layer):
        raise ValueError(
            f"payload form {form} was asked, layer {layer} has no projection weights here"
        )
    item = column(message, f"{form}.item")
    count = column(message, f"{form}.count")
    units = column(message, f"{form}.units")
    query = column(message, f"{form}.query")
    pairs, (query_dim, _) = len(item), layout.routed_dims(form)
    if query.shape != (pairs, layout.branch_heads, query_dim) or len(count) != pairs:
        raise ValueError(f"{pairs} pairs came with query rows {tuple(query.shape)}")
    if bool((count < 1).any()) or int(count.sum()) != len(units) or bool((item < 0).any()):
        raise ValueError("unit counts do not add up to the listed units")
    hidden = torch.zeros(pairs, 2, dtype=torch.int32)
    unit_tokens = _unit_tokens(world, message)
    if unit_tokens > 1 or f"{form}.hidden" in columns:
        hidden = column(message, f"{form}.hidden")
    offsets = None
    if f"{form}.offsets" in columns:
        offsets = column(message, f"{form}.offsets")
        _check_offsets(offsets, count)

    check_ids(units, world.stores.corpus_ids("entries"), unit_tokens)
    capacity = world.stores.corpus_ids("entries") // unit_tokens
    longest = int(count.max()) if pairs else 0
    if longest > capacity or hidden.shape != (pairs, 2):
        raise ValueError(f"a pair lists {longest} units of {capacity}, or `hidden` is malformed")
    if not bool(query.isfinite().all()):
        raise ValueError("routed query rows are not finite")
    rows = query.to(world.compute_dtype)
    branch = item.long() % config.num_branches
    if not torch.equal(
        units // config.block_tokens % config.num_branches, branch.repeat_interleave(count)
    ):
        raise ValueError("a pair lists units of another branch than its own")
    weights = world.weights[layer]
    if form == "B":
        assert weights is not None
        rows = by_branch(rows, branch, weights.w_uk, reference.absorb)
    # Tile by tile, so that one long list does not pad all the others beyond the workspace.
    step = max(config.workspace_bytes // (max(longest, 1) * unit_tokens * _LISTED_BYTES), 1)
    starts = count.long().cumsum(0) - count
    done = []
    for first in range(0, max(pairs, 1), step):
        tile = slice(first, first + step)
        begin = int(starts[first]) if pairs else 0
        listed = padded_lists(units[begin:], count[tile])
        at = None if offsets is None else padded_lists(offsets[begin:], count[tile])
        done.append(
            _attended(world, layer, rows[tile], listed, hidden[tile], unit_tokens, offsets=at)
        )
    out, lse, covered = (torch.cat(parts) for parts in zip(*done, strict=True))
    if form == "B":
        assert weights is not None
        out = by_branch(out, branch, weights.w_uv, reference.project)
    return {
        f"{form}.out": out.to(config.dtype),
        f"{form}.lse": lse,
        f"{form}.covered": tagged(covered, item),
    }


def _attended(
    world: World,
    layer: int,
    rows: Tensor,
    listed: Tensor,
    hidden: Tensor,
    unit_tokens: int,
    *,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partials and coverage of absorbed rows (P, h, K) over their listed units (P, U), attached at
    offsets (P, U)."""
    ids, seen = unit_entries(
        listed,
        hidden,
        unit_tokens=unit_tokens,
        block_tokens=world.config.block_tokens,
        num_branches=world.config.num_branches,
    )
    ids, seen = ids.flatten(1), seen.flatten(1)
    index, here = world.stores.entries.resolve(layer, ids)
    valid = here & seen & (ids < world.stores.corpus_ids("entries"))
    if layer == 0:
        world.stores.entries.touch(index[valid])
    covered = coverage(*world.stores.entries.identify(index), valid)
    at = entry_offsets(offsets, unit_tokens)
    read = pool_reader(world, layer)
    out, lse = attend_at(world, layer, rows, index, valid, read, offsets=at)
    return out, lse, covered


def _check_offsets(offsets: Tensor, count: Tensor) -> None:
    """As many offsets as listed units, and of each pair no more different ones than a request has."""
    if len(offsets) != int(count.sum()):
        raise ValueError(f"{len(offsets)} offsets came with {int(count.sum())} units")
    pair = torch.arange(len(count)).repeat_interleave(count.long())
    distinct = (pair * 2**32 + offsets + 2**31).unique() // 2**32
    if len(distinct) and int(distinct.bincount().max()) > MAX_OFFSETS:
        raise ValueError(f"a pair lists units at more than {MAX_OFFSETS} offsets")


def _fetched(world: World, layer: int, message: Message) -> dict[str, Tensor]:
    units = column(message, "fetch")
    unit_tokens = _unit_tokens(world, message)
    check_ids(units, world.stores.corpus_ids("entries"), unit_tokens)
    if len(units) > len(units.unique()):
        raise ValueError("units to fetch repeat")
    ids = (units[:, None] + torch.arange(unit_tokens, dtype=torch.int32)).reshape(-1)
    index, here = world.stores.entries.resolve(layer, ids)
    if layer == 0:
        world.stores.entries.touch(index[here])
    mark = torch.where(here, mix(*world.stores.entries.identify(index)), 0)
    return {"fetch.rows": world.stores.entries.rows(layer, index), "fetch.mark": mark}


def answer_select(world: World, message: Message) -> dict[str, Tensor]:
    """The best units here for a peer's index queries: `score` and `id`, (Q * k,) for a k of its own;
    and `seen` (Q,), how many entries were scored.
    """
    columns, layer = message.columns, _layer(world, message)
    if not any(name.startswith("index.") for name in columns):
        return {}
    query = column(message, "index.query")
    weights = column(message, "index.weights")
    runs = column(message, "index.runs")
    index = world.config.model.layers[layer].index
    if index is None or query.shape[1:] != (index.heads, index.head_dim):
        raise ValueError(f"index queries of shape {tuple(query.shape)} do not fit layer {layer}")
    finite = bool(query.isfinite().all()) and bool(weights.isfinite().all())
    if not finite or weights.shape != query.shape[:2]:
        raise ValueError("index queries or weights are malformed or not finite")
    if len(runs) != len(query) or runs.shape[2] != 2 or bool((runs < 0).any()):
        raise ValueError("index weights or scope do not fit the index queries")
    top_k, unit_tokens = message.header.top_k, _unit_tokens(world, message)
    if not 0 < top_k <= MAX_TOP_K:
        raise ValueError(f"top_k {top_k} is out of range")
    offsets = None
    if "index.offsets" in columns:
        offsets = column(message, "index.offsets")
        if offsets.shape != runs.shape[:2]:
            raise ValueError("index offsets do not fit the scope")
        _check_offsets(offsets.flatten(), torch.full((len(runs),), runs.shape[1]))
        if world.config.model.layers[layer].index_rope is None:
            raise ValueError(f"layer {layer} has no rope to rotate index queries by")
    askable = None
    if "index.askable" in columns:
        askable = column(message, "index.askable")
        if len(askable) != world.world_size or bool((askable > 2).any()):
            raise ValueError("index.askable must be 0, 1 or 2 for each rank")
    room = (world.stores.corpus_ids("index") - runs[..., 0].long()).clamp(min=0)
    runs = torch.stack((runs[..., 0], runs[..., 1].minimum(room).to(torch.int32)), dim=-1)
    best = best_units(
        world,
        layer,
        query,
        weights,
        runs,
        top_k=top_k,
        unit_tokens=unit_tokens,
        offsets=offsets,
        askable=askable,
    )
    return {"score": best.score.flatten(), "id": best.id.flatten(), "seen": best.seen}


def _layer(world: World, message: Message) -> int:
    if not 0 <= message.header.layer < len(world.config.model.layers):
        raise ValueError(f"layer {message.header.layer} does not exist")
    return message.header.layer


def _unit_tokens(world: World, message: Message) -> int:
    unit_tokens = message.header.unit_tokens
    if unit_tokens < 1 or world.config.block_tokens % unit_tokens:
        raise ValueError(f"units of {unit_tokens} tokens do not fit the blocks")
    return unit_tokens
