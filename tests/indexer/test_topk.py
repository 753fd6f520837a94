"""Exact top-k, of one rank's scores and of several ranks', with ties, padding and units of tokens."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qroam.indexer import local_topk, merge_topk, select_blocks, unit_scores, visible

NEVER = 2**31 - 1


def brute_topk(row: list[float], ids: list[int], k: int) -> list[int]:
    """Ascending ids of the k best, ties to the lower id, -inf never; not padded."""
    alive = [(-score, entry) for score, entry in zip(row, ids, strict=True) if score > -math.inf]
    return sorted(entry for _, entry in sorted(alive)[:k])


def assert_selection(
    selected: tuple[Tensor, Tensor], rows: list[list[float]], ids: list[int], k: int
) -> None:
    got_scores, got_ids = selected
    assert got_ids.dtype == torch.int32
    assert got_scores.shape == got_ids.shape == (len(rows), k)
    for row, row_scores, row_ids in zip(rows, got_scores.tolist(), got_ids.tolist(), strict=True):
        want = brute_topk(row, ids, k)
        padding = k - len(want)
        score_of = dict(zip(ids, row, strict=True))
        assert row_ids == want + [-1] * padding
        assert row_scores == [score_of[entry] for entry in want] + [-math.inf] * padding


def tied_case(seed: int) -> tuple[list[list[float]], list[int], int]:
    """Scores from few levels (-0.0, 0.0 and -inf among them) over ids with gaps."""
    rng = random.Random(seed)
    levels = rng.sample([-math.inf, -1.5, -0.0, 0.0, 0.25, 1.0, 2.0, math.inf], rng.randint(1, 8))
    ids = sorted(rng.sample(range(10 * 64), rng.randint(0, 64)))
    rows = [[rng.choice(levels) for _ in ids] for _ in range(rng.randint(1, 5))]
    return rows, ids, rng.randint(1, 70)


def tensors(rows: list[list[float]], ids: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows).view(len(rows), len(ids)), torch.tensor(ids, dtype=torch.int32)


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_local_topk_is_exact(seed: int) -> None:
    rows, ids, k = tied_case(seed)
    assert_selection(local_topk(*tensors(rows, ids), k), rows, ids, k)


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32), num_shards=st.integers(1, 5))
def test_merged_shards_equal_the_global_topk(seed: int, num_shards: int) -> None:
    rows, ids, k = tied_case(seed)
    every, all_ids = tensors(rows, ids)
    rng = random.Random(seed)
    shard_of = torch.tensor([rng.randrange(num_shards) for _ in ids], dtype=torch.int64)
    lists = [
        local_topk(every[:, shard_of == shard], all_ids[shard_of == shard], k)
        for shard in rng.sample(range(num_shards), num_shards)
    ]
    scores, candidates = (torch.cat(side, dim=1) for side in zip(*lists, strict=True))
    assert_selection(merge_topk(scores, candidates, k), rows, ids, k)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32))
def test_merge_takes_any_order_and_ignores_padding(seed: int) -> None:
    rows, ids, k = tied_case(seed)
    every, all_ids = tensors(rows, ids)
    generator = torch.Generator().manual_seed(seed)
    padded = torch.cat((every, torch.full((len(rows), 3), 9.0)), dim=1)
    order = torch.rand(padded.shape, generator=generator).argsort(dim=1)
    named = torch.cat((all_ids, all_ids.new_full((3,), -1))).expand(padded.shape)
    merged = merge_topk(padded.gather(1, order), named.gather(1, order), k)
    assert_selection(merged, rows, ids, k)


def test_topk_of_many_entries_with_and_without_ties() -> None:
    generator = torch.Generator().manual_seed(11)
    smooth = torch.randn(4, 3000, generator=generator)
    coarse = torch.randn(4, 3000, generator=generator).mul(4).round()
    hidden = smooth.masked_fill(torch.arange(3000) % 100 != 0, -torch.inf)
    every = torch.cat((smooth, coarse, hidden))
    ids = list(range(5, 3005))
    for k in (1, 256, 3000, 3001):
        assert_selection(local_topk(*tensors(every.tolist(), ids), k), every.tolist(), ids, k)


def test_selection_rejects() -> None:
    ids = torch.arange(3, dtype=torch.int32)
    some = torch.zeros(2, 3)
    for k in (0, -1):
        with pytest.raises(ValueError, match="k must be positive"):
            local_topk(some, ids, k)
    with pytest.raises(ValueError, match="int32"):
        local_topk(some, ids.long(), 1)
    with pytest.raises(ValueError, match="scores must be"):
        local_topk(some, ids[:2], 1)
    with pytest.raises(ValueError, match="NaN"):
        local_topk(some.clone().index_fill_(1, torch.tensor([2]), float("nan")), ids, 1)
    with pytest.raises(ValueError, match="candidates must be"):
        merge_topk(some, ids, 1)
    with pytest.raises(ValueError, match="repeat an id"):
        merge_topk(some, torch.tensor([[0, 1, 2], [7, 3, 7]], dtype=torch.int32), 1)
    with pytest.raises(ValueError, match="unit_tokens"):
        unit_scores(some, ids, 0)
    with pytest.raises(ValueError, match="scores must be"):
        unit_scores(some[:, :2], ids, 2)
    with pytest.raises(ValueError, match="runs must be"):
        visible(ids, torch.zeros(2, 3, dtype=torch.int32))


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 2**32))
def test_visible_is_membership_in_a_run(seed: int) -> None:
    rng = random.Random(seed)
    ids = sorted(rng.sample(range(200), rng.randint(0, 60)))
    queries = []
    for _ in range(rng.randint(1, 4)):
        cuts = sorted(rng.sample(range(220), 2 * rng.randint(0, 5)))
        queries.append([(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True)])
    width = rng.randint(0, 2) + max(len(runs) for runs in queries)
    padded = [runs + [(NEVER, 0)] * (width - len(runs)) for runs in queries]
    got = visible(
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor(padded, dtype=torch.int32).view(len(queries), width, 2),
    )
    want = [[any(a <= i < a + n for a, n in runs) for i in ids] for runs in queries]
    assert got.dtype == torch.bool
    assert got.shape == (len(queries), len(ids))
    assert got.tolist() == want


def test_visible_at_the_edges_of_int32() -> None:
    ids = torch.tensor([0, 1, NEVER - 1], dtype=torch.int32)
    runs = torch.tensor(
        [[[0, NEVER], [NEVER, 0]], [[1, 1], [2, 0]], [[0, 1], [1, 1]]], dtype=torch.int32
    )
    assert visible(ids, runs).tolist() == [
        [True, True, True],
        [False, True, False],
        [True, True, False],
    ]


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**32), unit_tokens=st.sampled_from([1, 4, 16, 64]))
def test_units_score_their_best_visible_entry(seed: int, unit_tokens: int) -> None:
    rows, ids, k = tied_case(seed)
    units = sorted({entry // unit_tokens for entry in ids})
    best = [
        [
            max(s for s, entry in zip(row, ids, strict=True) if entry // unit_tokens == unit)
            for unit in units
        ]
        for row in rows
    ]
    got, got_units = unit_scores(*tensors(rows, ids), unit_tokens)
    assert got_units.dtype == torch.int32
    assert got_units.tolist() == units
    assert got.tolist() == best
    selected = select_blocks(*tensors(rows, ids), unit_tokens, k)
    assert_selection(selected, best, units, k)
