"""Sizes of an exchange: what is refused, and regions of the arena that do not overlap."""

from __future__ import annotations

from typing import Any

import pytest

from qroam.kernels.exchange.layout import Wire


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("world_size", 1, "world_size must be 2 to 64, got 1"),
        ("rows", 0, "rows must be 1 to 1024, got 0"),
        ("chunk", 9, "chunk must be 1 to 8, got 9"),
        ("query_words", 6, "query_words must be a positive multiple of 4, got 6"),
    ],
)
def test_wire_refuses(field: str, value: int, says: str) -> None:
    facts: dict[str, Any] = {
        "world_size": 2,
        "rows": 4,
        "heads": 4,
        "query_words": 48,
        "answer_words": 32,
    }
    with pytest.raises(ValueError, match=says):
        Wire(**facts | {"units": 7, field: value})


@pytest.mark.parametrize("staged", [False, True])
def test_regions_of_the_arena_do_not_overlap(staged: bool) -> None:
    wire = Wire(
        world_size=3, rows=64, heads=128, query_words=36864, answer_words=32768, units=2048,
        staged=staged,
    )  # fmt: skip
    messages = 2 * 3 * wire.chunks
    sizes = [
        (0, messages * wire.inbox_chunk),
        (wire.window, messages * wire.window_chunk),
        (wire.query_signals, 2 * messages),
        (wire.answer_signals, 2 * messages),
        (wire.abort, 2),
    ]
    if staged:
        sizes += [
            (wire.outbox, messages * wire.inbox_chunk),
            (wire.outgoing, messages * wire.window_chunk),
        ]
    ends = [begin + size for begin, size in sizes]
    assert all(
        end <= begin for end, (begin, _) in zip(ends, [*sizes[1:], (wire.words, 0)], strict=True)
    )
    assert all(begin % 32 == 0 for begin, _ in sizes)
    assert wire.query_rows * wire.query_words == sizes[0][1]
