"""A world that goes on after a rank died: without it, or with it started again."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, make_config
from effort import examples, slow_between
from faults import die, die_after
from hypothesis import given, settings
from hypothesis import strategies as st
from incarnations import Lives, broken_world, known, threads
from player import Player
from ranks import _connect
from served import until
from small_world import small, small_config
from snapshots import RestoredPlayer
from strategies import EVERYWHERE, cases

from qroam.partition.placement import Placement
from qroam.runtime import PeerError, Runtime
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header


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


def test_a_world_with_fewer_ranks_than_copies_takes_documents_and_fills_up_later() -> None:
    lives = Lives(8.0)
    config = small_config(
        max_blocks=16,
        corpus_slots=16,
        private_blocks=8,
        request_blocks=4,
        placement=Placement(copies=2),
    )

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 2)) as runtime:
            world = small(runtime)
            if rank == 1:
                die(lives.end(0, rank, 2))
                return
            with pytest.raises(PeerError):
                world.check()
            runtime.rejoin(lives.end(1, 0, 1), incarnation=1)
            dim = config.model.layers[0].entry_dim
            runtime.add_document("added", tokens=8)
            runtime.load_document("added", 0, torch.randn(8, 1, dim, dtype=torch.float64))
            request = runtime.request()
            ids = runtime.append(request, 16)
            runtime.write(0, ids, torch.randn(16, 1, dim, dtype=torch.float64))
            runtime.publish("published", request)
            runtime.rejoin(lives.end(2, 0, 2), incarnation=2)
            checks = runtime.verify_copies()
            assert all(check.is_sound for check in checks)
            assert {len(check.hashes) for check in checks} == {2}
            assert runtime.lost_blocks() == {}

    def newcomer() -> None:
        with Runtime.open(config, lives.end(2, 1, 2), incarnation=2) as runtime:
            assert all(check.is_sound for check in runtime.verify_copies())

    works: list[Callable[[], None]] = [partial(survivor, 0), partial(survivor, 1), newcomer]
    threads(works)
