"""Service: each rank asks and answers when it wants to; loopback threads and gloo processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cases import Case, Picks, make_config
from effort import examples, slow_after
from hypothesis import given, settings
from ranks import RankPool, run_loopback
from served import Gate, ServedPlayer, in_work, serving, until
from small_world import ONE_HOLDER, TOKENS, Small, small, small_config
from strategies import EVERYWHERE, cases
from torch import Tensor

from qroam.partition.placement import Placement
from qroam.runtime import PeerError, Request, Runtime
from qroam.runtime.cpu import answer as answering
from qroam.runtime.service.server import Service
from qroam.runtime.transport.base import Purpose, Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Message
from qroam.runtime.world import World


def play(transport: Transport, case: Case) -> list[Tensor]:
    """Prefill in step, decode in service, each rank as often as it likes; then step once more."""
    with Runtime.open(make_config(case), transport) as runtime:
        player = ServedPlayer(runtime, case)
        player.add_documents()
        player.prefill()
        player.serves = True
        with runtime.serve() as service:
            for _ in range((case.steps + runtime.rank) % 4):
                player.decode()
            assert service.wait(30.0)
        player.serves = False
        player.decode()
        return player.outputs


@given(case=cases(worlds=(2, 3, 4)))
@settings(EVERYWHERE, max_examples=examples(10, quick=5))
def test_service_equals_dense_attention(case: Case) -> None:
    run_loopback(case.world, lambda transport: play(transport, case))


@given(case=cases(worlds=(4,)))
@settings(EVERYWHERE, max_examples=examples(5, quick=2))
def test_service_equals_dense_attention_on_four_processes(four_ranks: RankPool, case: Case) -> None:
    four_ranks.run(play, case)


def decode_alone(transport: Transport, case: Case) -> dict[str, Any]:
    """Rank 0 decodes 32 steps of all layers, checked against dense attention; the others serve.

    Adds how often documents were at `offsets` in a step.
    """
    shifted = 0
    with Runtime.open(make_config(case), transport) as runtime:
        player = ServedPlayer(runtime, case)
        player.add_documents()
        player.serves = True
        with runtime.serve() as service:
            if runtime.rank == 0:
                for _ in range(32):
                    player.decode()
                    last = runtime._world.backend.last_step()
                    shifted += last is not None and last.model.shifted
            assert service.wait(60.0)
        return {**runtime.stats(), "offsets": shifted}


@pytest.mark.parametrize("offsets", slow_after(1, [False, True]), ids=["in place", "at offsets"])
@pytest.mark.parametrize("picks", ["random", "select"])
def test_one_rank_decodes_while_the_others_only_serve(
    four_ranks: RankPool, picks: Picks, offsets: bool
) -> None:
    case = Case(
        seed=4,
        world=4,
        layers=2,
        picks=picks,
        requests=1,
        queries=(2,),
        documents=(60, 33),
        offsets=offsets,
    )
    stats = four_ranks.run(decode_alone, case)
    assert stats[0]["steps"] == 64
    assert (stats[0]["offsets"] > 0) == offsets
    for others in stats[1:]:
        assert others["steps"] == others["queries"] == 0
        answers = {"attend-answer", "select-answer"}
        assert set(others["messages_sent"]) <= {"open", "serve", "done", "leave"} | answers
    asked = sum(stats[0]["messages_sent"].get(kind, 0) for kind in ("attend", "select"))
    assert asked == sum(others["served"]["answered"][0] for others in stats[1:]) >= 32


# A small world, in which every rank knows the answers ------------------------------------------


def test_two_requesters_five_layers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def work(world: Small, served: Service) -> None:
        if world.rank == 0:
            gate.open_when(lambda: in_work(served) == 2)  # both wait, at layers 0 and 5
        else:
            for step in range(12):
                world.check(layer=(step + (0, 0, 5)[world.rank]) % 6)

    serving(3, work, layers=6, **ONE_HOLDER)


def test_eight_requesters_on_one_holder() -> None:
    def work(world: Small, served: Service) -> dict[str, Any]:
        for _ in range(5 if world.rank else 0):
            world.check()
        assert served.wait(20.0)
        return world.runtime.stats()

    stats = serving(9, work, **ONE_HOLDER)
    assert stats[0]["served"]["answered"] == dict.fromkeys(range(1, 9), 5)
    assert all(not other["served"]["answered"] for other in stats[1:])


def test_a_rank_is_served_and_asks_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server waits until its own engine waits for an answer: neither needs the other's thread."""
    answer = answering.answer_attend
    asking = [threading.Event() for _ in range(3)]

    def held(world: World, message: Message) -> Mapping[str, Tensor]:
        assert asking[world.rank].wait(20.0)
        return answer(world, message)

    monkeypatch.setattr(answering, "answer_attend", held)

    def work(world: Small, served: Service) -> dict[str, Any]:
        attend_own = world.runtime._world.stores.entries.resolve

        def resolve(*args: Any) -> Any:  # own work comes after the asking
            asking[world.rank].set()
            return attend_own(*args)

        monkeypatch.setattr(world.runtime._world.stores.entries, "resolve", resolve)
        for _ in range(5):
            world.check()
        assert served.wait(20.0)
        return world.runtime.stats()

    for rank, stats in enumerate(serving(3, work)):
        assert stats["served"]["answered"] == {peer: 5 for peer in range(3) if peer != rank}


# Coming and going ------------------------------------------------------------------------------


def test_a_request_that_comes_before_the_service_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    divert = LoopbackTransport.divert

    def later(end: LoopbackTransport, inbox: Any) -> None:
        if end.rank == 0:
            until(lambda: not end._arrived.empty())
        divert(end, inbox)

    monkeypatch.setattr(LoopbackTransport, "divert", later)

    def work(world: Small, _: Service) -> None:
        if world.rank:
            world.check()

    serving(2, work, **ONE_HOLDER)


def test_requests_in_work_are_answered_while_a_service_closes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = Gate(monkeypatch)

    def work(world: Small, served: Service) -> None:
        if world.rank == 0:
            until(lambda: in_work(served) == 2)
            threading.Timer(0.2, gate.opened.set).start()
            served.close()
            assert gate.opened.is_set()
            assert sorted(gate.order) == [1, 2]
        else:
            world.check()
            until(lambda: bool(served._inbox._left))
            with pytest.raises(PeerError, match="closed its service") as caught:
                world.check()
            assert caught.value.culprits == (0,)

    config = small_config(**ONE_HOLDER)

    def rank(end: Transport) -> None:
        with Runtime.open(config, end) as runtime:
            world = small(runtime)
            with runtime.serve() as served:
                work(world, served)
            world.check()  # in step again

    run_loopback(3, rank)


def test_a_request_begun_before_its_holder_leaves_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rank 1 has begun to ask when rank 0 leaves, and sends its request only after it knows."""

    def work(world: Small, served: Service) -> None:
        transport = world.runtime._world.transport
        send, inbox = transport.send, served._inbox

        def late(*args: Any) -> None:
            if args[3] is Purpose.ASK:
                asking.set()
                until(lambda: bool(inbox._served[Purpose.LEAVE]))
            send(*args)

        if world.rank == 0:
            assert asking.wait(20.0)
            served.close()
            assert world.runtime.stats()["served"]["answered"] == {1: 1}
        else:
            monkeypatch.setattr(transport, "send", late)
            world.check()

    asking = threading.Event()
    serving(2, work, **ONE_HOLDER)


def test_services_follow_each_other_and_tables_change_between_them() -> None:
    def rank(end: Transport) -> None:
        with Runtime.open(small_config(max_blocks=9), end) as runtime:
            world = small(runtime)
            for _ in range(3):
                with runtime.serve() as served:
                    world.check()
                    with pytest.raises(RuntimeError, match="serves already"):
                        runtime.serve()
                    assert served.wait(20.0)
                    with pytest.raises(RuntimeError, match="asks no more"):
                        world.check()
                world.check()
                runtime.add_document("new", tokens=8)
                runtime.remove_document("new")

    run_loopback(3, rank)


CHANGES: dict[str, Callable[[Runtime, Request], object]] = {
    "add": lambda r, _: r.add_document("new", tokens=8),
    "remove": lambda r, _: r.remove_document("doc"),
    "pin": lambda r, _: r.pin("doc"),
    "unpin": lambda r, _: r.unpin("doc"),
    "quota": lambda r, _: r.set_quota("some", 1),
    "make room": lambda r, _: r.make_room("new", tokens=8),
    "publish": lambda r, request: r.publish("new", request if r.rank == 0 else None),
    "copy": lambda r, request: r.copy_document(request, "doc"),
    "copy nothing": lambda r, _: r.copy_document(None, None),
    "snapshot": lambda r, _: r.snapshot("nowhere"),
    "restore": lambda r, _: r.restore("nowhere"),
    "verify copies": lambda r, _: r.verify_copies(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_documents_are_not_changed_in_service(change: str) -> None:
    """Each change is refused on the rank that asks for it, with nothing done and nothing said."""

    def work(world: Small, __: Service) -> None:
        runtime = world.runtime
        request, before = runtime.request(["doc"]), runtime._world.directory
        ids = runtime.append(request, 1)
        runtime.write(0, ids, world.entries[:1])
        for _ in range(2):
            with pytest.raises(RuntimeError, match="between services"):
                CHANGES[change](runtime, request)
        assert runtime._world.directory is before
        assert request.length == 1
        world.check()

    serving(2, work, max_blocks=9, private_blocks=9, request_blocks=9)


def test_a_snapshot_is_written_beside_a_service(tmp_path: Path) -> None:
    """Begun before and finished after it, with what was closed before; one left open is cancelled."""

    def rank(end: Transport) -> None:
        with Runtime.open(small_config(max_blocks=16), end) as runtime:
            world = small(runtime)
            runtime.add_document("late", tokens=8)
            runtime.begin_snapshot(tmp_path / "s")
            with runtime.serve() as served:
                world.check()
                with pytest.raises(RuntimeError, match="between services"):
                    runtime.finish_snapshot()
                if runtime.rank == 1:
                    request = runtime.request(into="late")
                    runtime.write(0, runtime.append(request, 8), world.entries[:8])
                assert served.wait(20.0)
            runtime.finish_snapshot()
            runtime.begin_snapshot(tmp_path / "s")
        with Runtime.open(small_config(max_blocks=9), end) as runtime:
            assert runtime.restore(tmp_path / "s").documents == {"doc": TOKENS, "late": 0}
            scope = runtime.scope(documents=["doc"], queries=2)
            selection = runtime.selection(world.selection.ids, scope)
            with runtime.serve() as served:
                world._replace(runtime=runtime, selection=selection).check()
                assert served.wait(20.0)

    ends = LoopbackTransport.world(3, deadline_s=10.0)
    run_loopback(3, rank, transports=ends)


def test_a_runtime_closes_its_service() -> None:
    def rank(end: Transport) -> None:
        with Runtime.open(small_config(), end) as runtime:
            world = small(runtime)
            served = runtime.serve()
            world.check()
            assert served.wait(20.0)
        assert not served._server.is_alive()

    run_loopback(3, rank)


def test_bad_bounds_are_refused_before_anything_is_said() -> None:
    with Runtime.open(small_config()) as runtime:
        for bounds in ({"max_requests": 0}, {"max_bytes": -1}, {"max_bytes": 1.5}):
            with pytest.raises(ValueError, match="at least 1"):
                runtime.serve(**bounds)
        with runtime.serve() as served:  # a world of one has nobody to wait for
            assert served.wait(0.0)


# State that threads share ----------------------------------------------------------------------


def test_one_thread_of_a_rank_asks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def work(world: Small, served: Service) -> None:
        if world.rank == 0:
            return
        asking = threading.Thread(target=world.check)
        asking.start()
        until(lambda: bool(served._inbox._asked))
        with pytest.raises(RuntimeError, match="one thread"):
            world.check()
        gate.opened.set()
        asking.join()

    serving(2, work, **ONE_HOLDER)


# Whom to ask is data ---------------------------------------------------------------------------


def test_replicas_are_asked_instead_of_ranks_to_avoid() -> None:
    """Copies lie at a block's owner and two ranks further: half of them at rank 0."""

    def work(world: Small, _: Service) -> list[set[int]]:
        asked = []
        for avoided in ((), (1,), (2, 3), ()) if world.rank == 0 else ():
            world.runtime.avoid(avoided)
            world.check()
            asked.append({line.holder for line in world.runtime.explain()})
        with pytest.raises(ValueError, match="cannot avoid"):
            world.runtime.avoid([world.rank])
        return asked

    asked = serving(4, work, placement=Placement(copies=2))[0]
    assert asked == [{0, 1, 3}, {0, 3}, {0, 1}, {0, 1, 3}]
