"""The verbs in plain torch: their definition, and the CPU's implementation.

Letters: M rows of work (one routed or local (query, branch)), H heads, E listed entries, D columns
of an entry, K key columns (the last of D), C value columns (the first of D), N items merged into,
P partials, G branches, Q queries. An empty partial is `out = 0, lse = -inf`; LSE is natural log.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor, entries: Tensor, valid: Tensor, *, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Partial attention of each row over its own listed entries.

    Args:
        query: (M, H, K), fp32 or fp64 (bf16 is computed in fp32).
        entries: (M, E, D); what `valid` excludes is never read into a sum, NaN included.
        valid: (M, E) bool.
    Returns:
        out: (M, H, C) in the computing dtype, normalised over the valid entries.
        lse: (M, H) in the computing dtype.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    entries = entries.to(dtype)
    if not bool(valid.all()):
        entries = torch.where(valid[..., None], entries, 0.0)
    keys, values = entries[..., -query.shape[-1] :], entries[..., :value_dim]
    scores = torch.matmul(query.to(dtype) * scale, keys.mT)
    scores = scores.masked_fill(~valid[:, None, :], -torch.inf)
    top = (
        scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*query.shape[:2], 1)
    )
    top = torch.where(top == -torch.inf, 0.0, top)  # no valid entry: every exp below is 0
    shares = torch.exp(scores - top)
    total = shares.sum(-1, keepdim=True)
    out = torch.matmul(shares, values) / torch.where(total == 0, 1.0, total)
    return out, (top + torch.log(total))[..., 0]


def merge(outs: Tensor, lses: Tensor, item: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Merge partials over disjoint entries, item by item; exact in any order and grouping.

    Args:
        outs: (P, H, C). lses: (P, H). item: (P,) int64, the item each partial belongs to;
        negative items (unused capacity) are skipped and may hold anything.
    Returns:
        out (N, H, C) and lse (N, H); an item without partials is empty. NaN stays NaN.
    """
    used = item >= 0
    target = torch.where(used, item, num_items)
    lses = torch.where(used[:, None], lses, -torch.inf)
    top = lses.new_full((num_items + 1, lses.shape[1]), -torch.inf)
    top = top.scatter_reduce(0, target[:, None].expand_as(lses), lses, "amax")
    safe_top = torch.where(top == -torch.inf, 0.0, top)
    shares = torch.exp(lses - safe_top[target])
    weighted = torch.where((lses == -torch.inf)[..., None], 0.0, outs * shares[..., None])
    total = torch.zeros_like(top).index_add(0, target, shares)
    out = outs.new_zeros(num_items + 1, *outs.shape[1:]).index_add(0, target, weighted)
    out = out / torch.where(total == 0, 1.0, total)[..., None]
    lse = safe_top + torch.log(total)
    return out[:num_items], lse[:num_items]


def apply_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Add a value-less logit to the softmax: `out / (1 + exp(sink - lse))`, once, after all merges.

    Args: out (N, H, C), lse (N, H), sink (H,) natural-log logits.
    """
    return out * torch.sigmoid(lse - sink)[..., None]


def absorb(query: Tensor, w_uk: Tensor) -> Tensor:
    """Un-absorbed rows to key space: the first columns times W_UK, the rope columns kept.

    Args: query (Q, G, H, nope + rope); w_uk (G, H, nope, latent). Returns (Q, G, H, latent + rope).
    """
    nope = w_uk.shape[2]
    latent = torch.einsum("qghn,ghnc->qghc", query[..., :nope], w_uk)
    return torch.cat((latent, query[..., nope:]), dim=-1)


def project(out: Tensor, w_uv: Tensor) -> Tensor:
    """Value columns to output columns: (Q, G, H, C) times W_UV (G, H, C, V).

    Linear, so exact on partials that are merged afterwards.
    """
    return torch.einsum("qghc,ghcv->qghv", out, w_uv)
