"""Sizes of a pool's region: what is refused, and parts that follow one another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qroam.kernels.pool_layout import PoolLayout

SMALL = PoolLayout(layers=3, keys=21, slots=10, block_tokens=8, entry_bytes=656, staged=200)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("layers", 0, "layers must be at least 1, got 0"),
        ("slots", 0, "slots must be at least 1, got 0"),
        ("staged", -1, "staged must be at least 0, got -1"),
        ("entry_bytes", 132, "entry_bytes must be a positive multiple of 16, got 132"),
        ("keys", 2**28, "must be below 2\\*\\*31, got 2147483648 ids"),
        ("staged", 2**31 - 240, "and 2147483648 rows"),
    ],
)
def test_map_refuses(field: str, value: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(SMALL, **{field: value})


@pytest.mark.parametrize("pool", [SMALL, replace(SMALL, keys=1, slots=33, entry_bytes=1152)])
def test_parts_of_a_region_follow_one_another(pool: PoolLayout) -> None:
    parts = [
        (pool.slot_of, 4 * pool.keys),
        (pool.generation, 4 * pool.slots),
        (pool.fill, 4 * pool.layers * pool.slots),
    ]
    assert all(begin % 128 == 0 for begin, _ in parts)
    assert pool.entries_of(0) % 128 == 0
    begins = [begin for begin, _ in parts[1:]] + [pool.entries_of(0)]
    assert all(a + size <= b for (a, size), b in zip(parts, begins, strict=True))
    layer_bytes = pool.slots * pool.block_tokens * pool.entry_bytes
    for layer in range(pool.layers):
        assert pool.entries_of(layer + 1) - pool.entries_of(layer) == layer_bytes
        staged = pool.entries_of(layer) + pool.first_staged(layer) * pool.entry_bytes
        assert staged == pool.entries_of(pool.layers)
    assert pool.num_bytes - pool.entries_of(pool.layers) == pool.staged * pool.entry_bytes
