"""Requests in work are bounded, the others are held back, and sources take turns."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from ranks import RankPool
from served import Gate, in_work, serving, until
from small_world import ONE_HOLDER, Small, small, small_config

from qroam.runtime import Runtime
from qroam.runtime.service import server as service
from qroam.runtime.service.server import Service
from qroam.runtime.transport.base import Purpose, Transport


@pytest.mark.parametrize(
    ("bounds", "most"),
    [({"max_requests": 3}, 3), ({"max_bytes": 1}, 1), ({}, 8)],
    ids=["requests", "bytes, one larger request", "without"],
)
def test_requests_in_work_are_bounded_and_the_others_held_back(
    monkeypatch: pytest.MonkeyPatch, bounds: dict[str, int], most: int
) -> None:
    gate = Gate(monkeypatch)

    def work(world: Small, served: Service) -> Any:
        if world.rank == 0:
            gate.open_when(lambda: in_work(served) + len(served._inbox._line) == 8)
        else:
            world.check()
        assert served.wait(20.0)
        return world.runtime.stats()["served"]

    served = serving(9, work, bounds=bounds, mode="always-route", **ONE_HOLDER)[0]
    assert served["most_requests"] == most
    assert served["answered"] == dict.fromkeys(range(1, 9), 1)


def test_bytes_in_work_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(world: Small, served: Service) -> tuple[int, int]:
        for _ in range(10 if world.rank else 0):
            world.check()
        assert served.wait(20.0)
        stats = world.runtime.stats()
        return stats["bytes_sent"].get("attend", 0) // 10, stats["served"]["most_bytes"]

    mode = "always-route"  # equal requests
    size = serving(2, work, mode=mode, **ONE_HOLDER)[1][0]
    bound = 5 * size // 2
    most = serving(6, work, bounds={"max_bytes": bound}, mode=mode, **ONE_HOLDER)[0][1]
    assert 0 < most <= bound


def bounded(transport: Transport) -> Any:
    with Runtime.open(small_config(**ONE_HOLDER), transport) as runtime:
        world = small(runtime)
        with runtime.serve(max_requests=1) as served:
            time.sleep(
                0.5 if runtime.rank else 0.0
            )  # what came before the service is taken as it is
            for _ in range(10 if runtime.rank else 0):
                world.check()
            assert served.wait(20.0)
        return runtime.stats()["served"]


def test_listeners_hold_requests_back(four_ranks: RankPool) -> None:
    served = four_ranks.run(bounded)[0]
    assert served["answered"] == {1: 10, 2: 10, 3: 10}
    assert served["most_requests"] == 1


def test_sources_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 has two requests waiting before 2 and 3 have one each: they go before its second."""
    gate = Gate(monkeypatch)
    came = [threading.Event() for _ in range(4)]

    def work(world: Small, served: Service) -> None:
        transport = world.runtime._world.transport
        if world.rank == 0:
            for number, event in enumerate(came):
                until(lambda number=number: in_work(served) == number)  # type: ignore[misc]
                event.set()
            gate.open_when(lambda: in_work(served) == 4)
        elif world.rank == 1:
            for number in (1, 2):
                assert came[number - 1].wait(20.0)
                header = world.runtime._world.header("attend", layer=0)
                header = replace(header, channel=service.SERVICE_CHANNEL, epoch=number)
                transport.send(0, header, {}, Purpose.ASK)
        else:
            assert came[world.rank].wait(20.0)
            world.check()

    serving(4, work, **ONE_HOLDER)
    assert gate.order == [1, 2, 3, 1]
