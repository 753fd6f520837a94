"""A world in service: a player that asks without the others, and a gate that holds a server back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pytest
from player import Player
from ranks import run_loopback
from small_world import Small, small, small_config
from torch import Tensor

from qroam.runtime import Runtime
from qroam.runtime.cpu import answer as answering
from qroam.runtime.scope import Selection
from qroam.runtime.service.server import Service
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.messages import Message
from qroam.runtime.world import World

T = TypeVar("T")


class ServedPlayer(Player):
    """A rank that asks without the others: messages are sent only to whom something is asked."""

    serves = False

    def _lease(self) -> None:
        if not self.serves:  # leases of documents are steps of the whole world
            super()._lease()

    def _check_counters(
        self, before: dict[str, Any], selection: Selection, visible: Tensor
    ) -> None:
        if not self.serves:
            super()._check_counters(before, selection, visible)
            return
        after = self.runtime.stats()
        asked = {line.holder for line in self.runtime.explain() if line.way != "LOCAL"}
        sent = [stats["messages_sent"].get("attend", 0) for stats in (before, after)]
        assert sent[1] - sent[0] == len(asked)


def serving(
    world_size: int,
    work: Callable[[Small, Service], T],
    *,
    bounds: Mapping[str, int] | None = None,
    transports: Sequence[Transport] | None = None,
    **changes: Any,
) -> list[T]:
    """`work` of every rank of a loopback world; each then serves until all are done."""
    config = small_config(**changes)

    def rank(end: Transport) -> T:
        with Runtime.open(config, end) as runtime:
            world = small(runtime)
            with runtime.serve(**(bounds or {})) as service:
                result = work(world, service)
                assert service.wait(20.0)
        return result

    return run_loopback(world_size, rank, deadline_s=config.deadline_s, transports=transports)


class Gate:
    """Holds the server of rank 0 at its requests until it is opened; notes whom it answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str = "attend") -> None:
        self.opened = threading.Event()
        self.order: list[int] = []
        turn = Service._answer
        answer: Callable[[World, Message], Mapping[str, Tensor]]
        answer = getattr(answering, f"answer_{kind}")

        def held(world: World, message: Message) -> Mapping[str, Tensor]:
            assert world.rank != 0 or self.opened.wait(20.0)
            return answer(world, message)

        def noted(server: Service, peer: int, buffer: Tensor) -> None:
            if server._world.rank == 0:
                self.order.append(peer)
            turn(server, peer, buffer)

        monkeypatch.setattr(answering, f"answer_{kind}", held)
        monkeypatch.setattr(Service, "_answer", noted)

    def open_when(self, ready: Callable[[], bool]) -> None:
        """Open once something is so."""
        until(ready)
        self.opened.set()


def until(ready: Callable[[], bool]) -> None:
    expiry = time.monotonic() + 20.0
    while not ready():
        assert time.monotonic() < expiry, "it never came about"
        time.sleep(0.001)


def in_work(served: Service) -> int:
    return sum(map(len, served._inbox._in_work))
