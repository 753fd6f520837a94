"""Small directories, and documents added to them."""

from __future__ import annotations

from torch import Tensor

from qroam.partition.directory import Directory, empty_directory, with_document
from qroam.partition.placement import Placement, place

B = 8  # tokens of a block


def empty(*, world: int = 4, branches: int = 1, copies: int = 1, max_blocks: int = 16) -> Directory:
    return empty_directory(
        max_blocks=max_blocks,
        block_tokens=B,
        num_branches=branches,
        copies=copies,
        world_size=world,
    )


def ranks_for(directory: Directory, tokens: int, placement: Placement) -> Tensor:
    return place(
        placement,
        directory.free_blocks(
            "new", min(-(-tokens // B), directory.max_blocks - directory.num_blocks)
        ),
        num_branches=directory.num_branches,
        world_size=len(directory.used),
        used=directory.used,
    )


def added(
    directory: Directory,
    name: str,
    tokens: int,
    *,
    placement: Placement | None = None,
    position: int = 0,
    capacity: int = 1000,
) -> Directory:
    copies = directory.owners.shape[1]
    ranks = ranks_for(directory, tokens, placement or Placement(copies=copies))
    return with_document(
        directory, name, tokens=tokens, position=position, ranks=ranks, capacity=capacity
    )
