"""Copies of blocks: whom else to ask when a rank cannot be, and the error when nobody is left.

A rank that is lost, left or silent in service (`Exchanger.unreachable`) is not asked while it is so; a
request that met it is planned again over the other copies (`Exchanger.attempt`). A world that went on
without a rank (`corpus/rejoin.py`) has blocks with fewer copies. Either way a block may be left with
nobody to ask for it. That is an error that names it, never an answer without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor

from ...partition.directory import Directory
from ..errors import BlocksLostError
from ..scope import Scope
from ..tables import chosen_copy, replaceable
from ..world import World
from .plan import Wanted


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


def check_askable(world: World, wanted: Wanted, askable: Tensor | None) -> None:
    """Raise BlocksLostError if there is nobody to ask for a unit that is wanted and exists."""
    if askable is None:
        return
    nowhere = (wanted.holder == world.world_size) & wanted.exists.any(-1)
    if bool(nowhere.any()):
        keys = wanted.units[nowhere] // world.config.block_tokens
        raise blocks_lost(world, (keys // world.config.num_branches).tolist())


def stand_ins(world: World, wanted: Wanted, askable: Tensor | None) -> Callable[[], Tensor] | None:
    """Computes (W,) bool: the holders of `wanted` that others can stand in for. None: nobody can."""
    if world.config.placement.copies == 1:
        return None

    def compute() -> Tensor:
        keys = (wanted.units.long() // world.config.block_tokens).clamp(min=0)
        owners = world.directory.owners
        remote = torch.where(wanted.holder == world.rank, -1, wanted.holder)
        copies = owners[keys.clamp(max=len(owners) - 1)]
        return replaceable(copies, remote, askable, world_size=world.world_size)

    return compute


def whom_to_ask(
    world: World, scope: Scope, askable: Tensor | None
) -> tuple[Tensor | None, Callable[[], Tensor] | None]:
    """Who is to score the index keys that a query of this scope sees, (W,) bool, None for everyone;
    and what computes who of them is replaceable.

    Raises: BlocksLostError if there is nobody to ask for some.
    """
    asks_all = world.exchanger.asks_all
    if asks_all and askable is None:
        return None, None
    blocks = _blocks_seen(world, scope)
    scorers = world.tables.scorers(blocks, askable)
    if bool((scorers < 0).any()):
        raise blocks_lost(world, blocks[scorers < 0].tolist())
    if asks_all:
        return None, None

    def compute() -> Tensor:
        copies = world.directory.owners[blocks * world.config.num_branches]
        remote = torch.where(scorers == world.rank, -1, scorers)
        return replaceable(copies, remote, askable, world_size=world.world_size)

    return torch.bincount(scorers, minlength=world.world_size) > 0, compute


def _blocks_seen(world: World, scope: Scope) -> Tensor:
    """The blocks of the corpus (n,) int64 of which a query of this scope sees any."""
    starts, counts = scope.runs.long().flatten(0, 1).unbind(1)
    block_tokens, blocks = world.config.block_tokens, world.config.max_blocks
    first = (starts // block_tokens).clamp(max=blocks)
    end = torch.where(counts > 0, (starts + counts - 1) // block_tokens + 1, 0)
    ones = torch.ones_like(first)
    edges = torch.zeros(blocks + 1, dtype=torch.int64).index_add(0, first, ones)
    edges = edges.index_add(0, end.clamp(min=0).clamp(max=blocks).maximum(first), -ones)
    return (edges.cumsum(0)[:-1] > 0).nonzero()[:, 0]


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
