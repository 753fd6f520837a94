"""Peers that die, stall, fall silent, answer late or wrongly while ranks ask each other in service.

Whoever waits for such a peer names it within the deadline and a second, and goes on with the others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense
import faults
import pytest
import torch
from faults import DEADLINE_S, VICTIM, Fault, Outcome, Progress, strike
from ranks import run_loopback
from served import Gate, serving, until
from small_world import ONE_HOLDER, TOKENS, Small, small, small_config
from torch import Tensor

from qroam.partition.placement import Placement
from qroam.runtime import CoverageError, PeerError, Runtime, Service
from qroam.runtime.cpu import answer as answering
from qroam.runtime.service.inbox import MAX_OWED
from qroam.runtime.service.server import SERVICE_CHANNEL
from qroam.runtime.transport.base import Purpose, Transport
from qroam.runtime.transport.messages import Header, Message, decode
from qroam.runtime.world import World

# Processes over gloo ---------------------------------------------------------------------------


def ask_around(rank: int, progress: Progress, fault: Fault) -> None:
    """Attend over all ranks' blocks until the victim's server is struck; then over the others'."""
    config = small_config(deadline_s=DEADLINE_S)
    with Runtime.open(config) as runtime:
        world = small(runtime)
        if rank == VICTIM:
            runtime.serve()
            strike(fault)
            time.sleep(60.0)  # as an engine that does something else
        with runtime.serve() as served:
            try:
                while True:
                    start = time.monotonic()
                    world.check()
                    progress.steps += 1
                    time.sleep(0.01)
            except (PeerError, CoverageError) as error:
                progress.seconds = time.monotonic() - start
                said = f"{type(error).__name__}: {error}"
                culprits = error.culprits if isinstance(error, PeerError) else error.holders
            rest = without(world, VICTIM)
            for _ in range(5):  # the survivors still answer each other, exactly
                rest.check()
            served.wait(1.0)
        raise PeerError(culprits, said)


def without(world: Small, rank: int) -> Small:
    """The same queries over the blocks that do not lie at `rank`."""
    config = world.runtime.config
    ids = torch.arange(TOKENS, dtype=torch.int32)
    ids = ids[ids // config.block_tokens % world.runtime.world_size != rank].repeat(2, 1)
    listed = torch.zeros(2, 1, TOKENS, dtype=torch.bool).index_fill(2, ids[0].long(), True)
    layout = config.model.layers[0]
    expected = [dense.attend(layout, world.query, world.entries, listed)]
    return world._replace(selection=world.selection._replace(ids=ids), expected=expected)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize(
    "fault",
    ["is killed", "is stopped", "closes its sockets", "answers late", "answers wrongly"],
)
def test_all_who_wait_name_a_rank_that(fault: Fault, tmp_path: Path) -> None:
    outcomes = faults.run(tmp_path, ask_around, fault, stopped=True)
    for rank, outcome in enumerate(outcomes):
        if rank != VICTIM:
            check_named(outcome, at_once=fault not in ("is stopped", "answers late"))


def check_named(outcome: Outcome, *, at_once: bool) -> None:
    assert outcome.error.startswith("PeerError"), outcome
    assert outcome.culprits == (VICTIM,), outcome
    assert outcome.seconds <= DEADLINE_S + 1, outcome
    assert not at_once or outcome.seconds < 0.75 * DEADLINE_S, outcome
    assert outcome.exit_code == 0, outcome


# Threads over loopback -------------------------------------------------------------------------


def caught(world: Small) -> PeerError:
    with pytest.raises(PeerError) as raised:
        world.check()
    return raised.value


def answer_with(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Rank 0 answers with something else."""
    honest = answering.answer_attend

    def changed(world: World, message: Message) -> Mapping[str, Tensor]:
        columns = dict(honest(world, message))
        return answer(columns) if world.rank == 0 else columns

    monkeypatch.setattr(answering, "answer_attend", changed)


WRONG: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "nothing": lambda columns: {},
    "a column nobody reads": lambda columns: columns | {"C.out": torch.ones(1)},
    "a row short": lambda columns: {name: rows[1:] for name, rows in columns.items()},
    "NaN": lambda columns: columns | {"A.out": columns["A.out"] * torch.nan},
    "other entries": lambda columns: columns | {"A.covered": columns["A.covered"] ^ 1},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_answer_names_its_holder_and_nobody_else_is_disturbed(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    spoil = threading.Event()
    answer_with(monkeypatch, lambda columns: WRONG[wrong](columns) if spoil.is_set() else columns)
    asked = threading.Barrier(3)

    def work(world: Small, _: Service) -> None:
        if world.rank == 0:
            world.check()
            spoil.set()
        asked.wait(20.0)
        if world.rank != 0:
            with pytest.raises((PeerError, CoverageError)) as raised:
                world.check()
            culprits = getattr(raised.value, "culprits", getattr(raised.value, "holders", None))
            assert culprits == (0,)
        asked.wait(20.0)
        spoil.clear()
        world.check()  # no world was broken

    serving(3, work, mode="always-route")


def test_a_late_answer_is_named_in_time_once_waited_for_and_forgiven(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deadline_s, release = 1.0, threading.Event()
    release.set()

    def late(columns: dict[str, Tensor]) -> dict[str, Tensor]:
        assert release.wait(20.0)
        return columns

    answer_with(monkeypatch, late)

    def work(world: Small, served: Service) -> None:
        if world.rank != 1:
            return
        world.check()
        release.clear()
        start = time.monotonic()
        error = caught(world)
        assert deadline_s <= time.monotonic() - start <= deadline_s + 1
        assert error.culprits == (0,)
        assert "no answer within 1 s" in error.reason
        start = time.monotonic()
        error = caught(world)  # a sick peer costs one deadline, not one per step
        assert time.monotonic() - start < 0.5 * deadline_s
        assert error.culprits == (0,)
        assert "no answer within 1 s, to a request of" in error.reason
        release.set()
        until(lambda: bool(served._inbox._answers[0]))
        for _ in range(3):
            world.check()
        assert not world.runtime._world.transport.suspects
        assert world.runtime.stats()["failures"]["deadline"] == 1

    serving(3, work, deadline_s=deadline_s)


def test_a_lost_peer_is_known_at_once_to_all_and_its_replicas_are_asked() -> None:
    gone, asked = threading.Event(), threading.Barrier(3)

    def rank(end: Transport) -> None:
        with Runtime.open(small_config(placement=Placement(copies=2)), end) as runtime:
            world = small(runtime)
            served = runtime.serve()
            world.check()
            if world.rank == 0:
                assert gone.wait(20.0)
                runtime._world.transport.close()  # without a word
                return
            asked.wait(20.0)
            gone.set()
            until(lambda: 0 in served.lost())
            start = time.monotonic()
            assert "closed its runtime" in served.lost()[0]
            world.check()  # its blocks have copies at rank 2
            assert runtime.lost_blocks() == {}
            assert served.wait(20.0)
            served.close()
            assert time.monotonic() - start < 5.0

    run_loopback(4, rank)


class Raw:
    """Rank 1 as a peer that sends what it likes to rank 0, and hears the answers."""

    def __init__(self, world: Small, served: Service) -> None:
        self.world, self.inbox = world.runtime._world, served._inbox
        self.header = replace(
            self.world.header("attend", layer=0), channel=SERVICE_CHANNEL, epoch=1
        )

    def ask(self, header: Header, columns: Mapping[str, Tensor] | None = None) -> Message:
        self.world.transport.send(0, header, columns or {}, Purpose.ASK)
        arrived = self.inbox.next_answer([0], time.monotonic() + 20.0)
        assert arrived is not None
        return decode(arrived[1])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer": 7}, "layer 7 does not exist"),
        ({"tables": 1}, "its tables are 1"),
        ({"incarnation": 1}, "another configuration"),
        ({"channel": 0}, "no service answers 'attend' on channel 0"),
        ({"kind": "steal"}, "no service answers 'steal'"),
        ({"epoch": 0}, "epoch 0 comes after epoch 0"),
        ({"unit_tokens": 99}, "units of 99 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_refused_with_its_reason(change: dict[str, Any], reason: str) -> None:
    def work(world: Small, served: Service) -> Any:
        if world.rank == 1:
            raw = Raw(world, served)
            wrong = replace(raw.header, **change)
            answer = raw.ask(wrong, {"fetch": torch.zeros(1, dtype=torch.int32)})
            assert answer.header == replace(wrong, kind="refused")
            assert reason in bytes(answer.columns["reason"].tolist()).decode()
            wrong = replace(raw.header, epoch=4)
            answer = raw.ask(wrong, {"C.query": torch.ones(1)})
            assert answer.header == replace(wrong, kind="refused")
            assert b"no column C.query" in bytes(answer.columns["reason"].tolist())
            good = replace(raw.header, epoch=5)
            assert raw.ask(good).header.kind == "attend-answer"
            assert raw.ask(good).header.kind == "refused"  # of a former life
        elif world.rank == 2:
            world.check()
        assert served.wait(20.0)
        return world.runtime.stats()["served"]["refused"]

    assert serving(3, work, **ONE_HOLDER)[0] == {1: 3}


def test_a_refusal_is_raised_where_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(world: Small, _: Service) -> None:
        if world.rank == 1:
            world.runtime._world._incarnation += 1
            error = caught(world)
            assert error.culprits == (0,)
            assert "refused what rank 1 asked: it was opened with another" in error.reason

    serving(2, work, **ONE_HOLDER)


@pytest.mark.parametrize("fault", ["garbage", "flood", "a step", "unasked answers", "done twice"])
def test_a_peer_that_breaks_the_protocol_is_told_and_the_others_are_served(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    broken, gate = threading.Event(), Gate(monkeypatch)

    def work(world: Small, served: Service) -> None:
        if world.rank == 1:
            raw = Raw(world, served)
            transport = world.runtime._world.transport
            match fault:
                case "garbage":
                    transport._send(0, torch.ones(99, dtype=torch.uint8), Purpose.ASK)
                case "flood":  # the server does not get round to answer
                    for epoch in range(1, 40 * MAX_OWED):
                        transport.send(0, replace(raw.header, epoch=epoch), {}, Purpose.ASK)
                case "a step":
                    transport.send(0, raw.header, {}, Purpose.STEP)
                case "unasked answers":
                    for _ in range(MAX_OWED + 1):
                        transport.send(0, raw.header, {}, Purpose.ANSWER)
                case "done twice":
                    for _ in range(2):
                        transport.send(0, raw.header, {}, Purpose.DONE)
            gate.opened.set()
            until(lambda: 0 in served.lost())
            assert served.lost()[0].startswith("rank 1: ")  # it is told that it is to blame itself
            assert caught(world).culprits == (1,)
            broken.set()
        else:
            assert broken.wait(20.0)
            if world.rank == 0:
                assert list(served.lost()) == [1]
            else:
                world.check()

    serving(3, work, **ONE_HOLDER)


def test_a_server_that_breaks_is_named_at_once_and_its_engine_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def boom(columns: dict[str, Tensor]) -> dict[str, Tensor]:
        raise ArithmeticError("boom")

    answer_with(monkeypatch, boom)

    def rank(end: Transport) -> None:
        with Runtime.open(small_config(**ONE_HOLDER), end) as runtime:
            world = small(runtime)
            served = runtime.serve()
            if world.rank:
                start = time.monotonic()
                error = caught(world)
                assert time.monotonic() - start < 5.0
                assert error.culprits == (0,)
                assert "its server raised ArithmeticError: boom" in error.reason
                served.close()
            else:
                until(lambda: served._broken is not None)
                with pytest.raises(RuntimeError, match="the server broke: boom"):
                    world.check()
                with pytest.raises(RuntimeError, match="the server broke: boom"):
                    served.close()

    run_loopback(3, rank)


def test_a_peer_that_does_not_part_is_named_when_a_service_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stuck = threading.Event()

    def hold(columns: dict[str, Tensor]) -> dict[str, Tensor]:
        assert stuck.wait(20.0)
        return columns

    answer_with(monkeypatch, hold)

    def rank(end: Transport) -> None:
        with Runtime.open(small_config(deadline_s=1.0, **ONE_HOLDER), end) as runtime:
            world = small(runtime)
            served = runtime.serve()
            if world.rank == 1:
                header = Raw(world, served).header
                runtime._world.transport.send(0, header, {}, Purpose.ASK)
                start = time.monotonic()
                with pytest.raises(PeerError, match="did not part within 1 s") as raised:
                    served.close()
                assert raised.value.culprits == (0,)
                assert 1.0 <= time.monotonic() - start <= 2.5
                stuck.set()
            else:
                assert stuck.wait(20.0)
                served.close()

    run_loopback(2, rank, deadline_s=1.0)
