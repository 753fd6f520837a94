"""Lockstep: exchanges of the whole world, in which every rank asks every other and answers everyone.

Every rank issues the same sequence of them, idle ones with nothing to ask. All writes are taken before
anyone is answered. Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from .errors import CoverageError, PeerError, SnapshotError
from .exchanger import Answer
from .transport.base import Column
from .transport.messages import Header, Message
from .world import World

T = TypeVar("T")


class Lockstep:
    """The exchanger of a world outside of services."""

    def __init__(self, world: World) -> None:
        self._world = world

    def attempt(self, ask: Callable[[], T]) -> T:
        """`ask()`, as a step of this world."""
        with step(self._world):
            return ask()

    def exchange(
        self,
        header: Header,
        columns: Sequence[Column],
        answer: Answer,
        own_work: Callable[[], T],
        replaceable: Callable[[], Tensor] | None = None,
    ) -> tuple[T, list[Message | None]]:
        """Ask everyone, answer everyone, do own work; returns its result and everyone's answers.

        The own work comes last, so that it overlaps with the others' answers and reads what peers
        wrote for this rank.
        """
        world = self._world
        transport, stats = world.transport, world.stats
        visitors = self.settle(header, columns)
        with stats.phase("answer"):
            reply = replace(header, kind=f"{header.kind}-answer")
            shares: list[Mapping[str, Tensor]] = [{} for _ in visitors]
            for rank, visitor in enumerate(visitors):
                if visitor is not None:
                    with transport.blaming(rank):
                        shares[rank] = answer(visitor)
            transport.post_shares(reply, shares)
        with stats.phase("attend own"):
            own = own_work()
        with stats.phase("wait"):
            given = transport.collect(reply)
        self._check(given)
        world.progress.finish(header)
        return own, given

    def settle(self, header: Header, columns: Sequence[Column] = ()) -> list[Message | None]:
        """Ask everyone, and take the writes of all peers; returns what they ask."""
        world = self._world
        world.progress.begin()
        before = world.writes.begin_step(header.layer)
        with world.stats.phase("send"):
            world.transport.post(header, [*columns, *world.writes.drain(header.layer)])
        with world.stats.phase("wait"):
            visitors = world.transport.collect(header)
        world.writes.confirm(before)  # who takes this step took the writes of the last one
        world.tables.settle()
        with world.stats.phase("answer"):
            self._check(visitors)
            for rank, visitor in enumerate(visitors):
                if visitor is not None:
                    with world.transport.blaming(rank):
                        world.writes.apply(visitor)
        world.backend.flush(header, visitors)
        return visitors

    def recipients(self, wanted: Callable[[], Tensor]) -> None:
        """Everyone: all ranks take part in every exchange."""

    def unreachable(self) -> Mapping[int, PeerError]:
        """Nobody: a lost rank ends the world's steps."""
        return {}

    def check_tables_may_change(self) -> None:
        """They may, between steps."""

    def close(self) -> None:
        """Nothing is open."""

    def _check(self, messages: Sequence[Message | None]) -> None:
        for rank, message in enumerate(messages):
            if message is not None:
                with self._world.transport.blaming(rank):
                    self._world.check_columns(message)


def settle(world: World, header: Header, columns: Sequence[Column] = ()) -> list[Message | None]:
    """An exchange without answers, of the whole world: see `Lockstep.settle`."""
    return world.exchanger.settle(header, columns)


def begin_service(world: World) -> None:
    """The step in which ranks begin to serve: all have equal tables, and took all writes before.

    Raises: PeerError naming who died, stalled, or has other tables.
    """
    world.progress.begin()
    header = world.header("serve", layer=0)
    world.transport.post(header)
    for rank, message in enumerate(world.transport.collect(header)):
        if message is not None:
            with world.transport.blaming(rank):
                world.check_columns(message)
    world.tables.settle()
    world.writes.confirm()


def broadcast(name: str, rows: Tensor, world: World, to: Tensor | None = None) -> Column:
    """The same rows for every other rank, or for the ranks `to` (W,) bool."""
    counts = torch.full((world.world_size,), len(rows))
    if to is not None:
        counts = counts * to
    return Column(name, rows, counts, torch.arange(len(rows)).repeat(world.world_size))


@contextmanager
def step(world: World) -> Iterator[None]:
    """A step of the whole world: every other rank is informed of whatever ends it early, so that none
    waits in vain."""
    try:
        yield
    except (PeerError, SnapshotError):  # every rank raises it, or nothing has happened yet
        raise
    except CoverageError as error:
        world.transport.abort(error.holders, f"rank {world.rank} was not served: {error}")
        raise
    except BaseException as error:
        _abort(world, error)
        raise


@contextmanager
def agreed_step(world: World) -> Iterator[None]:
    """A step whose ValueErrors every rank raises alike once all have spoken: nobody waits then."""
    try:
        yield
    except (PeerError, ValueError):
        raise
    except BaseException as error:
        _abort(world, error)
        raise


def _abort(world: World, error: BaseException) -> None:
    world.transport.abort((world.rank,), f"raised {type(error).__name__}: {error}")
