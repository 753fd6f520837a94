"""Work on many items in a few threads, the results in the items' order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

MOST_THREADS = 4  # beyond that copying and hashing outrun a disk, and the engine wants its cores


def in_order(
    work: Callable[[T, Tensor], R], items: Iterable[T], shape: tuple[int, ...]
) -> Generator[R, None, None]:
    """`work(item, buffer)` of every item, in threads; results in the order of the items.

    Nothing is under way once it is exhausted, has raised what a work raised, or was closed.

    Args: shape: of the buffers, uint8. A buffer is a work's alone until the result after its own is
    asked for, so a result may be a view of it.
    """
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    free = list(torch.empty(threads + 1, *shape, dtype=torch.uint8))
    under_way: deque[tuple[Future[R], Tensor]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="qroam-in-order") as pool:
        for item in items:
            if not free:
                future, buffer = under_way.popleft()
                yield future.result()
                free.append(buffer)
            buffer = free.pop()
            under_way.append((pool.submit(work, item, buffer), buffer))
        for future, _ in under_way:
            yield future.result()
