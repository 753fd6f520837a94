"""A world that goes on after a rank died: without it, with it started again, or with a snapshot."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, Player, make_config
from effort import examples, slow_between
from faults import die, die_after
from hypothesis import given, settings
from hypothesis import strategies as st
from incarnations import Lives, broken_world, known, threads
from ranks import _connect
from served import until
from small_world import small, small_config
from snapshots import RestoredPlayer
from strategies import EVERYWHERE, cases
from torch.testing._internal.distributed.fake_pg import FakeStore

from qroam.partition.directory import empty_directory, with_document, without_document
from qroam.partition.directory_codec import directory_columns, directory_of
from qroam.partition.placement import PLACEMENT_POLICIES, Placement, place
from qroam.partition.repair import repaired
from qroam.runtime import BlocksLostError, PeerError, Runtime, SnapshotError
from qroam.runtime.cpu import answer as answering
from qroam.runtime.transport.base import Purpose, Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header, Message
from qroam.runtime.world import World


class Survivor(Player):
    """Plays on under another number."""

    def moved(self) -> None:
        self.rank, self.world = self.runtime.rank, self.runtime.world_size
        assert all(check.is_sound for check in self.runtime.verify_copies())

    def decode_until_broken(self) -> tuple[int, ...]:
        """Whose fault it is. Requests, whose last tokens may be written at some layers only, end."""
        try:
            while True:
                self.decode()
        except PeerError as error:
            culprits = error.culprits
        for request in self.requests:
            self.runtime.release(request)
        self.requests.clear()
        return culprits


def play_on(case: Case, victim: int, replaced: bool, breath: int) -> None:
    """Decode until `victim` dies, so many messages of its later; go on without it or with another rank
    in its place. All outputs are compared with dense attention.
    """
    lives = Lives()
    size = case.world if replaced else case.world - 1

    def survivor(rank: int) -> None:
        end = lives.end(0, rank, case.world)
        with Runtime.open(make_config(case), end) as runtime:
            player = Survivor(runtime, case)
            player.add_documents()
            player.prefill()
            player.decode()
            if rank == victim:
                die_after(end, breath)
            culprits = player.decode_until_broken()
            if rank == victim:
                return
            assert culprits == (victim,)
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
            assert all(check.is_sound for check in runtime.verify_copies())
            for _ in range(2):
                player.decode()

    works: list[Callable[[], None]]
    works = [partial(survivor, rank) for rank in range(case.world)]
    threads([*works, newcomer] if replaced else works)


@given(
    case=cases(worlds=(3, 4)),
    victim=st.integers(0, 3),
    replaced=st.booleans(),
    breath=st.integers(0, 40),
)
@settings(EVERYWHERE, max_examples=examples(25, quick=20))
def test_a_decode_goes_on_exactly_after_a_death_at_any_moment(
    case: Case, victim: int, replaced: bool, breath: int
) -> None:
    case = replace(case, copies=max(case.copies, 2), stranger=None)
    play_on(case, victim % case.world, replaced, breath)


# A small world, in which every rank knows the answers ------------------------------------------


def test_what_is_on_its_way_when_a_rank_dies_is_not_lost() -> None:
    """Rank 0 writes blocks 1 and 3, which lie at ranks 1 and 3; rank 2 dies in the step that moves them."""
    lives, shape = Lives(), {"placement": Placement(policy="contiguous", copies=2), "max_blocks": 8}
    config = small_config(**shape)
    layout = config.model.layers[0]
    entries = torch.randn(32, layout.entry_dim, generator=torch.Generator().manual_seed(2)).double()
    query = torch.randn(1, layout.heads, layout.key_dim).double()
    shares = torch.softmax(query @ entries.T * layout.softmax_scale, -1)

    def rank(rank: int) -> None:
        end = lives.end(0, rank, 4)
        with Runtime.open(config, end) as runtime:
            document = runtime.add_document("doc", tokens=32)
            if rank == 2:
                die(end)
                return
            if rank == 0:
                request = runtime.request(into="doc")
                runtime.write(0, runtime.append(request, 20), entries[:20])
            with pytest.raises(PeerError):
                runtime.idle_attend(0)
            if rank == 0:
                runtime.write(0, runtime.append(request, 12), entries[20:])
            now = (0, 1, 0, 2)[rank]
            runtime.rejoin(lives.end(1, now, 3), incarnation=1)
            runtime.idle_attend(0)
            scope = runtime.scope(documents=["doc"], queries=1)
            out = runtime.attend(0, query, runtime.selection(document.ids()[None], scope))
            assert float((out - shares @ entries[:, : layout.value_dim]).abs().max()) <= 1e-12
            assert runtime.stats()["rank"] == now

    threads([partial(rank, r) for r in range(4)])


def step_until_broken(runtime: Runtime) -> None:
    with suppress(PeerError):
        while True:
            runtime.idle_attend(0)


@pytest.mark.parametrize("breath", range(7))
def test_a_prefill_that_only_its_writer_saw_through_is_not_lost(breath: int) -> None:
    """Rank 3 dies so many messages into the step that moves what rank 0 wrote: the writer may see that
    step succeed while nobody else took what it sent. Or rank 0 is to hold what rank 3 held."""
    lives = Lives()
    placement = Placement(policy="contiguous", copies=2)
    config = small_config(placement=placement, max_blocks=8, corpus_slots=8)
    layout = config.model.layers[0]
    entries = torch.randn(32, layout.entry_dim, generator=torch.Generator().manual_seed(2)).double()
    query = torch.randn(1, layout.heads, layout.key_dim).double()
    shares = torch.softmax(query @ entries.T * layout.softmax_scale, -1)

    def rank(rank: int) -> None:
        end = lives.end(0, rank, 4)
        with Runtime.open(config, end) as runtime:
            document = runtime.add_document("doc", tokens=32)
            if rank == 0:
                request = runtime.request(into="doc")
                runtime.write(0, runtime.append(request, 32), entries)
            if rank == 3:
                die_after(end, breath)
            step_until_broken(runtime)
            if rank == 3:
                return
            runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
            runtime.idle_attend(0)
            scope = runtime.scope(documents=["doc"], queries=1)
            out = runtime.attend(0, query, runtime.selection(document.ids()[None], scope))
            assert float((out - shares @ entries[:, : layout.value_dim]).abs().max()) <= 1e-12

    threads([partial(rank, r) for r in range(4)])


def test_what_nobody_has_is_named_and_comes_back_from_a_snapshot(tmp_path: Path) -> None:
    lives, config = Lives(), small_config(max_blocks=16)

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            world = small(runtime)
            runtime.pin("doc")
            runtime.add_document("other", tokens=8)  # its only block is at rank 2
            runtime.snapshot(tmp_path / "s")
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                world.check()
            runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
            named = {"doc": (range(1, 2), range(4, 5), range(7, 8))}
            assert runtime.lost_blocks() == named
            with pytest.raises(BlocksLostError, match="blocks 1, 4, 7 of 'doc'") as raised:
                world.check()
            assert raised.value.blocks == named
            restored(runtime)

    def newcomer() -> None:
        with Runtime.open(config, lives.end(1, 1, 3), incarnation=1) as runtime:
            assert [document.name for document in runtime.documents()] == ["doc", "other"]
            assert runtime.pinned() == {"doc"}
            restored(runtime)

    def restored(runtime: Runtime) -> None:
        runtime.idle_attend(0)  # nobody was hurt by the question
        with pytest.raises(SnapshotError, match="no documents nothing"):
            runtime.restore(tmp_path / "s", documents=["nothing"])
        with pytest.raises(SnapshotError, match="copy of blocks 1, 4, 7 of 'doc': restore"):
            runtime.snapshot(tmp_path / "s")  # it would be the end of what the last one has
        report = runtime.restore(tmp_path / "s", documents=runtime.lost_blocks())
        assert report.documents == {"doc": 64}
        assert runtime.lost_blocks() == {}
        assert runtime.pinned() == {"doc"}
        known(runtime).check()

    works: list[Callable[[], None]] = [partial(survivor, r) for r in range(3)]
    threads([*works, newcomer])


@pytest.mark.parametrize("newer", ["blocks", "document"])
def test_what_is_left_is_not_replaced_by_an_older_snapshot(tmp_path: Path, newer: str) -> None:
    lives, config = Lives(), small_config(max_blocks=16)
    entries = torch.randn(64, 1, config.model.layers[0].entry_dim, dtype=torch.float64)

    def add(runtime: Runtime, tokens: int) -> None:
        runtime.add_document("doc", tokens=tokens)
        runtime.load_document("doc", 0, entries[:tokens])

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            if newer == "document":
                add(runtime, 56)
                runtime.snapshot(tmp_path / "s")
                runtime.remove_document("doc")
                add(runtime, 64)
            else:
                runtime.add_document("doc", tokens=64)
                request = runtime.request(into="doc") if rank == 0 else None
                for start, end in ((0, 16), (16, 61)):
                    if request is not None:
                        ids = runtime.append(request, end - start)
                        runtime.write(0, ids, entries[start:end])
                    if start == 0:
                        runtime.snapshot(tmp_path / "s")
                runtime.idle_attend(0)
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                runtime.idle_attend(0)
            runtime.rejoin(lives.end(1, min(rank, 1), 2), incarnation=1)
            lost = runtime.lost_blocks()
            held = runtime._world.stores.entries.fill.clone()
            reason = {
                "blocks": "rank 0: blocks .* of 'doc' are here, and not in the snapshot",
                "document": "'doc' is another one in the snapshot",
            }[newer]
            with pytest.raises(SnapshotError, match=reason):
                runtime.restore(tmp_path / "s", documents=lost)
            assert torch.equal(runtime._world.stores.entries.fill, held)
            assert runtime.lost_blocks() == lost != {}
            runtime.remove_document("doc")
            report = runtime.restore(tmp_path / "s", documents=["doc"])
            assert report.documents == {"doc": 56 if newer == "document" else 16}

    threads([partial(survivor, r) for r in range(3)])


def test_what_nobody_has_is_not_shared_with_new_documents(tmp_path: Path) -> None:
    lives, config = Lives(), small_config(max_blocks=32)
    layout = config.model.layers[0]
    text, entries = range(64), torch.randn(64, 1, layout.entry_dim, dtype=torch.float64)
    query = torch.randn(1, layout.heads, layout.key_dim, dtype=torch.float64)

    def attended(runtime: Runtime, name: str) -> torch.Tensor:
        ids = runtime._world.directory.document(name).ids()[None]
        scope = runtime.scope(documents=[name], queries=1)
        return runtime.attend(0, query, runtime.selection(ids, scope))

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            runtime.add_document("a", token_ids=text)
            runtime.load_document("a", 0, entries)
            runtime.add_document("b", token_ids=text)
            expected = attended(runtime, "b")
            runtime.snapshot(tmp_path / "s")
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                attended(runtime, "b")
            runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
            restored(runtime, expected)

    def newcomer() -> None:
        with Runtime.open(config, lives.end(1, 1, 3), incarnation=1) as runtime:
            restored(runtime, None)

    def restored(runtime: Runtime, expected: torch.Tensor | None) -> None:
        lost = runtime.lost_blocks()
        assert set(lost) == {"a", "b"}
        assert runtime.add_document("again", token_ids=text).shared == lost["a"][0].start == 1
        runtime.load_document("again", 0, entries)
        assert runtime.restore(tmp_path / "s", documents=["a"]).documents == {"a": 64}
        assert set(runtime.lost_blocks()) == {"b"}
        runtime.remove_document("again")
        assert runtime.restore(tmp_path / "s", documents=["b"]).documents == {"b": 64}
        assert (runtime.lost_blocks(), runtime._world.directory.num_blocks) == ({}, 8)
        for name in ("a", "b"):
            found = attended(runtime, name)
            assert expected is None or float((found - expected).abs().max()) <= 1e-12
        runtime.snapshot(tmp_path / "s")

    works: list[Callable[[], None]] = [partial(survivor, r) for r in range(3)]
    threads([*works, newcomer])


def test_a_world_can_lose_rank_after_rank_while_copies_are_made_anew() -> None:
    """Of four ranks, with room for all copies on two: each that dies is made up for by the rest."""

    def then(runtime: Runtime, lives: Lives) -> None:
        rank = runtime.rank
        runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
        known(runtime).check()
        if rank == 2:
            die(lives.end(1, rank, 3))
            return
        with pytest.raises(PeerError):
            runtime.idle_attend(0)
        runtime.rejoin(lives.end(2, rank, 2), incarnation=2)
        known(runtime).check()
        assert runtime.lost_blocks() == {}
        assert runtime.documents()[0].num_blocks == 8
        with pytest.raises(ValueError, match="must be a number above 2"):
            runtime.rejoin(lives.end(2, rank, 2), incarnation=2)

    broken_world(4, 3, then, corpus_slots=16)


@pytest.mark.parametrize("breath", slow_between(4, range(14)))
def test_a_rank_that_dies_while_the_others_rejoin_is_left_out_next_time(breath: int) -> None:
    """After so many messages: some may have taken the new tables by then and some not."""

    def then(runtime: Runtime, lives: Lives) -> None:
        rank, end = runtime.rank, lives.end(1, runtime.rank, 3)
        if rank == 2:
            die_after(end, breath)
        try:
            runtime.rejoin(end, incarnation=1)
            while True:  # it got through, others perhaps not
                runtime.idle_attend(0)
        except PeerError as error:
            culprits = error.culprits
        if rank == 2:
            return
        assert culprits == (2,)
        runtime.rejoin(lives.end(2, rank, 2), incarnation=2)
        known(runtime).check()

    broken_world(4, 3, then, corpus_slots=16, placement=Placement(copies=3))


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


def test_survivors_of_different_documents_are_refused() -> None:
    def then(runtime: Runtime, lives: Lives) -> None:
        if runtime.rank == 1:
            runtime.add_document("more", tokens=8)
            runtime._world.tables.settled = runtime._world.directory
        with pytest.raises(
            PeerError, match="has other documents than the other survivors"
        ) as raised:
            runtime.rejoin(lives.end(1, runtime.rank, 3), incarnation=1)
        assert raised.value.culprits == (1,)

    broken_world(4, 3, then)


@pytest.mark.parametrize("breath", slow_between(2, range(5)))
@pytest.mark.parametrize("change", ["add", "remove", "replace"])
def test_who_is_ahead_goes_back_to_the_documents_that_all_have(breath: int, change: str) -> None:
    """Rank 2 dies so many messages into a step after which the others change documents; rank 0 may see
    that step through and rank 1 not. What was written for a document that goes is not kept."""
    lives = Lives()
    config = small_config(max_blocks=24, corpus_slots=24, placement=Placement(copies=2))
    layout = config.model.layers[0]

    def rank(rank: int) -> tuple[list[str], int] | None:
        end = lives.end(0, rank, 3)
        with Runtime.open(config, end) as runtime:
            small(runtime)
            runtime.add_document("more", tokens=16)
            runtime.idle_attend(0)
            if rank == 2:
                die_after(end, breath)
            with suppress(PeerError):
                runtime.idle_attend(0)
                if change != "add":
                    runtime.remove_document("more")
                if change != "remove":
                    runtime.add_document("other", tokens=16)
                    request = runtime.request(into="other")
                    entries = torch.ones(16, layout.entry_dim, dtype=torch.float64)
                    runtime.write(0, runtime.append(request, 16), entries)
                runtime.idle_attend(0)
            if rank == 2:
                return None
            runtime.rejoin(lives.end(1, rank, 2), incarnation=1)
            known(runtime).check()
            runtime.idle_attend(0)
            assert all(check.is_sound for check in runtime.verify_copies())
            names = [document.name for document in runtime.documents()]
            if "more" in names:  # nobody wrote it
                blocks = list(runtime._world.directory.document("more").blocks)
                slots = runtime._world.stores.entries.slot_of[blocks]
                assert not runtime._world.stores.entries.fill[:, slots[slots >= 0].long()].any()
            return names, runtime.add_document("late", tokens=8).serial

    said = threads([partial(rank, r) for r in range(3)])
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("fact", "value"), [(0, (1 << 63) - 1), (4, 1 << 40), (5, 1 << 32), (6, (1 << 63) - 1)]
)
def test_facts_of_no_world_are_their_tellers_fault(fact: int, value: int) -> None:
    """Steps, ranks of the former world, the version of its tables, or documents: too many of them."""

    def then(runtime: Runtime, lives: Lives) -> None:
        end = lives.end(1, runtime.rank, 3)
        if runtime.rank == 1:
            lie(end, fact, value)
        with pytest.raises(PeerError, match="invalid facts about its former incarnation") as raised:
            runtime.rejoin(end, incarnation=1)
        assert raised.value.culprits == (1,)

    broken_world(4, 3, then)


def lie(end: LoopbackTransport, fact: int, value: int) -> None:
    """Say something else of one's former life."""
    post = end.post_shares

    def lying(header: Header, shares: Sequence[Mapping[str, torch.Tensor]]) -> None:
        for share in shares:
            if "facts" in share:
                share["facts"][fact] = value
        post(header, shares)

    end.post_shares = lying  # type: ignore[method-assign]


def test_a_rank_with_another_pool_is_refused() -> None:
    """Without `corpus_slots` in the config a pool is a share of the world as it is."""
    lives = Lives()

    def then(runtime: Runtime, lives: Lives) -> None:
        with pytest.raises(PeerError, match="pool of another size: name corpus_slots") as raised:
            runtime.rejoin(lives.end(1, runtime.rank, 5), incarnation=1)
        assert set(raised.value.culprits) == {3, 4}

    def newcomer(rank: int) -> None:
        config = small_config(placement=Placement(copies=2), max_blocks=16)
        with pytest.raises(PeerError, match="pool of another size"):
            Runtime.open(config, lives.end(1, rank, 5), incarnation=1)

    worlds = [lambda: broken_world(4, 3, lambda runtime, _: then(runtime, lives))]
    threads([*worlds, lambda: newcomer(3), lambda: newcomer(4)])


def test_an_instance_that_lost_a_lane_goes_on_with_it_started_again() -> None:
    """Three instances of two lanes; rank 5 is lane 1 of the last. In service lane 1 asks replicas."""
    lives, config = Lives(), small_config(placement=Placement(copies=2), max_blocks=24)
    lanes = ((0, 3), (3, 1))

    def survivor(rank: int) -> None:
        end = lives.end(0, rank, 6)
        with Runtime.open(config, end, heads=lanes[rank % 2]) as runtime:
            world = small(runtime)
            served = runtime.serve()
            world.check()
            if rank == 5:
                die(end)
                return
            if rank % 2:
                until(lambda: 2 in served.lost())
            world.check()
            assert runtime.stats()["failures"]["failover"] == 0  # it was known before
            served.wait(1.0)
            runtime.disconnect()
            runtime.rejoin(lives.end(1, rank, 6), incarnation=1)
            known(runtime).check()

    def newcomer() -> None:
        with Runtime.open(config, lives.end(1, 5, 6), heads=lanes[1], incarnation=1) as runtime:
            assert (runtime.rank, runtime.world_size) == (2, 3)
            known(runtime).check()

    works: list[Callable[[], None]] = [partial(survivor, r) for r in range(6)]
    threads([*works, newcomer])


# Former lives ----------------------------------------------------------------------------------


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
            assert "speaks in incarnation 2 of the world, rank 2 in 1" in str(raised.value)
        else:
            assert raised.value.culprits == (2,)
            assert "messages of a former incarnation were refused" in str(raised.value)

    broken_world(4, 3, then, deadline_s=deadline_s)


# Processes over gloo ---------------------------------------------------------------------------

DEADLINE_S = 4.0
STEPS = 15


def live(rank: int, folder: Path, pipe: Connection, incarnation: int) -> None:
    """A rank over all its incarnations: it steps until told to rejoin, or for good."""
    torch.set_num_threads(1)
    config = small_config(deadline_s=DEADLINE_S, placement=Placement(copies=2), max_blocks=16)
    transport = connected(rank, 4, folder, incarnation)
    with Runtime.open(config, transport, incarnation=incarnation) as runtime:
        world = known(runtime) if incarnation else small(runtime)
        pipe.send("open")
        steps = 0 if not incarnation else STEPS
        while True:
            try:
                while not incarnation or steps:
                    world.check()
                    steps -= 1
            except PeerError as error:
                pipe.send(error.culprits)
            else:
                pipe.send(runtime.stats()["steps"])
            try:
                incarnation, rank, size = pipe.recv()
            except EOFError:
                break
            runtime.disconnect()
            transport.close()
            dist.destroy_process_group()
            transport = connected(rank, size, folder, incarnation)
            runtime.rejoin(transport, incarnation=incarnation)
            world, steps = known(runtime), STEPS
    transport.close()


def connected(rank: int, size: int, folder: Path, incarnation: int) -> Transport:
    return _connect(rank, size, folder / f"life-{incarnation}", DEADLINE_S)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_processes_go_on_without_a_rank_and_with_it_started_again(
    signal_number: signal.Signals, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "qroam.runtime"])
    processes: list[Any] = []
    pipes: dict[int, Any] = {}

    def start(rank: int, incarnation: int) -> None:
        pipes[rank], theirs = context.Pipe()
        args = (rank, tmp_path, theirs, incarnation)
        processes.append(context.Process(target=live, args=args, daemon=True))
        processes[-1].start()
        theirs.close()

    def heard(ranks: Sequence[int]) -> list[Any]:
        assert all(pipes[rank].poll(60) for rank in ranks)
        return [pipes[rank].recv() for rank in ranks]

    try:
        for rank in range(4):
            start(rank, 0)
        assert heard(range(4)) == ["open"] * 4
        time.sleep(random.Random(signal_number).uniform(0.0, 0.5))
        victim, zombie = 1, pipes[1]
        os.kill(processes[victim].pid, signal_number)
        assert heard((0, 2, 3)) == [(victim,)] * 3
        for now, rank in enumerate((0, 2, 3)):  # the three that are left, numbered anew
            pipes[rank].send((1, now, 3))
        heard((0, 2, 3))
        start(victim, 2)
        for rank in (0, 2, 3):
            pipes[rank].send((2, rank, 4))
        if signal_number == signal.SIGSTOP:
            os.kill(processes[victim].pid, signal.SIGCONT)  # it wakes up in a world that is gone
            assert zombie.poll(60)
            assert zombie.recv() != (victim,)
        said = heard(range(4))
        assert said[victim] == "open"
        assert heard((victim,)) == [STEPS]
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join(10)
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    assert [codes[0], *codes[2:]] == [0, 0, 0, 0], codes


# Who holds what then ---------------------------------------------------------------------------


@given(data=st.data(), world=st.integers(2, 5), branches=st.integers(1, 2))
@settings(EVERYWHERE, max_examples=60)
def test_a_repaired_directory_keeps_every_copy_that_is_left(
    data: st.DataObject, world: int, branches: int
) -> None:
    """Against a plain reading; and it goes to a rank that is new and back, bit for bit."""
    copies = data.draw(st.integers(1, world))
    blank = empty_directory(
        max_blocks=24, block_tokens=4, num_branches=branches, copies=copies, world_size=world
    )
    before = blank
    capacity = data.draw(st.sampled_from((48 * copies // world + 2, 100)))
    for number in range(data.draw(st.integers(0, 4))):
        tokens = data.draw(st.integers(1, 20))
        blocks = before.free_blocks("", -(-tokens // 4))
        policy = data.draw(st.sampled_from(PLACEMENT_POLICIES))
        ranks = place(
            Placement(policy=policy, copies=copies),
            blocks,
            num_branches=branches,
            world_size=world,
            used=before.used,
        )
        name = f"d{number}"
        try:
            before = with_document(
                before, name, tokens=tokens, position=0, ranks=ranks, capacity=capacity
            )
        except ValueError:  # no room left
            break
    some_removed = data.draw(st.booleans())
    if before.documents and some_removed:
        before = without_document(before, "d0")
    size = data.draw(st.integers(1, 6))
    now = data.draw(st.permutations([*range(size), *[-1] * world]))[:world]
    after = repaired(before, now, world_size=size, capacity=capacity, index_capacity=24)

    firsts = [0] * size
    for key in range(24 * branches):
        had = [
            (now[owner], slot)
            for owner, slot in zip(
                before.owners[key].tolist(), before.slots[key].tolist(), strict=True
            )
            if owner >= 0 and now[owner] >= 0
        ]
        has = list(zip(after.owners[key].tolist(), after.slots[key].tolist(), strict=True))
        assert has[: len(had)] == had
        assert had or has == [(-1, -1)] * copies
        holders = [owner for owner, _ in has if owner >= 0]
        assert len(set(holders)) == len(holders)
        assert has[len(holders) :] == [(-1, -1)] * (copies - len(holders))
        for owner in holders:
            firsts[owner] += key % branches == 0
        if 0 < len(holders) < min(copies, size):  # only for want of room
            others = set(range(size)) - set(holders)
            assert all(int(after.used[rank]) >= capacity or firsts[rank] >= 24 for rank in others)
    taken = [
        pair
        for row in zip(after.owners.tolist(), after.slots.tolist(), strict=True)
        for pair in zip(*row, strict=True)
        if pair[0] >= 0
    ]
    assert len(set(taken)) == len(taken)
    assert all(slot < capacity for _, slot in taken)
    assert after.used.tolist() == [sum(owner == rank for owner, _ in taken) for rank in range(size)]
    assert torch.equal(after.generations, before.generations)

    for directory, ranks_there in ((before, world), (after, size)):
        sent = directory_columns(directory)
        like = replace(blank, used=torch.zeros(ranks_there, dtype=torch.int64))
        read = directory_of(sent, like, world_size=ranks_there, capacity=capacity)
        for field in fields(directory):
            ours, theirs = getattr(directory, field.name), getattr(read, field.name)
            same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
            assert same, field.name
