"""Leaving a world and joining its next incarnation, and messages of another incarnation."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from faults import die
from incarnations import Lives, broken_world, known, threads
from small_world import small, small_config
from torch.testing._internal.distributed.fake_pg import FakeStore

from qroam.partition.placement import Placement
from qroam.runtime import PeerError, Runtime
from qroam.runtime.cpu import answer as answering
from qroam.runtime.transport.base import Purpose
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Message
from qroam.runtime.world import World


def test_a_default_group_of_the_former_life_is_refused() -> None:
    """A group beside it would wait for the rank that is gone; one begun anew, or none, will do."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        runtime = Runtime.open(small_config(), LoopbackTransport.world(1)[0])
        world = small(runtime)
        for _ in range(2):
            with pytest.raises(
                RuntimeError, match="default process group is still that of the for"
            ):
                runtime.rejoin(incarnation=1)
            world.check()
    finally:
        dist.destroy_process_group()
    runtime.rejoin(incarnation=1)
    known(runtime).check()
    runtime.close()


def test_no_step_is_taken_between_disconnect_and_rejoin() -> None:
    def then(runtime: Runtime, lives: Lives) -> None:
        runtime.disconnect()
        runtime.disconnect()
        for step in (runtime.serve, lambda: runtime.idle_attend(0), lambda: runtime.pin("doc")):
            with pytest.raises(RuntimeError, match="disconnected: rejoin first"):
                step()
        assert runtime.documents()[0].name == "doc"
        runtime.rejoin(lives.end(1, runtime.rank, 3), incarnation=1)
        known(runtime).check()

    broken_world(4, 3, then)


def test_no_rank_rejoins_while_its_server_is_at_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the server does then is done in the life in which it was asked, or not at all."""
    at_work, stuck = threading.Event(), threading.Event()

    def held(world: World, message: Message) -> Mapping[str, torch.Tensor]:
        at_work.set()
        assert stuck.wait(20.0)
        return {}

    monkeypatch.setattr(answering, "answer_attend", held)
    lives = Lives(deadline_s=1.0)
    config = small_config(placement=Placement(copies=2), max_blocks=16, deadline_s=1.0)

    def rank(rank: int) -> None:
        end = lives.end(0, rank, 3)
        with Runtime.open(config, end) as runtime:
            small(runtime)
            server = runtime.serve()._server
            if rank == 2:  # asks rank 0, and dies
                header = replace(runtime._world.header("attend", layer=0), channel=1, epoch=1)
                end.send(0, header, {}, Purpose.ASK)
                assert at_work.wait(20.0)
                die(end)
                with suppress(PeerError):
                    runtime.close()
                return
            assert at_work.wait(20.0)
            if rank == 0:
                for leave in (runtime.disconnect, partial(runtime.rejoin, incarnation=1)):
                    with pytest.raises(RuntimeError, match="still at a request"):
                        leave()
                assert runtime._world.transport is end
                stuck.set()
            else:
                assert stuck.wait(20.0)
            runtime.disconnect()
            assert not server.is_alive()
            runtime.rejoin(lives.end(1, rank, 2), incarnation=1)
            known(runtime).check()

    threads([partial(rank, r) for r in range(3)])


def test_messages_of_a_former_life_are_refused_and_counted() -> None:
    """In a step, and in service; aborts as well."""

    def then(runtime: Runtime, lives: Lives) -> None:
        rank, end = runtime.rank, lives.end(1, runtime.rank, 3)
        runtime.rejoin(end, incarnation=1)
        world, header = runtime._world, runtime._world.header("attend", layer=0)
        if rank == 2:  # speaks as it did in its former life
            end.incarnation = 0
            for peer in (0, 1):
                end.send(peer, header, {}, Purpose.STEP)
                end._send_abort(peer, (0,), "a quarrel of old")
            end.incarnation = 1
        known(runtime).check()
        with runtime.serve() as served:
            if rank == 2:
                end.incarnation = 0
                for peer in (0, 1):
                    for purpose in (Purpose.ASK, Purpose.STEP, Purpose.ANSWER, Purpose.LEAVE):
                        end.send(peer, header, {}, purpose)
                end.incarnation = 1
            for _ in range(3):
                known(runtime).check()
            assert served.wait(20.0)
            assert served.lost() == {}
        known(runtime).check()
        assert runtime.stats()["failures"]["late"] == (0 if rank == 2 else 6)
        assert world.transport.late == ({} if rank == 2 else {2: 6})

    broken_world(4, 3, then)


def test_who_speaks_in_a_former_life_or_a_later_one_is_named() -> None:
    deadline_s = 2.0

    def then(runtime: Runtime, lives: Lives) -> None:
        incarnation = 1 if runtime.rank == 2 else 2
        with pytest.raises(PeerError) as raised:
            runtime.rejoin(lives.end(1, runtime.rank, 3), incarnation=incarnation)
        if runtime.rank == 2:
            assert "is in incarnation 2 of the world, rank 2 in 1" in str(raised.value)
        else:
            assert raised.value.culprits == (2,)
            assert "messages of a former incarnation were refused" in str(raised.value)

    broken_world(4, 3, then, deadline_s=deadline_s)
