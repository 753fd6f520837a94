"""A query's heads as items, one per branch, and the branches' outputs as the layer's.

Letters: Q queries, H heads, G branches, N = Q * G items, h heads of a branch, D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import reference
from ..partition.layout import Layout
from .world import World


def by_item(query: Tensor, layout: Layout) -> Tensor:
    """Queries (Q, H, D) as items (Q * G, h, D): each branch's heads."""
    slices = [query[:, b.head_start : b.head_start + b.heads] for b in layout.branches]
    return torch.stack(slices, dim=1).flatten(0, 1)


def absorb_items(world: World, layer: int, rows: Tensor) -> Tensor:
    """Item rows in key space (N, h, K), through W_UK if the layer's weights are here."""
    weights = world.weights[layer]
    if weights is None:
        return rows.to(world.compute_dtype)
    rows = rows.to(world.compute_dtype).unflatten(0, (-1, world.config.num_branches))
    return reference.absorb(rows, weights.w_uk).flatten(0, 1)


def combine(layout: Layout, out: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
    """The layer's output (Q, H, D): the sink, once, then the weighted sum over branches.

    Args: out (Q * G, h, D), lse (Q * G, h), sink (H,) natural-log logits or None.
    """
    out = out.unflatten(0, (-1, layout.num_branches))
    lse = lse.unflatten(0, (-1, layout.num_branches))
    total = out.new_zeros(len(out), layout.heads, out.shape[-1])
    for b, branch in enumerate(layout.branches):
        heads = slice(branch.head_start, branch.head_start + branch.heads)
        part = out[:, b]
        if sink is not None:
            part = reference.apply_sink(part, lse[:, b], sink[heads])
        total[:, heads] += branch.weight * part
    return total
