"""Requests and their private blocks are bounded, and come back when they are released."""

from __future__ import annotations

import pytest
from two_documents import DI, QUERY, B, D, config, numbers

from qroam.runtime import Runtime


def test_a_stale_scope_of_a_released_request_is_refused() -> None:
    with Runtime.open(config()) as runtime:
        request = runtime.request()
        at = runtime.append(request, 1)
        runtime.write(0, at, numbers(1, D), numbers(1, DI))
        selection = runtime.selection(at[None], runtime.scope(requests=[(request, at)]))
        runtime.attend(0, QUERY[:1], selection)
        runtime.release(request)
        with pytest.raises(ValueError, match="released"):
            runtime.attend(0, QUERY[:1], selection)


@pytest.mark.parametrize(
    ("taken", "message"),
    [(3, "all 3 private blocks or requests are in use"), (0, "all 0 private blocks")],
    ids=["all-in-use", "none-kept"],
)
def test_requests_are_bounded_and_come_back(taken: int, message: str) -> None:
    with Runtime.open(config(private_blocks=taken)) as runtime:
        requests = [runtime.request() for _ in range(taken)]
        with pytest.raises(ValueError, match=message):
            runtime.request()
        for request in requests:
            runtime.release(request)
        assert len([runtime.request() for _ in range(taken)]) == taken


def test_private_blocks_are_bounded_and_come_back() -> None:
    with Runtime.open(config(private_blocks=3)) as runtime:
        first, second = runtime.request(), runtime.request()
        runtime.append(first, 2 * B)
        runtime.append(second, B)
        with pytest.raises(ValueError, match="1 private blocks needed, 0 of 3 are free"):
            runtime.append(second, 1)
        runtime.release(first)
        assert runtime.append(second, 1).tolist() == [second.tail_start + B]
