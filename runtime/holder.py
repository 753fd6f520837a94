"""What a rank does for others: take their writes, attend over its blocks for them, hand out copies.

Letters: P routed pairs of one message, h heads of a branch, U listed units, F units to fetch.
Everything that arrives is checked against the layout before it is used; a bad message names its
sender. Ids that are not here (or not written) add nothing, and the coverage says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..indexer import local_topk, merge_topk, scores, unit_scores, visible
from ..kernels import reference
from ..partition.layout import Form
from .attend import attend_entries, by_branch, pool_reader
from .messages import Message
from .plan import unit_entries
from .world import World

MAX_TOP_K = 1 << 20
SCORE_TILE_BYTES = 1 << 20  # per-head products that stay in a core's cache
FORMS: tuple[Form, ...] = get_args(Form)


class BestUnits(NamedTuple):
    """Units of each query: scores (Q, k) and ids (Q, k) int32, -1 padded; entries scored, (Q,) int32."""

    score: Tensor
    id: Tensor
    seen: Tensor


def take_pushes(world: World, message: Message) -> None:
    """Write the rows that a peer computed for blocks (or index keys) held here."""
    columns, layer = message.columns, _layer(world, message)
    for name, store in (("push", world.entries), ("push_index", world.index)):
        if f"{name}.ids" in columns:
            codec = store.codecs[layer]
            ids = _column(columns, f"{name}.ids", torch.int32, 1)
            rows = _column(columns, f"{name}.rows", torch.uint8, 2)
            if codec is None or bool((ids >= _corpus_ids(world, store is world.index)).any()):
                raise ValueError("rows were pushed that this rank does not store")
            store.write(layer, ids, rows)


def answer_attend(world: World, message: Message) -> dict[str, Tensor]:
    """The answer's columns: `(out, lse, covered)` of every routed pair, and the fetched rows."""
    columns, layer = message.columns, _layer(world, message)
    answer: dict[str, Tensor] = {}
    for form in FORMS:
        if f"{form}.item" in columns:
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
    item = _column(columns, f"{form}.item", torch.int32, 1)
    count = _column(columns, f"{form}.count", torch.int32, 1)
    units = _column(columns, f"{form}.units", torch.int32, 1)
    query = _column(columns, f"{form}.query", config.dtype, 3)
    pairs, (query_dim, _) = len(item), layout.routed_dims(form)
    if query.shape != (pairs, layout.branch_heads, query_dim) or len(count) != pairs:
        raise ValueError(f"{pairs} pairs came with query rows {tuple(query.shape)}")
    if bool((count < 1).any()) or int(count.sum()) != len(units) or bool((item < 0).any()):
        raise ValueError("unit counts do not add up to the listed units")
    hidden = torch.zeros(pairs, 2, dtype=torch.int32)
    unit_tokens = _unit_tokens(world, message)
    if unit_tokens > 1:
        hidden = _column(columns, f"{form}.hidden", torch.int32, 2)

    listed = padded_lists(units, count)
    ids, seen = unit_entries(
        listed,
        hidden,
        unit_tokens=unit_tokens,
        block_tokens=config.block_tokens,
        num_branches=config.num_branches,
    )
    ids, seen = ids.flatten(1), seen.flatten(1) & (ids.flatten(1) < _corpus_ids(world, False))
    index, here = world.entries.resolve(layer, ids)
    valid = here & seen
    really, generations = world.entries.identify(index)
    covered = tagged(reference.coverage(really, generations, valid), item)

    rows = query.to(world.compute_dtype)
    branch = item.long() % config.num_branches
    if form == "B":
        weights = world.weights[layer]
        assert weights is not None
        rows = by_branch(rows, branch, weights.w_uk, reference.absorb)
    out, lse = attend_entries(world, layer, rows, index, valid, pool_reader(world, layer))
    if form == "B":
        assert weights is not None
        out = by_branch(out, branch, weights.w_uv, reference.project)
    return {
        f"{form}.out": out.to(config.dtype),
        f"{form}.lse": lse,
        f"{form}.covered": to_int32(covered),
    }


def _fetched(world: World, layer: int, message: Message) -> dict[str, Tensor]:
    units = _column(message.columns, "fetch", torch.int32, 1)
    ids = units[:, None] + torch.arange(_unit_tokens(world, message), dtype=torch.int32)
    ids = torch.where(units[:, None] < 0, -1, ids).reshape(-1)
    index, here = world.entries.resolve(
        layer, torch.where(ids < _corpus_ids(world, False), ids, -1)
    )
    mark = torch.where(here, reference.mix(*world.entries.identify(index)), 0)
    return {"fetch.rows": world.entries.rows(layer, index), "fetch.mark": to_int32(mark)}


def answer_select(world: World, message: Message) -> dict[str, Tensor]:
    """The best units here for a peer's index queries: `score` and `id`, (Q * k,) for a k of its own;
    and `seen` (Q,), how many entries were scored.
    """
    columns, layer = message.columns, _layer(world, message)
    if "index.query" not in columns:
        return {}
    query = _column(columns, "index.query", world.config.dtype, 3)
    weights = _column(columns, "index.weights", world.compute_dtype, 2)
    runs = _column(columns, "index.runs", torch.int32, 3)
    index = world.config.model.layers[layer].index
    if index is None or query.shape[1:] != (index.heads, index.head_dim):
        raise ValueError(f"index queries of shape {tuple(query.shape)} do not fit layer {layer}")
    if weights.shape != query.shape[:2] or len(runs) != len(query) or runs.shape[2] != 2:
        raise ValueError("index weights or scope do not fit the index queries")
    top_k, unit_tokens = message.header.top_k, _unit_tokens(world, message)
    if not 0 < top_k <= MAX_TOP_K:
        raise ValueError(f"top_k {top_k} is out of range")
    room = (_corpus_ids(world, of_index=True) - runs[..., 0].long()).clamp(min=0)
    runs = torch.stack((runs[..., 0], runs[..., 1].minimum(room).to(torch.int32)), dim=-1)
    best = best_units(world, layer, query, weights, runs, top_k=top_k, unit_tokens=unit_tokens)
    return {"score": best.score.flatten(), "id": best.id.flatten(), "seen": best.seen}


def best_units(
    world: World,
    layer: int,
    query: Tensor,
    weights: Tensor,
    runs: Tensor,
    *,
    top_k: int,
    unit_tokens: int,
) -> BestUnits:
    """Top units among the index keys held here."""
    query, config = query.to(world.compute_dtype), world.config
    # An entry's key, decoded by way of int32, and for each query its score, sight and their sorts.
    entry_bytes = 12 * query.shape[2] + 4 * query.element_size() * len(query)
    store = world.index
    blocks = store.key_of[(store.key_of >= 0) & (store.fill[layer] > 0)].sort().values
    nothing = query.new_full((len(query), 1), -torch.inf)
    tops = [(nothing, torch.full((len(query), 1), -1, dtype=torch.int32))]
    seen = torch.zeros(len(query), dtype=torch.int32)
    for some in blocks.split(max(config.workspace_bytes // (entry_bytes * config.block_tokens), 1)):
        found, ids = _scored(world, layer, some, query, weights, runs)
        seen += (found > -torch.inf).sum(1, dtype=torch.int32)
        if unit_tokens > 1:
            found, ids = unit_scores(found, ids, unit_tokens)
        if len(ids):
            tops.append(local_topk(found, ids, min(top_k, len(ids))))
    if len(tops) <= 2:  # one tile, the usual case
        return BestUnits(*tops[-1], seen)
    score, units = torch.cat([top for top, _ in tops], 1), torch.cat([ids for _, ids in tops], 1)
    return BestUnits(*merge_topk(score, units, min(top_k, units.shape[1])), seen)


def _scored(
    world: World, layer: int, blocks: Tensor, query: Tensor, weights: Tensor, runs: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores (Q, E), -inf where unseen, and ids (E,) of the entries of `blocks` that anyone sees."""
    block_tokens = world.config.block_tokens
    ids = (blocks[:, None] * block_tokens + torch.arange(block_tokens, dtype=torch.int32)).flatten()
    index, written = world.index.resolve(layer, ids)
    seen = visible(ids, runs) & written
    used = seen.any(0)
    if not bool(used.all()):
        ids, index, seen = ids[used], index[used], seen[:, used]
    keys = world.index.read(layer, index, world.compute_dtype)
    tile_bytes = min(world.config.workspace_bytes // 4, SCORE_TILE_BYTES)
    tile_bytes = max(tile_bytes, query.shape[1] * query.element_size())
    found = scores(query, weights, keys, tile_bytes=tile_bytes)
    return found.masked_fill_(~seen, -torch.inf), ids


def padded_lists(values: Tensor, counts: Tensor) -> Tensor:
    """Consecutive lists of `counts` values each, as rows padded with -1."""
    counts = counts.long()
    at = torch.arange(int(counts.max()) if len(counts) else 0)
    index = (counts.cumsum(0) - counts)[:, None] + at
    listed = at < counts[:, None]
    return torch.where(listed, values[torch.where(listed, index, 0)], -1)


def tagged(covered: Tensor, item: Tensor) -> Tensor:
    """Coverage (P, 2) bound to the item it answers, so that swapped answers differ."""
    tag = reference.mix(item, torch.zeros_like(item))
    return torch.stack((covered[:, 0], (covered[:, 1] + tag) & 0xFFFFFFFF), dim=1)


def to_int32(unsigned: Tensor) -> Tensor:
    """Values in [0, 2**32) as the int32 with the same bits."""
    return ((unsigned + 2**31) % 2**32 - 2**31).to(torch.int32)


def _corpus_ids(world: World, of_index: bool) -> int:
    """Ids below this belong to the corpus; those above are private and never leave home."""
    branches = 1 if of_index else world.config.num_branches
    return world.config.max_blocks * world.config.block_tokens * branches


def _layer(world: World, message: Message) -> int:
    if not 0 <= message.header.layer < len(world.config.model.layers):
        raise ValueError(f"layer {message.header.layer} does not exist")
    return message.header.layer


def _unit_tokens(world: World, message: Message) -> int:
    unit_tokens = message.header.unit_tokens
    if not 1 <= unit_tokens <= world.config.block_tokens:
        raise ValueError(f"units of {unit_tokens} tokens do not fit the blocks")
    return unit_tokens


def _column(columns: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int) -> Tensor:
    if name not in columns:
        raise ValueError(f"column {name!r} is missing")
    column = columns[name]
    if column.dtype != dtype or column.dim() != dims:
        raise ValueError(f"column {name!r} must be {dtype} with {dims} dims, got {column.dtype}")
    return column
