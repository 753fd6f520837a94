"""Dense attention and index selection, written from the definitions and sharing no code with qroam.

Letters: Q queries, H heads, G branches, h heads of a branch, I entry ids, C columns of an entry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qroam.partition.layout import Branch, Layout, Rope


def attend(
    layout: Layout,
    query: Tensor,
    entries: Tensor,
    listed: Tensor,
    *,
    weights: tuple[Tensor, Tensor] | None = None,
    sink: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    shift: Tensor | None = None,
) -> Tensor:
    """Softmax attention of every head, branch by branch, all of it in `dtype`.

    With `weights` in the un-absorbed training form: each head's keys and values are expanded from
    the stored columns; without, queries and outputs are those columns themselves.

    Args:
        query: (Q, H, D). entries: (I, G, C). listed: (Q, G, I) bool, what takes part.
        weights: w_uk (G, h, nope, C'), w_uv (G, h, value, out). sink: (H,).
        shift: (Q, I) int64, how much further on each query sees each entry.
    Returns: (Q, H, D'), 0 where nothing is listed.
    """
    query, entries = query.to(dtype), entries.to(dtype)
    dim = weights[1].shape[-1] if weights else _columns(layout.branches[0], "v", "kv").sum()
    out = torch.zeros(len(query), layout.heads, int(dim), dtype=dtype)
    for b, branch in enumerate(layout.branches):
        mask, stored = listed[:, b], entries[:, b]
        keys, values = (
            stored[:, _columns(branch, "kv", "k")],
            stored[:, _columns(branch, "v", "kv")],
        )
        for i in range(branch.heads):
            h = branch.head_start + i
            k, v = keys, values
            if weights:
                w_uk, w_uv = (weight[b, i].to(dtype) for weight in weights)
                latent, rope = keys.tensor_split((w_uk.shape[1],), dim=1)
                k, v = torch.cat((latent @ w_uk.T, rope), dim=1), values @ w_uv
            scores = query[:, h] @ k.T
            for offset in [] if shift is None else shift.unique().tolist():
                moved = moved_keys(k, offset, layout.rope)
                scores = torch.where(shift == offset, query[:, h] @ moved.T, scores)
            scores = (scores * layout.softmax_scale).masked_fill(~mask, -torch.inf)
            if sink is not None:
                scores = torch.cat((scores, sink[h].to(dtype).expand(len(query), 1)), dim=1)
            shares = scores.softmax(dim=1)[:, : len(v)]
            shares = torch.where(mask.any(1, keepdim=True), shares, 0.0)
            out[:, h] += branch.weight * (shares @ v)
    return out


def moved_keys(keys: Tensor, offset: int, rope: Rope | None) -> Tensor:
    """Keys (I, K) `offset` positions further on, their last columns rotary: pair by pair."""
    moved = keys.clone()
    if rope is None:
        return moved
    first, half = keys.shape[1] - rope.dim, rope.dim // 2
    for pair in range(half):
        a, b = (first + pair, first + pair + half) if rope.pairing == "half" else (0, 0)
        if rope.pairing == "interleaved":
            a, b = first + 2 * pair, first + 2 * pair + 1
        angle = offset * _frequency(pair, rope)
        cos, sin = math.cos(angle), math.sin(angle)
        moved[:, a] = keys[:, a] * cos - keys[:, b] * sin
        moved[:, b] = keys[:, b] * cos + keys[:, a] * sin
    return moved


def _frequency(pair: int, rope: Rope) -> float:
    """Radians per position; by YaRN (arXiv 2309.00071) slower for pairs that turn rarely."""
    frequency = float(rope.theta ** (-2 * pair / rope.dim))
    if rope.yarn is None:
        return frequency
    yarn = rope.yarn

    def turning(turns: float) -> float:  # the pair that turns so often over the original positions
        per_turn = yarn.original_positions / (turns * 2 * math.pi)
        return float(rope.dim * math.log(per_turn) / (2 * math.log(rope.theta)))

    low = max(math.floor(turning(yarn.beta_fast)), 0)
    high = min(math.ceil(turning(yarn.beta_slow)), rope.dim - 1)
    slowed = min(max((pair - low) / ((high - low) or 0.001), 0.0), 1.0)
    return frequency / yarn.factor * slowed + frequency * (1 - slowed)


def moved_index_keys(keys: Tensor, offset: int, layout: Layout) -> Tensor:
    """Index keys (I, D) `offset` positions further on, their first columns rotary."""
    rope = layout.index_rope
    if rope is None:
        return keys.clone()
    return torch.cat((moved_keys(keys[:, : rope.dim], offset, rope), keys[:, rope.dim :]), dim=1)


def top_units(
    query: Tensor, weights: Tensor, keys: Tensor, visible: Tensor, *, k: int, unit_tokens: int
) -> Tensor:
    """The k best visible units, ties to the lower id: (Q, k) int32, ids ascending, then -1.

    Args: query (Q, Hi, D), weights (Q, Hi), keys (I, D), visible (Q, I); I a multiple of the unit.
    """
    scores = index_scores(query, weights, keys)
    scores = torch.where(visible, scores, -torch.inf).unflatten(1, (-1, unit_tokens)).amax(2)
    best, ids = scores.sort(dim=1, descending=True, stable=True)
    never = scores.shape[1]
    ids = torch.where(best > -torch.inf, ids, never)[:, :k].sort(dim=1).values
    ids = torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=never)
    return torch.where(ids < never, ids, -1).to(torch.int32)


def index_scores(query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """The indexer's score (Q, I) of every entry, fp64."""
    products = torch.einsum("qhd,ed->qhe", query.double(), keys.double()).clamp(min=0)
    return torch.einsum("qh,qhe->qe", weights.double(), products)


def shifted_scores(
    layout: Layout, query: Tensor, weights: Tensor, keys: Tensor, shift: Tensor
) -> Tensor:
    """As `index_scores`, each query seeing each entry `shift` (Q, I) positions further on."""
    scores = index_scores(query, weights, keys)
    for offset in shift.unique().tolist():
        moved = moved_index_keys(keys.double(), offset, layout)
        scores = torch.where(shift == offset, index_scores(query, weights, moved), scores)
    return scores


def listed_entries(ids: Tensor, visible: Tensor, *, branches: int, unit_tokens: int) -> Tensor:
    """Which entries take part: units (Q, K) or (Q, G, K) expanded, less what a query cannot see.

    Args: visible: (Q, I) bool, I a multiple of the unit. Returns: (Q, G, I) bool.
    """
    if ids.dim() == 2:
        ids = ids[:, None].expand(-1, branches, -1)
    units = torch.zeros(*ids.shape[:2], visible.shape[1] // unit_tokens + 1, dtype=torch.bool)
    units = units.scatter(2, torch.where(ids >= 0, ids, units.shape[2] - 1).long(), True)
    return units[..., :-1].repeat_interleave(unit_tokens, dim=2) & visible[:, None]


def _columns(branch: Branch, *roles: str) -> Tensor:
    """Mask (C,) of the stored columns whose stream has one of these roles."""
    return torch.cat([torch.full((s.dim,), s.role in roles) for s in branch.streams])
