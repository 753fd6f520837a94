"""Blocks of which no copy can be asked for: which they are, and the error that names them.

A rank that is lost, left or silent in service (`Exchanger.unreachable`) is not asked while it is so; a
request that met it is planned again over the other copies (`Exchanger.attempt`). A world that went on
without a rank (`corpus/rejoin.py`) has blocks with fewer copies. Either way a block may be left with
nobody to ask for it. That is an error that names it, never an answer without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from ..partition.directory import Directory
from .errors import BlocksLostError
from .tables import chosen_copy
from .world import World


def lost_blocks(directory: Directory, askable: Tensor | None) -> dict[str, tuple[range, ...]]:
    """By document, the runs of its blocks of which no copy can be asked for, counted from its first."""
    if askable is None:
        return {}
    nowhere = chosen_copy(directory.owners, 0, askable) < 0
    blocks = nowhere.view(-1, directory.num_branches).any(1) & (directory.references > 0)
    return _by_document(directory, set(blocks.nonzero()[:, 0].tolist()))


def runs_of(numbers: Iterable[int]) -> tuple[range, ...]:
    """Ascending numbers as runs of neighbours."""
    found = list(numbers)
    breaks = [at for at, (a, b) in enumerate(pairwise(found), start=1) if b != a + 1]
    edges = [0, *breaks, len(found)]
    return tuple(range(found[a], found[b - 1] + 1) for a, b in pairwise(edges) if a < b)


def blocks_lost(world: World, blocks: Iterable[int]) -> BlocksLostError:
    """The error that names these blocks, who had them and what became of those ranks."""
    lost = set(blocks)
    branches = world.directory.num_branches
    keys = torch.tensor(sorted(lost))[:, None] * branches + torch.arange(branches)
    had = set(world.directory.owners[keys].flatten().tolist())
    gone = world.exchanger.unreachable()
    errors = [error for rank, error in sorted(gone.items()) if rank in had]
    culprits = tuple(sorted({culprit for error in errors for culprit in error.culprits}))
    reason = errors[0].reason if errors else "every rank that had a copy is gone"
    return BlocksLostError(culprits, reason, _by_document(world.directory, lost))


def _by_document(directory: Directory, blocks: set[int]) -> dict[str, tuple[range, ...]]:
    found: Mapping[str, list[int]] = {
        name: [at for at, block in enumerate(document.blocks) if block in blocks]
        for name, document in directory.documents.items()
    }
    return {name: runs_of(numbers) for name, numbers in found.items() if numbers}
