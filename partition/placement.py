"""Which ranks hold which block: placement policies as pure functions.

Letters: N blocks of one document, G branches, W ranks, R copies. A placement is an int32 tensor
(N, G, R) of ranks; copy 0 is the owner, the rest are replicas on other ranks, or -1 where a world that
lost ranks has fewer of them than copies: they are made up for when ranks come (`repair.py`).
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PlacementPolicy = Literal[
    "contiguous", "block-cyclic", "balanced", "document-affine", "branch-split"
]
PLACEMENT_POLICIES: tuple[PlacementPolicy, ...] = (
    "contiguous",
    "block-cyclic",
    "balanced",
    "document-affine",
    "branch-split",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How documents are spread. `run` blocks in a row stay together under block-cyclic."""

    policy: PlacementPolicy = "block-cyclic"
    run: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        if self.policy not in PLACEMENT_POLICIES:
            raise ValueError(
                f"unknown placement {self.policy!r}; known: {', '.join(PLACEMENT_POLICIES)}"
            )
        if not all(type(n) is int and 1 <= n < 2**31 for n in (self.run, self.copies)):
            raise ValueError(f"run and copies must be whole numbers of at least 1, got {self}")


def place(
    placement: Placement,
    blocks: Tensor,
    *,
    num_branches: int,
    world_size: int,
    used: Tensor,
    load: Tensor | None = None,
) -> Tensor:
    """Ranks of the copies of a document's blocks.

    Args:
        blocks: (N,) int64, global ids of the document's blocks.
        used: (W,) int64, slots taken at each rank so far (document-affine and balanced read it).
        load: (N,) float, expected load of each block, for `balanced`; None means equal loads.
    Returns:
        (N, G, R) int32 ranks, copy 0 the owner, no rank twice; -1 for copies without a rank.
    Raises:
        ValueError: if `load` does not fit the blocks.
    """
    num_blocks = len(blocks)
    if load is not None and load.shape != (num_blocks,):
        raise ValueError(f"load must have shape ({num_blocks},), got {tuple(load.shape)}")
    if load is not None and not bool((load.isfinite() & (load >= 0)).all()):
        raise ValueError("load must be finite and not negative")
    block = torch.arange(num_blocks)
    branch = torch.arange(num_branches)
    match placement.policy:
        case "contiguous":
            owner = (block * world_size // max(num_blocks, 1))[:, None].expand(-1, num_branches)
        case "block-cyclic":
            owner = (blocks // placement.run % world_size)[:, None]
            owner = owner.expand(-1, num_branches)
        case "balanced":
            loads = torch.ones(num_blocks) if load is None else load
            owner = _balanced(loads, used)[:, None].expand(-1, num_branches)
        case "document-affine":
            owner = used.argmin().expand(num_blocks, num_branches)
        case "branch-split":
            shards = max(world_size // num_branches, 1)
            owner = (blocks % shards)[:, None] * num_branches + branch[None, :]
            owner = owner % world_size
    return _with_replicas(owner, placement.copies, world_size)


def place_at(
    rank: int, num_blocks: int, *, num_branches: int, copies: int, world_size: int
) -> Tensor:
    """As `place`, with one rank as the owner of all blocks."""
    owner = torch.full((num_blocks, num_branches), rank)
    return _with_replicas(owner, copies, world_size)


def _with_replicas(owner: Tensor, copies: int, world_size: int) -> Tensor:
    """(N, G, R) int32: the owners (N, G), and replicas at even distances from them."""
    copy = torch.arange(copies)
    ranks = (owner[..., None] + copy * max(world_size // copies, 1)) % world_size
    return torch.where(copy < world_size, ranks, -1).to(torch.int32)


def _balanced(load: Tensor, used: Tensor) -> Tensor:
    """Longest-processing-time greedy: the heaviest block goes to the least loaded rank."""
    ranks = [(float(slots), rank) for rank, slots in enumerate(used.tolist())]
    heapq.heapify(ranks)
    owner = torch.empty(len(load), dtype=torch.int64)
    for block in load.argsort(descending=True, stable=True).tolist():
        total, rank = heapq.heappop(ranks)
        owner[block] = rank
        heapq.heappush(ranks, (total + float(load[block]), rank))
    return owner
