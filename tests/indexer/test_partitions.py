"""Scores and selections have the same bits however the entries and the queries are divided."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qroam.indexer import (
    hadamard,
    least_tile_bytes,
    local_topk,
    merge_topk,
    scores,
    select_blocks,
)
from qroam.partition.codec import act_quant, make_codec

BLOCK = 16
TOP_K = 37
SHAPES = ((1, 8), (2, 16), (4, 32), (16, 64), (20, 128), (64, 128), (3, 256), (6, 100), (32, 200))
STORED = {
    "fp32": (torch.float32, "fp32"),
    "fp64": (torch.float64, "fp64"),
    "bf16": (torch.float32, "bf16"),
    "fp8": (torch.float32, "fp8_index"),
    "fp8 in fp64": (torch.float64, "fp8_index"),
}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads in torch; as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def corpus(
    entries: int, queries: int, heads: int, dim: int, stored: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query (Q, Hi, D), weights (Q, Hi) of both signs, and keys (E, D) as the codec gives them back."""
    g = torch.Generator().manual_seed(seed)
    dtype, codec_name = STORED[stored]
    query = torch.randn(queries, heads, dim, generator=g, dtype=dtype)
    keys = torch.randn(entries, dim, generator=g, dtype=dtype)
    if codec_name == "fp8_index" and not dim & (dim - 1):
        values, scale = act_quant(hadamard(query))
        query, keys = (values.float() * scale).to(dtype), hadamard(keys)
    codec = make_codec(codec_name, dim=dim)
    weights = torch.randn(queries, heads, generator=g, dtype=dtype) * (heads * dim) ** -0.5
    return query, weights, codec.decode(codec.encode(keys), dtype)


def tiles(rng: random.Random, heads: int, dtype: torch.dtype) -> int:
    """The smallest tile, a few of them, or all at once."""
    return rng.choice((1, 3, 17, 300, 10**6)) * least_tile_bytes(heads, dtype)


def parts(rng: random.Random, size: int, most: int) -> list[range]:
    """Random cuts of range(size) into up to `most` pieces, short and empty ones among them."""
    cuts = sorted(rng.randrange(size + 1) for _ in range(rng.randrange(most)))
    if rng.random() < 0.5:
        cuts = sorted({*cuts, 1, size - 1})
    return [range(a, b) for a, b in zip([0, *cuts], [*cuts, size], strict=True)]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize(("heads", "dim"), SHAPES)
def test_a_score_has_the_same_bits_in_every_division(
    heads: int, dim: int, stored: str, threads: int
) -> None:
    """Against each score on its own, with random cuts of entries and of queries, and tiles."""
    rng = random.Random(f"{heads} {dim} {stored}")
    query, weights, keys = corpus(777, 9, heads, dim, stored)
    whole = scores(query, weights, keys, tile_bytes=1 << 20)
    for at in rng.sample(range(777), 20):
        q = rng.randrange(9)
        alone = scores(
            query[q : q + 1],
            weights[q : q + 1],
            keys[at : at + 1],
            tile_bytes=least_tile_bytes(heads, query.dtype),
        )
        assert same_bits(alone[0], whole[q, at : at + 1])
    for _ in range(4):
        order = torch.randperm(777, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
        found = torch.empty_like(whole)
        for queries in parts(rng, 9, 4):
            for entries in parts(rng, 777, 6):
                some, rows = order[list(entries)], list(queries)
                found[torch.tensor(rows, dtype=torch.long)[:, None], some] = scores(
                    query[rows],
                    weights[rows],
                    keys[some],
                    tile_bytes=tiles(rng, heads, query.dtype),
                )
        assert same_bits(found, whole)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("holders", [1, 2, 3, 7])
@pytest.mark.parametrize("unit_tokens", [1, 4])
def test_a_selection_is_that_of_one_holder(holders: int, stored: str, unit_tokens: int) -> None:
    """Blocks spread at random over holders, each with tiles of its own; 1 to 9 queries."""
    rng = random.Random(f"{holders} {stored} {unit_tokens}")
    blocks = 40
    ids = torch.arange(blocks * BLOCK, dtype=torch.int32)
    for queries in range(1, 10):
        heads, dim = rng.choice(SHAPES)
        query, weights, keys = corpus(len(ids), queries, heads, dim, stored, seed=queries)
        whole = scores(query, weights, keys, tile_bytes=1 << 20)
        expected = select_blocks(whole, ids, unit_tokens, TOP_K)
        holder_of = torch.tensor([rng.randrange(holders) for _ in range(blocks)])
        lists = []
        for holder in rng.sample(range(holders), holders):
            mine = ids[holder_of.repeat_interleave(BLOCK) == holder]
            found = scores(
                query, weights, keys[mine.long()], tile_bytes=tiles(rng, heads, query.dtype)
            )
            lists.append(select_blocks(found, mine, unit_tokens, TOP_K))
        found_scores, found_ids = (torch.cat(s, dim=1) for s in zip(*lists, strict=True))
        got = merge_topk(found_scores, found_ids, TOP_K)
        assert torch.equal(got[1], expected[1])
        assert same_bits(got[0], expected[0])


def test_a_score_of_zero_has_no_sign() -> None:
    """No head is positive, or there are negative weights alone: the sum is +0.0 wherever it stands."""
    for heads in (1, 3, 16, 64):
        query, keys = torch.ones(3, heads, 8), -torch.rand(70, 8)
        for sign in (-1.0, 1.0):
            weights = torch.full((3, heads), sign)
            found = scores(query, weights, keys, tile_bytes=1 << 20)
            assert same_bits(found, torch.zeros(3, 70))
            assert same_bits(scores(-query, weights, keys * 0, tile_bytes=1 << 20), found)


@pytest.mark.parametrize("holders", [1, 3, 8])
def test_zeros_of_both_signs_are_equal_and_the_lower_id_wins(holders: int) -> None:
    """Most scores are zeros, of either sign, a few are above; as a device may make them."""
    rng = random.Random(holders)
    count, above = 3000, 11
    ids = torch.arange(5, 5 + count, dtype=torch.int32)
    for k in (above, above + 1, 100, 1000, count - 1):
        row = [rng.choice((-0.0, 0.0)) for _ in range(count)]
        best = sorted(rng.sample(range(count), above))
        for at in best:
            row[at] = rng.choice((1.0, 2.0))
        zeros = [at for at in range(count) if at not in best]
        expected = ids[sorted(best + zeros[: k - above])]
        every = torch.tensor([row, row[::-1]])
        assert torch.equal(local_topk(every, ids, k)[1][0], expected)
        shard = torch.tensor([rng.randrange(holders) for _ in range(count)])
        lists = [local_topk(every[:, shard == s], ids[shard == s], k) for s in range(holders)]
        found_scores, found_ids = (torch.cat(s, dim=1) for s in zip(*lists, strict=True))
        merged, chosen = merge_topk(found_scores, found_ids, k)
        assert torch.equal(chosen[0], expected)
        assert torch.equal(chosen[1], local_topk(every, ids, k)[1][1])
        assert torch.equal(merged[0], every[0, expected.long() - 5])


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """Unlike `torch.equal`, zeros of different signs differ."""
    words = {4: torch.int32, 8: torch.int64}[expected.element_size()]
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(words), expected.contiguous().view(words)
    )
