"""Loopback exchanges: counted bytes, deadlines, aborts, and peers that are gone or out of step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qroam.runtime.errors import PeerError
from qroam.runtime.transport.base import Column, Purpose
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header, Message, encode

HEADER = Header(kind="attend", incarnation=1, channel=0, epoch=1, tables=5)


def world(size: int, deadline_s: float = 5.0) -> list[LoopbackTransport]:
    return LoopbackTransport.world(size, deadline_s=deadline_s)


def together(works: list[Callable[[], object]]) -> list[object]:
    """What each piece of work, in a thread of its own, returned or raised."""

    def guarded(work: Callable[[], object]) -> object:
        try:
            return work()
        except PeerError as error:
            return error

    with ThreadPoolExecutor(max(len(works), 1)) as threads:
        return list(threads.map(guarded, works))


def collecting(ends: Sequence[LoopbackTransport]) -> list[Callable[[], object]]:
    return [partial(end.collect, HEADER) for end in ends]


def culprits(outcome: object) -> tuple[int, ...]:
    assert isinstance(outcome, PeerError), outcome
    return outcome.culprits


@given(
    size=st.integers(1, 5),
    trailing=st.lists(st.integers(1, 3), max_size=2),
    indexed=st.booleans(),
    spare=st.integers(0, 4),
    seed=st.integers(0, 10**6),
)
def test_everyone_gets_their_share(
    size: int, trailing: list[int], indexed: bool, spare: int, seed: int
) -> None:
    """Shares of random sizes, some empty, with unused capacity behind them, arrive bitwise."""
    g = torch.Generator().manual_seed(seed)
    ends = world(size)
    sent: list[list[Tensor]] = []
    for end in ends:
        counts = torch.randint(0, 4, (size,), generator=g)
        total = int(counts.sum())
        rows = torch.randn(total + spare + 1, *trailing, generator=g)
        order = torch.randperm(len(rows), generator=g) if indexed else None
        moved = rows if order is None else rows[order]
        sent.append(list(moved[:total].split(counts.tolist())))
        if order is not None:
            order[total:] = -(2**40)
        end.post(HEADER, [Column("rows", rows, counts, order)])
    for rank, end in enumerate(ends):
        messages = end.collect(HEADER)
        assert messages[rank] is None
        for peer, message in enumerate(messages):
            if message is not None:
                share = sent[peer][rank]
                got = message.columns.get("rows")
                assert (got is None) == (len(share) == 0)
                assert got is None or torch.equal(got, share)


def test_bytes_are_counted_in_the_send() -> None:
    """The counters equal the sizes of the buffers that were handed to the carrier."""
    ends = world(3)
    carried: list[int] = []
    send = ends[0]._send

    def counting(peer: int, buffer: Tensor, purpose: Purpose = Purpose.STEP) -> None:
        carried.append(len(buffer))
        send(peer, buffer, purpose)

    ends[0]._send = counting  # type: ignore[method-assign]
    rows = torch.arange(30.0).view(10, 3)
    ends[0].post(HEADER, [Column("rows", rows, torch.tensor([1, 2, 7]))])
    reply = replace(HEADER, kind="attend-answer")
    ends[0].post(reply)
    expected = [len(encode(HEADER, {"rows": rows[:n]})) for n in (2, 7)]
    assert carried == [*expected, len(encode(reply, {})), len(encode(reply, {}))]
    assert ends[0].bytes_sent == {"attend": sum(carried[:2]), "attend-answer": sum(carried[2:])}
    assert ends[0].messages_sent == {"attend": 2, "attend-answer": 2}
    assert ends[1].bytes_sent == {}


def test_messages_of_a_pair_keep_their_order() -> None:
    ends = world(3)
    later = replace(HEADER, epoch=2)
    for header in (HEADER, later):
        ends[1].post(header, [Column("epoch", torch.tensor([header.epoch] * 3), torch.ones(3))])
    for header in (HEADER, later):
        ends[2].post(header)
        message = ends[0].collect(header)[1]
        assert isinstance(message, Message)
        assert message.columns["epoch"].tolist() == [header.epoch]


def test_a_world_of_one_has_nobody_to_ask() -> None:
    (end,) = world(1)
    end.post(HEADER, [Column("rows", torch.ones(3), torch.tensor([3]))])
    assert end.collect(HEADER) == [None]
    assert not end.bytes_sent


@pytest.mark.parametrize("silent", [0, 2, 3])
def test_the_silent_rank_is_named_by_all_within_the_deadline(silent: int) -> None:
    deadline_s = 1.0
    ends = world(4, deadline_s)
    speaking = [end for end in ends if end.rank != silent]
    for end in speaking:
        end.post(HEADER)
    start = time.monotonic()
    outcomes = together(collecting(speaking))
    took = time.monotonic() - start
    assert [culprits(outcome) for outcome in outcomes] == [(silent,)] * 3
    assert 0.5 * deadline_s < took <= deadline_s
    assert "no answer within 1 s" in str(outcomes[0])


def test_all_silent_ranks_are_named() -> None:
    ends = world(4, 0.5)
    for end in ends[:2]:
        end.post(HEADER)
    outcomes = together(collecting(ends[:2]))
    assert [culprits(outcome) for outcome in outcomes] == [(2, 3)] * 2


def test_who_only_waits_for_the_culprit_is_not_blamed() -> None:
    """Rank 2 falls silent after it answered rank 0: rank 0 then misses rank 1, which misses rank 2."""
    ends = world(3, 1.0)
    later = replace(HEADER, epoch=2)
    ends[0].post(HEADER)
    ends[1].post(HEADER)
    ends[2]._send(0, encode(HEADER, {}))

    def rank_0() -> object:
        time.sleep(0.05)
        ends[0].collect(HEADER)
        ends[0].post(later)
        return ends[0].collect(later)

    outcomes = together([rank_0, lambda: ends[1].collect(HEADER)])
    assert [culprits(outcome) for outcome in outcomes] == [(2,), (2,)]


def test_who_left_because_of_the_culprit_is_not_blamed() -> None:
    """Rank 1 gives up on rank 2 and is gone a moment before rank 3 says why."""
    ends = world(4, 4.0)
    ends[0].post(HEADER)
    ends[1].close()

    def rank_3() -> None:
        time.sleep(0.05)
        ends[3].abort((2,), "no answer")

    outcomes = together([lambda: ends[0].collect(HEADER), rank_3])
    assert culprits(outcomes[0]) == (2,)


def test_an_abort_reaches_every_rank_at_once_and_stays() -> None:
    ends = world(4, 30.0)
    for end in ends[:3]:
        end.post(HEADER)

    def abort() -> None:
        time.sleep(0.1)
        ends[3].abort((3,), "raised ValueError: no")

    start = time.monotonic()
    outcomes = together([*collecting(ends[:3]), abort])
    assert time.monotonic() - start < 5
    assert [culprits(outcome) for outcome in outcomes[:3]] == [(3,)] * 3
    assert all("raised ValueError: no" in str(outcome) for outcome in outcomes[:3])
    for end in ends:
        with pytest.raises(PeerError, match="rank 3"):
            end.post(HEADER)
        with pytest.raises(PeerError, match="rank 3"):
            end.collect(HEADER)


def test_the_first_abort_counts() -> None:
    ends = world(2)
    ends[0].abort((1,), "first")
    ends[0].abort((0,), "second")
    with pytest.raises(PeerError, match="rank 1: first"):
        ends[0].post(HEADER)
    with pytest.raises(PeerError, match="rank 1: first"):
        ends[1].collect(HEADER)


def test_a_closed_peer_is_named_without_waiting_for_the_deadline() -> None:
    ends = world(3, 30.0)
    ends[0].post(HEADER)
    ends[1].post(HEADER)
    ends[2].close()
    ends[2].close()
    start = time.monotonic()
    outcomes = together(collecting(ends[:2]))
    assert time.monotonic() - start < 5
    assert [culprits(outcome) for outcome in outcomes] == [(2,)] * 2
    assert "closed its runtime" in str(outcomes[0])


def test_what_a_peer_sent_before_it_closed_still_counts() -> None:
    ends = world(2)
    for end in ends:
        end.post(HEADER)
    ends[1].close()
    assert isinstance(ends[0].collect(HEADER)[1], Message)


@pytest.mark.parametrize(
    ("field", "value"),
    [("kind", "select"), ("epoch", 2), ("tables", 6), ("channel", 1), ("incarnation", 2)],
)
def test_a_rank_out_of_step_is_named_with_what_differs(field: str, value: object) -> None:
    ends = world(3)
    for end in ends[:2]:
        end.post(HEADER)
    ends[2].post(replace(HEADER, **{field: value}))  # type: ignore[arg-type]
    outcomes = together(collecting(ends[:2]))
    assert [culprits(outcome) for outcome in outcomes] == [(2,)] * 2
    said = "another configuration" if field == "incarnation" else f"{field} {value!r} instead of"
    assert said in str(outcomes[0])


def test_layer_and_sizes_are_for_the_reader_to_check() -> None:
    ends = world(2)
    ends[1].post(replace(HEADER, layer=3, unit_tokens=2, top_k=9))
    message = ends[0].collect(HEADER)[1]
    assert message is not None
    assert message.header.layer == 3


def test_a_malformed_message_accuses_its_sender() -> None:
    ends = world(3)
    ends[1].post(HEADER)
    ends[0].post(HEADER)
    for peer in (0, 1):
        ends[2]._send(peer, torch.ones(64, dtype=torch.uint8))
    outcomes = together(collecting(ends[:2]))
    assert [culprits(outcome) for outcome in outcomes] == [(2,)] * 2
    assert "malformed message" in str(outcomes[0])


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("nan")])
def test_a_deadline_must_be_positive(deadline_s: float) -> None:
    with pytest.raises(ValueError, match="deadline"):
        LoopbackTransport(rank=0, world_size=1, deadline_s=deadline_s)


@pytest.mark.parametrize(("rank", "size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_lies_within_its_world(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="outside a world"):
        LoopbackTransport(rank=rank, world_size=size, deadline_s=1.0)
