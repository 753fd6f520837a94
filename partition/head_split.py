"""A layer as one tensor-parallel lane sees it: some of its query heads, and the branches they read.

A lane is a rank of an instance that has a share of the heads. Streams and index keys are shared by
all heads of a branch, so a lane stores them whole; only queries, outputs and weights are split.
"""

from __future__ import annotations

from dataclasses import replace

from .layout import Branch, Layout, ModelLayout

Heads = tuple[int, int]  # (start, count)


def lane_layout(layout: Layout, start: int, count: int) -> Layout:
    """The layer with its heads [start, start + count) alone, numbered from 0.

    A branch keeps those of its heads; one that has none of them is dropped with its streams, which
    the lane then neither stores nor moves. The indexer stays whole.

    Raises: ValueError if the layer has no such heads, or its branches would keep unequal numbers.
    """
    if start < 0 or count < 1 or start + count > layout.heads:
        raise ValueError(
            f"layout {layout.name!r} has {layout.heads} heads, not {count} from {start} on"
        )
    if count == layout.heads:
        return layout
    kept = [
        branch for branch in (_kept(b, start, start + count) for b in layout.branches) if branch
    ]
    if len({branch.heads for branch in kept}) != 1:
        shares = {branch.name: branch.heads for branch in kept}
        raise ValueError(
            f"layout {layout.name!r}: of heads {start} to {start + count - 1} its branches would keep "
            f"unequal numbers, {shares}; a lane needs as many of each branch that it has heads of"
        )
    name = f"{layout.name}[{start}:{start + count}]"
    return replace(layout, name=name, heads=count, branches=tuple(kept))


def lane_model(model: ModelLayout, start: int, count: int) -> ModelLayout:
    """`lane_layout` of every layer; all must have as many heads."""
    heads = {layout.heads for layout in model.layers}
    if len(heads) != 1:
        raise ValueError(
            f"lanes need as many heads in every layer, the model has {sorted(heads)} heads"
        )
    layers = {layout: lane_layout(layout, start, count) for layout in set(model.layers)}
    return replace(model, layers=tuple(layers[layout] for layout in model.layers))


def _kept(branch: Branch, start: int, end: int) -> Branch | None:
    """The branch with its heads in [start, end), numbered from `start`; None if it has none there."""
    first, last = max(branch.head_start, start), min(branch.head_start + branch.heads, end)
    if first >= last:
        return None
    return replace(branch, head_start=first - start, heads=last - first)
