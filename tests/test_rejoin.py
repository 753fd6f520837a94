"""A world that goes on after a rank died: without it, with it started again, or with a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest
from cases import Case, Player, make_config
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_loopback
from snapshots import RestoredPlayer
from test_central import EVERYWHERE, cases
from test_failover import die

from qroam.runtime import PeerError, Runtime
from qroam.runtime.transport import LoopbackTransport

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


class Survivor(Player):
    """Plays on under another number."""

    def moved(self) -> None:
        self.rank, self.world = self.runtime.rank, self.runtime.world_size
        assert all(check.is_sound for check in self.runtime.verify())


def play_on(case: Case, victim: int, replaced: bool) -> None:
    """Decode; `victim` is gone; decode without it or with another in its place, exactly."""
    lives = Lives()
    size = case.world if replaced else case.world - 1

    def survivor(rank: int) -> None:
        with Runtime.open(make_config(case), lives.end(0, rank, case.world)) as runtime:
            player = Survivor(runtime, case)
            player.add_documents()
            player.prefill()
            player.decode()
            if rank == victim:
                die(lives.end(0, rank, case.world))
                return
            with pytest.raises(PeerError) as raised:
                runtime.idle_attend(0)
            assert raised.value.culprits == (victim,)
            now = rank if replaced or rank < victim else rank - 1
            runtime.rejoin(lives.end(1, now, size), incarnation=1)
            assert runtime.lost_blocks() == {}
            player.moved()
            for _ in range(2):
                player.decode()

    def newcomer() -> None:
        with Runtime.open(make_config(case), lives.end(1, victim, size), incarnation=1) as runtime:
            player = RestoredPlayer(runtime, case)
            player.load_weights()
            player.learn()
            assert all(check.is_sound for check in runtime.verify())
            for _ in range(2):
                player.decode()

    works: list[Callable[[], None]]
    works = [lambda rank=rank: survivor(rank) for rank in range(case.world)]  # type: ignore[misc]
    threads([*works, newcomer] if replaced else works)


@given(case=cases(worlds=(3, 4)), victim=st.integers(0, 3), replaced=st.booleans())
@settings(EVERYWHERE, max_examples=12)
def test_a_world_goes_on_exactly(case: Case, victim: int, replaced: bool) -> None:
    copies = 2 if case.world == 3 or case.copies < 2 else case.copies
    play_on(replace(case, copies=copies, stranger=None), victim % case.world, replaced)
