"""Whom to ask: ranks that hold what is wanted, and those that other copies can stand in for.

Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..copies import blocks_lost
from ..scope import Scope
from ..tables import replaceable
from ..world import World
from .plan import Wanted


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

    @cache
    def scorers() -> Tensor:
        return world.tables.scorers(_blocks_seen(world, scope), askable)

    if askable is not None:
        nowhere = scorers() < 0
        if bool(nowhere.any()):
            raise blocks_lost(world, _blocks_seen(world, scope)[nowhere].tolist())

    def wanted() -> Tensor:
        return torch.bincount(scorers(), minlength=world.world_size) > 0

    def compute() -> Tensor:
        copies = world.directory.owners[_blocks_seen(world, scope) * world.config.num_branches]
        holder = scorers()
        remote = torch.where(holder == world.rank, -1, holder)
        return replaceable(copies, remote, askable, world_size=world.world_size)

    return world.exchanger.recipients(wanted), compute


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
