"""Worlds over loopback that lose a rank and go on in a later incarnation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import pytest
from faults import die
from ranks import run_loopback
from small_world import Small, small, small_config

from qroam.partition.placement import Placement
from qroam.runtime import PeerError, Runtime
from qroam.runtime.transport.loopback import LoopbackTransport

T = TypeVar("T")


class Lives:
    """The incarnations of a loopback world: who is there in each, and as which rank."""

    def __init__(self, deadline_s: float = 20.0) -> None:
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._ends: dict[int, list[LoopbackTransport]] = {}

    def end(self, incarnation: int, rank: int, world_size: int) -> LoopbackTransport:
        """The rank's end in that incarnation; all ranks ask for the same size."""
        with self._lock:
            if incarnation not in self._ends:
                ends = LoopbackTransport.world(world_size, deadline_s=self._deadline_s)
                self._ends[incarnation] = ends
            return self._ends[incarnation][rank]


def threads(works: Sequence[Callable[[], T]]) -> list[T]:
    """Each in a thread of its own."""
    ends = LoopbackTransport.world(len(works))  # for the numbers alone
    return run_loopback(len(works), lambda end: works[end.rank](), transports=ends)


def known(runtime: Runtime) -> Small:
    """The small world's questions and answers, of a runtime that has its document already."""
    layout = runtime.config.model.layers[0]
    with Runtime.open(replace(runtime.config, placement=Placement())) as alone:
        world = small(alone)
    ids = runtime._world.directory.document("doc").ids().repeat(2, 1)
    selection = runtime.selection(ids, runtime.scope(documents=["doc"], queries=2))
    assert world.query.shape[1] == layout.heads
    return world._replace(runtime=runtime, selection=selection)


def broken_world(
    size: int, victim: int, then: Callable[[Runtime, Lives], None], **changes: Any
) -> Lives:
    """A small world with replicas whose `victim` died; what the survivors do `then`."""
    lives = Lives(deadline_s=changes.pop("deadline_s", 20.0))

    def survivor(rank: int) -> None:
        config = small_config(**{"placement": Placement(copies=2), "max_blocks": 16} | changes)
        with Runtime.open(config, lives.end(0, rank, size)) as runtime:
            world = small(runtime)
            world.check()
            if rank == victim:
                die(lives.end(0, rank, size))
                return
            with pytest.raises(PeerError):
                world.check()
            then(runtime, lives)

    threads([partial(survivor, r) for r in range(size)])
    return lives
