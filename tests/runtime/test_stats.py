"""Counters against what happened: the last step, failures, and how long blocks are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from observed import CONFIG, attend, prepared
from ranks import run_loopback
from two_documents import B, Bench, Q

from qroam.runtime import CoverageError, PeerError, Runtime
from qroam.runtime.cpu import answer as holder
from qroam.runtime.cpu import step
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Message
from qroam.runtime.world import World


@pytest.mark.parametrize(("mode", "way"), [("always-route", "ROUTE_A"), ("always-fetch", "FETCH")])
def test_stats_and_explain_tell_of_the_last_step(mode: str, way: str) -> None:
    def worker(transport: Transport) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
        bench = Bench(transport, mode=mode)
        assert bench.runtime.explain() == []
        if bench.runtime.rank == 0:
            bench.attend(bench.pick(0, 1, B, 3 * B).ids)
        else:
            bench.runtime.idle_attend(0)
        return bench.runtime.explain(), bench.runtime.stats(), dict(transport.bytes_sent)

    (lines, stats, sent), (idle_lines, idle_stats, _) = run_loopback(2, worker)
    assert [(line.query, line.holder, line.units, line.way) for line in lines] == [
        (query, holder, 2, "LOCAL" if holder == 0 else way)
        for query in range(Q)
        for holder in (0, 1)
    ]
    assert all(line.layer == line.branch == 0 for line in lines)
    remote = [line for line in lines if line.holder == 1]
    assert all(line.reason == "FORCED" for line in remote)
    assert all(line.route_us > 0 and line.fetch_us > 0 for line in remote)
    assert (stats["rank"], stats["steps"], stats["queries"]) == (0, 1, Q)
    assert stats["decisions"][1][way.lower()] == Q
    assert stats["bytes_sent"] == sent
    assert {"attend", "attend-answer"} <= set(sent)
    assert stats["pool_bytes"] > 0
    assert all(seconds >= 0 for seconds in stats["phase_s"].values())
    assert idle_lines == []
    assert (idle_stats["steps"], idle_stats["queries"]) == (1, 0)


def test_a_released_request_ends_the_life_of_its_blocks() -> None:
    with Runtime.open(CONFIG) as runtime:
        request = runtime.request()
        runtime.append(request, 40)
        assert sum(runtime.stats()["lifetime"]["block"]["counts"]) == 0
        runtime.release(request)
        assert sum(runtime.stats()["lifetime"]["block"]["counts"]) == 3


NO_FAILURES = {"coverage": 0, "deadline": 0, "failover": 0, "late": 0}


def test_coverage_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = holder.answer_attend

    def wrong(world: World, message: Message) -> Any:
        answer = right(world, message)
        return {n: rows * 0 if n.endswith("mark") else rows for n, rows in answer.items()}

    monkeypatch.setattr(step, "answer_attend", wrong)

    def work(end: Transport) -> dict[str, int]:
        with Runtime.open(CONFIG, end) as runtime:
            prepared(runtime)
            with pytest.raises(CoverageError):
                attend(runtime, 0)
            failures: dict[str, int] = runtime.stats()["failures"]
            return failures

    assert run_loopback(2, work) == [NO_FAILURES | {"coverage": 1}] * 2


def test_deadline_expiries_are_counted() -> None:
    def work(end: Transport) -> dict[str, int]:
        with Runtime.open(replace(CONFIG, deadline_s=1.0), end) as runtime:
            if end.rank == 0:  # rank 1 never comes
                with pytest.raises(PeerError, match="no answer"):
                    runtime.idle_attend(0)
            failures: dict[str, int] = runtime.stats()["failures"]
            return failures

    ends = LoopbackTransport.world(2, deadline_s=1.0)
    assert run_loopback(2, work, transports=ends)[0] == NO_FAILURES | {"deadline": 1}
