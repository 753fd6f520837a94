"""Service: each rank asks and answers when it wants to; loopback threads and gloo processes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from cases import Case, Picks, make_config
from effort import examples, slow_after
from hypothesis import given, settings
from ranks import RankPool, run_loopback
from served import Gate, ServedPlayer, in_work, serving, until
from small_world import ONE_HOLDER, TOKENS, Small, small, small_config
from strategies import EVERYWHERE, cases
from torch import Tensor

from qroam.partition import codec as codec_module
from qroam.partition import pool
from qroam.partition.codec import make_codec
from qroam.partition.placement import Placement
from qroam.partition.pool import BlockStore
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Request, Runtime
from qroam.runtime.cpu import answer as answering
from qroam.runtime.service import server as service
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


# Bounds and turns ------------------------------------------------------------------------------


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


def test_what_one_rank_writes_in_service_another_reads() -> None:
    """Blocks written at rank 1 lie at all ranks; a select or attend of rank 1 brings them there."""
    layout = replace(named_layout("mla-tiny"), codec="fp64", projection=None)
    written = threading.Event()
    g = torch.Generator().manual_seed(2)
    entries = torch.randn(30, 1, layout.entry_dim, generator=g, dtype=torch.float64)
    keys = torch.randn(30, 32, generator=g, dtype=torch.float64)
    query = torch.randn(1, 4, layout.key_dim, generator=g, dtype=torch.float64)
    weights = torch.rand(1, 4, generator=g, dtype=torch.float64)
    expected = dense.attend(layout, query, entries, torch.ones(1, 1, 30, dtype=torch.bool))

    def check(runtime: Runtime, scope: Any) -> None:
        index_query = keys[:1, None].expand(-1, 4, -1).contiguous()
        chosen = runtime.select(0, index_query, weights, scope=scope, top_k=30)
        assert chosen.ids.tolist() == [list(range(30))]
        out = runtime.attend(0, query, chosen)
        assert float((out - expected).abs().max()) <= 1e-12

    def rank(end: Transport, index_placement: str) -> None:
        config = small_config(index_placement=index_placement)
        config = replace(config, model=uniform_model(layout, 1))
        with Runtime.open(config, end) as runtime:
            runtime.add_document("new", tokens=30)
            with runtime.serve() as served:
                if runtime.rank == 1:
                    request = runtime.request(into="new")
                    for first, end_ in ((0, 11), (11, 30)):
                        ids = runtime.append(request, end_ - first)
                        runtime.write(0, ids, entries[first:end_], keys[first:end_])
                        if end_ < 30:
                            runtime.idle_select(0)  # brings the first part to its holders
                    check(runtime, runtime.scope(requests=[(request, ids[-1:])]))
                    written.set()
                else:
                    assert written.wait(20.0)
                    check(runtime, runtime.scope(documents=["new"], queries=1))
                assert served.wait(20.0)

    for index_placement in ("with-blocks", "replicated"):
        written.clear()
        run_loopback(3, lambda end, where=index_placement: rank(end, where))  # type: ignore[misc]


def test_changes_of_a_store_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads append to different blocks; the first is interrupted before it says so."""
    codec = make_codec("fp32", dim=2, rope_dim=0)
    store = BlockStore([codec], num_slots=3, num_keys=3, block_tokens=4)
    store.assign(torch.arange(2), torch.arange(2))
    scatter, second = codec_module.scatter_rows, threading.Event()

    def slow(*args: Any) -> None:
        scatter(*args)
        if not second.is_set():
            second.set()
            other.start()
            other.join(0.3)

    monkeypatch.setattr(pool, "scatter_rows", slow)
    ids, rows = torch.arange(8, dtype=torch.int32), codec.encode(torch.randn(8, 2))
    other = threading.Thread(target=lambda: store.write(0, ids[4:], rows[4:]))
    store.write(0, ids[:4], rows[:4])
    other.join()
    index, valid = store.resolve(0, ids)
    assert bool(valid.all())
    assert torch.equal(store.rows(0, index), rows)


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


@pytest.mark.parametrize("seen", [["a", "c"], [("a", 9), "c"]], ids=["in place", "at offsets"])
def test_only_ranks_with_visible_index_keys_are_asked(seen: list[str | tuple[str, int]]) -> None:
    layout = replace(named_layout("mla-tiny"), codec="fp64")

    def rank(end: Transport) -> Any:
        placement = Placement(policy="document-affine")
        config = replace(small_config(placement=placement), model=uniform_model(layout, 1))
        with Runtime.open(config, end) as runtime:
            g = torch.Generator().manual_seed(3)
            for name in ("a", "b", "c"):  # at ranks 0, 1, 2
                runtime.add_document(name, tokens=16)
                entries = torch.randn(16, layout.entry_dim, generator=g, dtype=torch.float64)
                runtime.load_document(name, 0, entries, torch.randn(16, 32, generator=g))
            with runtime.serve() as served:
                if runtime.rank == 0:
                    index_query = torch.randn(2, 4, 32, generator=g, dtype=torch.float64)
                    weights = torch.ones(2, 4)
                    chosen = runtime.select(0, index_query, weights, documents=seen, top_k=32)
                    assert chosen.ids.tolist() == [[*range(16), *range(32, 48)]] * 2
                    runtime.select(0, index_query[:0], weights[:0], documents=["c"])
                assert served.wait(20.0)
            return runtime.stats()["served"]["answered"]

    assert run_loopback(4, rank) == [{}, {}, {0: 1}, {}]
