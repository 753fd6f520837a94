"""INDEX: the exact global top-k of each index query, scored where the index keys live.

Letters: Q queries, E entries, k units of a query, M candidates. Memory stays within the workspace (but
for the least tile of `scores`), whatever the corpus: blocks are scored tile by tile and folded into a
running top-k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...indexer import local_topk, merge_topk, scores, unit_scores, visible
from ...indexer.dsa import least_tile_bytes, rotate_index
from ..scope import only_runs
from ..world import World

SCORE_TILE_BYTES = 1 << 20  # per-head products that stay in a core's cache


class BestUnits(NamedTuple):
    """Units of each query: scores (Q, k) and ids (Q, k) int32, -1 padded; entries scored, (Q,) int32."""

    score: Tensor
    id: Tensor
    seen: Tensor


def best_units(
    world: World,
    layer: int,
    query: Tensor,
    weights: Tensor,
    runs: Tensor,
    *,
    top_k: int,
    unit_tokens: int,
    offsets: Tensor | None = None,
    askable: Tensor | None = None,
) -> BestUnits:
    """Top units among the index keys held here; of blocks with copies, those that fall to this rank if
    the requester can ask `askable` (`tables.chosen_copy`).

    With `offsets` (Q, R) of the runs, an index query meets the keys of a run rotated back by as much.
    """
    sizes = {"top_k": top_k, "unit_tokens": unit_tokens}
    blocks = _blocks(world, layer, askable)
    if offsets is None:
        return _best_units(world, layer, blocks, query, weights, runs, **sizes)
    layout = world.config.model.layers[layer]
    assert layout.index is not None
    assert layout.index_rope is not None
    query = query.to(world.compute_dtype)
    score = query.new_full((len(query), 1), -torch.inf)
    units = torch.full((len(query), 1), -1, dtype=torch.int32)
    seen = torch.zeros(len(query), dtype=torch.int32)
    left = runs[..., 1] > 0
    while bool(left.any()):  # each query with the offset of its first run that is left
        offset = offsets.gather(1, left.to(torch.uint8).argmax(1, keepdim=True))
        now = left & (offsets == offset)
        left &= ~now
        at = now.any(1).nonzero()[:, 0]
        turned = rotate_index(query[at], -offset[at, 0].long(), layout.index, layout.index_rope)
        some = only_runs(runs, now)[at]
        part = _best_units(world, layer, blocks, turned, weights[at], some, **sizes)
        width = part.score.shape[1]
        found = score.new_full((len(query), width), -torch.inf).index_copy(0, at, part.score)
        ids = units.new_full((len(query), width), -1).index_copy(0, at, part.id)
        seen = seen.index_add(0, at, part.seen)
        score, units = torch.cat((score, found), dim=1), torch.cat((units, ids), dim=1)
        score, units = merge_topk(score, units, min(top_k, units.shape[1]))
    return BestUnits(score, units, seen)


def _blocks(world: World, layer: int, askable: Tensor | None) -> Tensor:
    """The blocks whose index keys are scored here: private ones, and those that fall to this rank."""
    store = world.stores.index
    blocks = store.key_of[(store.key_of >= 0) & (store.fill[layer] > 0)].sort().values
    if world.config.index_placement == "replicated":
        return blocks
    scorer = world.tables.scorers(blocks, askable)
    return blocks[(scorer == world.rank) | (blocks >= world.config.max_blocks)]


def _best_units(
    world: World,
    layer: int,
    blocks: Tensor,
    query: Tensor,
    weights: Tensor,
    runs: Tensor,
    *,
    top_k: int,
    unit_tokens: int,
) -> BestUnits:
    query, config = query.to(world.compute_dtype), world.config
    # An entry's key, decoded by way of int32, and for each query its score, sight and their sorts.
    entry_bytes = 12 * query.shape[2] + 4 * query.element_size() * len(query)
    score = query.new_full((len(query), 1), -torch.inf)
    units = torch.full((len(query), 1), -1, dtype=torch.int32)
    seen = torch.zeros(len(query), dtype=torch.int32)
    for some in blocks.split(max(config.workspace_bytes // (entry_bytes * config.block_tokens), 1)):
        found, ids = _scored(world, layer, some, query, weights, runs)
        seen += (found > -torch.inf).sum(1, dtype=torch.int32)
        if unit_tokens > 1:
            found, ids = unit_scores(found, ids, unit_tokens)
        if len(ids):
            top, best = local_topk(found, ids, min(top_k, len(ids)))
            if bool((units >= 0).any()):  # not the first tile
                top, best = torch.cat((score, top), dim=1), torch.cat((units, best), dim=1)
                top, best = merge_topk(top, best, min(top_k, best.shape[1]))
            score, units = top, best
    return BestUnits(score, units, seen)


def _scored(
    world: World, layer: int, blocks: Tensor, query: Tensor, weights: Tensor, runs: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores (Q, E), -inf where unseen, and ids (E,) of the entries of `blocks` that anyone sees."""
    block_tokens = world.config.block_tokens
    ids = (blocks[:, None] * block_tokens + torch.arange(block_tokens, dtype=torch.int32)).flatten()
    index, written = world.stores.index.resolve(layer, ids)
    seen = visible(ids, runs) & written
    used = seen.any(0)
    if not bool(used.all()):
        ids, index, seen = ids[used], index[used], seen[:, used]
    keys = world.stores.index.read(layer, index, world.compute_dtype)
    tile_bytes = min(world.config.workspace_bytes // 4, SCORE_TILE_BYTES)
    tile_bytes = max(tile_bytes, least_tile_bytes(query.shape[1], query.dtype))
    found = scores(query, weights, keys, tile_bytes=tile_bytes)
    return found.masked_fill_(~seen, -torch.inf), ids
