"""Work in threads: results in order, a bounded number under way, nothing left behind."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import pytest
import torch
from torch import Tensor

from qroam.partition.snapshot.parallel_map import MOST_THREADS, in_order


def threads() -> int:
    return sum(thread.name.startswith("qroam-in-order") for thread in threading.enumerate())


def test_results_come_in_order_and_their_buffers_are_their_own() -> None:
    begun: list[int] = []

    def work(item: int, buffer: Tensor) -> Tensor:
        begun.append(item)
        time.sleep(0.002 if item % 3 == 0 else 0.0)  # later items are done earlier
        return buffer.fill_(item)

    for number, result in enumerate(in_order(work, range(40), (5,))):
        time.sleep(0.001)  # time for others to spoil it
        assert torch.equal(result, torch.full((5,), number, dtype=torch.uint8))
        assert max(begun) <= number + MOST_THREADS
    assert number == 39
    assert threads() == 0
    assert list(in_order(work, [], (5,))) == []


def test_what_a_work_raises_is_raised_in_its_turn() -> None:
    def work(item: int, _buffer: Tensor) -> int:
        if item == 7:
            raise KeyError(item)
        return item

    results = in_order(work, range(100), (1,))
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(KeyError):
        next(results)
    assert threads() == 0


def test_nothing_is_under_way_once_it_is_closed() -> None:
    ended: list[int] = []

    def work(item: int, _buffer: Tensor) -> int:
        time.sleep(0.01)
        ended.append(item)
        return item

    with closing(in_order(work, range(100), (1,))) as results:
        assert next(results) == 0
    count = len(ended)
    time.sleep(0.05)
    assert len(ended) == count <= 1 + MOST_THREADS
    assert threads() == 0
