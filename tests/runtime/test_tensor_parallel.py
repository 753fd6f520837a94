"""Tensor-parallel lanes: who is in which, what is refused at open, and instances that lose one."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from instances import HALVES, HEADS, Play, config_of, whole_layout
from ranks import run_loopback

from qroam.partition.head_split import Heads
from qroam.partition.layout import ModelLayout
from qroam.partition.presets import mlra
from qroam.runtime import PeerError, Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header
from qroam.runtime.transport.tensor_parallel import LaneTransport, lanes_of


def open_with(transport: Transport, config: RuntimeConfig, heads: Sequence[Heads | None]) -> str:
    """What opening says, and that the transport still serves when everybody was refused."""
    try:
        Runtime.open(config, transport, heads=heads[transport.rank]).close()
    except ValueError as error:
        right = Play(weights=False)
        halves = HALVES if transport.world_size == 4 else ((0, HEADS),)
        part = config_of(right, whole_layout(right))
        with Runtime.open(part, transport, heads=halves[transport.rank % len(halves)]) as runtime:
            runtime.idle_attend(0)
        return str(error)
    return "opened"


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (
            [(0, 4), (0, 4), (0, 4), (0, 4)],
            "lanes must cover each of 8 heads once: heads [4, 5, 6, 7] are in no lane; "
            "heads (start, count) are (0, 4) on ranks [0, 1, 2, 3]",
        ),
        (
            [(0, 5), (4, 4), (0, 5), (4, 4)],
            "lanes must cover each of 8 heads once: heads [4] in more than one; "
            "heads (start, count) are (0, 5) on ranks [0, 2], (4, 4) on ranks [1, 3]",
        ),
        (
            [None, (0, 4), None, (4, 4)],
            "lanes must cover each of 8 heads once: heads [0, 1, 2, 3, 4, 5, 6, 7] in more than one; "
            "heads (start, count) are (0, 4) on ranks [1], (0, 8) on ranks [0, 2], (4, 4) on ranks [3]",
        ),
        (
            [(0, 4), (4, 4), (0, 4), (5, 4)],
            "rank 3 has heads (start, count) = (5, 4), the model has 8",
        ),
        (
            [(0, 4), (4, 4), (0, 4)],
            "every instance needs a rank in each lane, lanes are of unequal size: "
            "(0, 4) on ranks [0, 2], (4, 4) on ranks [1]",
        ),
    ],
)
def test_worlds_that_make_no_lanes_are_refused_on_every_rank(
    heads: Sequence[Heads | None], said: str
) -> None:
    config = config_of(Play(), whole_layout(Play()))
    assert run_loopback(len(heads), lambda end: open_with(end, config, heads)) == [said] * len(
        heads
    )


def test_layouts_that_cannot_be_split_so_are_refused_on_every_rank() -> None:
    layout = replace(mlra(2, heads=HEADS, codec="fp64"), index=None)
    config = config_of(Play(architecture="mlra-2"), layout)
    thirds = [(0, 2), (2, 4), (6, 2)]
    (said,) = set(run_loopback(3, lambda end: open_with(end, config, thirds)))
    assert "equally many branches" in said
    assert "{(0, 2): 2, (2, 4): 4, (6, 2): 2}" in said
    config = replace(
        config, model=ModelLayout(layers=(layout, mlra(2, heads=12)), index_source=(0, 1))
    )
    halves = [(0, 6), (6, 6)]
    (said,) = set(run_loopback(2, lambda end: open_with(end, config, halves)))
    assert "as many heads in every layer, the model has [8, 12] heads" in said


@pytest.mark.parametrize("heads", [4, (0, 4, 4), (0, "4"), (0, 2**31)])
def test_heads_are_two_whole_numbers(heads: Any) -> None:
    with pytest.raises(ValueError, match=r"heads must be \(start, count\)"):
        Runtime.open(config_of(Play(), whole_layout(Play())), heads=heads)


def test_another_configuration_in_another_lane_is_named() -> None:
    config = config_of(Play(), whole_layout(Play()))

    def differ(transport: Transport) -> tuple[tuple[int, ...], str]:
        mine = replace(config, max_blocks=13) if transport.rank == 3 else config
        with pytest.raises(PeerError) as caught:
            Runtime.open(mine, transport, heads=HALVES[transport.rank % 2])
        return caught.value.culprits, caught.value.reason

    ((culprits, reason),) = set(run_loopback(4, differ))
    assert culprits == (3,)
    assert reason == "opened with another configuration: max_blocks=13 instead of max_blocks=12"


def test_an_instance_that_loses_a_lane_is_named_in_every_lane() -> None:
    """Rank 2, lane 0 of instance 1, raises; the others learn it long before a deadline."""
    config = config_of(Play(), whole_layout(Play()))

    def lose(transport: Transport) -> tuple[tuple[int, ...], str]:
        try:
            with Runtime.open(config, transport, heads=HALVES[transport.rank % 2]) as runtime:
                for _ in range(3):
                    runtime.idle_attend(0)
                if transport.rank == 2:
                    raise ArithmeticError("boom")
                expiry = time.monotonic() + 8.0
                while time.monotonic() < expiry:
                    runtime.idle_attend(0)
                return (), "nobody said anything"
        except PeerError as error:
            return error.culprits, error.reason
        except ArithmeticError:
            return (), "it was me"

    same, *others = run_loopback(4, lose)
    assert same == ((1,), "raised ArithmeticError: boom")
    elsewhere = ((1,), "raised ArithmeticError: boom (rank 2 of all, in another lane)")
    assert others == [elsewhere, ((), "it was me"), elsewhere]


def test_an_abort_is_passed_on_as_it_was_told() -> None:
    ends = LoopbackTransport.world(4, deadline_s=5.0)
    lane = LaneTransport(ends[1], [[0, 2], [1, 3]], owned=False)
    ends[2]._send_abort(1, (2,), "boom")
    with pytest.raises(PeerError, match=r"rank 1: boom \(rank 2 of all, in another lane\)"):
        lane.collect(Header(kind="attend", incarnation=0, channel=0, epoch=1, tables=0))
    for end in (ends[0], ends[3]):
        with pytest.raises(PeerError, match=r"^rank 2: boom$"):
            end.collect(Header(kind="attend", incarnation=0, channel=0, epoch=1, tables=0))


def test_a_silent_rank_holds_up_its_lane_alone() -> None:
    """Lanes do not wait for one another: lane 1 takes its steps while rank 2 takes none."""
    config = config_of(Play(), whole_layout(Play()))
    stepped = threading.Barrier(3, timeout=10.0)

    def wait(transport: Transport) -> int:
        with Runtime.open(config, transport, heads=HALVES[transport.rank % 2]) as runtime:
            if transport.rank in (1, 3):
                for _ in range(20):
                    runtime.idle_attend(0)
            if transport.rank != 0:
                stepped.wait()
            runtime.idle_attend(0)
            return runtime.rank

    assert run_loopback(4, wait) == [0, 0, 1, 1]


def test_one_transport_serves_one_runtime_in_lanes_after_another() -> None:
    """Whoever is early in the next runtime is heard there, of whatever lane it was and will be."""
    config = config_of(Play(), whole_layout(Play()))
    ends = LoopbackTransport.world(4, deadline_s=10.0)

    def again(transport: Transport) -> list[int]:
        ranks = []
        for turn in range(12):
            heads = HALVES[(transport.rank // (1 + turn % 2)) % 2]
            with Runtime.open(config, transport, heads=heads) as runtime:
                ranks.append(runtime.rank)
                runtime.idle_attend(0)
        return ranks

    expected = [[0, 0] * 6, [0, 1] * 6, [1, 0] * 6, [1, 1] * 6]
    assert run_loopback(4, again, transports=ends) == expected


def test_instances_are_the_ranks_of_a_lane_in_order() -> None:
    """However lanes are laid out over the ranks."""
    assert lanes_of([(4, 4), (0, 4), (0, 4), (4, 4)], 8) == {(0, 4): [1, 2], (4, 4): [0, 3]}
    assert lanes_of([(0, 8)] * 3, 8) == {(0, 8): [0, 1, 2]}
