"""The indexer against transformers' own, its fp8 path against an emulation, and exact selection."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf_v32
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf_glm
from transformers.models.glm_moe_dsa.configuration_glm_moe_dsa import GlmMoeDsaConfig

from qroam.indexer import (
    hadamard,
    head_weights,
    index_key,
    index_query,
    local_topk,
    merge_topk,
    scores,
    select_blocks,
    unit_scores,
    visible,
)
from qroam.partition.codec import make_codec
from qroam.partition.layout import IndexLayout, Pairing
from qroam.partition.rope import apply_rope, deinterleave, rope_tables

TILE = 1 << 20
NEVER = 2**31 - 1
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 1,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 8,
}
LAYOUT = IndexLayout(heads=4, head_dim=32, rope_dim=16, pairing="half", top_k=8)


class Captured(Exception):
    """Carries the scores out of a transformers indexer, which returns only their top-k."""


def hf_indexer(pairing: Pairing) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(indexer, rotary embedding) of the model that pairs this way, with seeded weights."""
    if pairing == "half":
        config: Any = DeepseekV32Config(**TINY)
        parts: Any = hf_v32.DeepseekV32Indexer(config, 0), hf_v32.DeepseekV32RotaryEmbedding(config)
    else:
        config = GlmMoeDsaConfig(**TINY)
        parts = hf_glm.GlmMoeDsaIndexer(config, 0), hf_glm.GlmMoeDsaRotaryEmbedding(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in parts[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return parts[0], parts[1]


def hf_scores(
    indexer: torch.nn.Module,
    x: Tensor,
    compressed: Tensor,
    tables: tuple[Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    def capture(self: Tensor, *_: Any, **__: Any) -> Tensor:
        raise Captured(self)

    doubled = tuple(torch.cat((table, table), dim=-1)[None] for table in tables)
    nothing_masked, positions = x.new_zeros(1, 1, 1), torch.arange(len(x))[None]
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "topk", capture)
        if x.dtype == torch.float64:
            patch.setattr(Tensor, "float", Tensor.double)  # it casts to fp32 before scoring
        with pytest.raises(Captured) as caught:
            indexer(x[None], compressed[None], doubled, nothing_masked, positions)
    found: Tensor = caught.value.args[0][0]
    return found


@torch.no_grad()
def our_vectors(
    indexer: Any, x: Tensor, compressed: Tensor, tables: tuple[Tensor, Tensor], layout: IndexLayout
) -> tuple[Tensor, Tensor, Tensor]:
    norm = indexer.k_norm
    return (
        index_query(compressed, indexer.wq_b.weight, *tables, layout),
        head_weights(x, indexer.weights_proj.weight, layout),
        index_key(x, indexer.wk.weight, norm.weight, norm.bias, *tables, layout),
    )


def with_pairing(pairing: Pairing, *, quantized: bool = False) -> IndexLayout:
    return IndexLayout(
        heads=4, head_dim=32, rope_dim=16, pairing=pairing, top_k=8, quantized=quantized
    )


def hidden_states(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (num_tokens, TINY["hidden_size"] + TINY["q_lora_rank"])
    both = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return both[:, : TINY["hidden_size"]], both[:, TINY["hidden_size"] :]


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)
def test_scores_equal_transformers(
    pairing: Pairing, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexer, _ = hf_indexer(pairing)
    indexer.to(dtype)
    x, compressed = hidden_states(37, dtype)
    tables = rope_tables(torch.arange(100, 137), 16, 1e4, dtype)
    want = hf_scores(indexer, x, compressed, tables, monkeypatch)
    query, weights, key = our_vectors(indexer, x, compressed, tables, with_pairing(pairing))
    got = scores(query, weights, key, tile_bytes=TILE)
    assert want.dtype == got.dtype == dtype
    assert want.abs().median() > 0.1
    assert (got - want).abs().max() <= tolerance


def test_pairings_give_different_scores() -> None:
    indexer, _ = hf_indexer("half")
    x, compressed = hidden_states(9, torch.float32)
    tables = rope_tables(torch.arange(9), 16, 1e4, torch.float32)
    half, interleaved = (
        scores(*our_vectors(indexer, x, compressed, tables, with_pairing(p)), tile_bytes=TILE)
        for p in ("half", "interleaved")
    )
    assert (half - interleaved).abs().max() > 0.1


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_tables_and_rotation_have_transformers_bits(pairing: Pairing) -> None:
    _, rotary = hf_indexer(pairing)
    positions = torch.tensor([0, 1, 77, 4095, 163839])
    cos, sin = rotary(torch.zeros(1), positions[None])
    ours = rope_tables(positions, 16, 1e4, torch.float32)
    assert torch.equal(ours[0], cos[0, :, :8])
    assert torch.equal(ours[1], sin[0, :, :8])
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    rotated = apply_rope(x, *ours, pairing=pairing)
    if pairing == "half":
        want, _ = hf_v32.apply_rotary_pos_emb(x, x, cos[0], sin[0])
        assert torch.equal(rotated, want)
    else:
        want, _ = hf_glm.apply_rotary_pos_emb_interleave(x, x, cos[0], sin[0])
        assert torch.equal(deinterleave(rotated), want)
    assert torch.equal(apply_rope(x[:, 0], *ours, pairing=pairing), rotated[:, 0])


def test_rope_rejects() -> None:
    cos, sin = rope_tables(torch.arange(3), 4, 1e4, torch.float32)
    with pytest.raises(ValueError, match="even"):
        rope_tables(torch.arange(3), 5, 1e4, torch.float32)
    with pytest.raises(ValueError, match="cos and sin"):
        apply_rope(torch.zeros(2, 4), cos, sin, pairing="half")
    with pytest.raises(ValueError, match="cos and sin"):
        apply_rope(torch.zeros(3, 8), cos, sin, pairing="half")
    with pytest.raises(ValueError, match="pairing"):
        apply_rope(torch.zeros(3, 4), cos, sin, pairing="both")  # type: ignore[arg-type]


def hadamard_matrix(dim: int) -> Tensor:
    matrix: Any = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return torch.from_numpy(matrix / math.sqrt(dim))


@pytest.mark.parametrize("dim", [1, 2, 32, 128])
def test_hadamard_equals_the_matrix_and_keeps_dot_products(dim: int) -> None:
    x = torch.randn(3, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    torch.testing.assert_close(hadamard(x), x @ hadamard_matrix(dim), rtol=0, atol=1e-13)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=1e-13)
    assert hadamard(x.bfloat16()).dtype == torch.bfloat16


def emulated_act_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 numbers, scales) in fp64, one row at a time, from the formula."""
    rows, scales = [], []
    for row in x.float().reshape(-1, x.shape[-1]):
        scale = 2.0 ** math.ceil(math.log2(max(row.abs().max().item(), 1e-4) / 448))
        rows.append((row / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double())
        scales.append(scale)
    return torch.stack(rows).view(x.shape), torch.tensor(scales).double().view(x.shape[:-1])


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_quantised_scores_equal_the_emulation(pairing: Pairing) -> None:
    """I = ks * sum_h (w_h * qs_h) * relu(q8_h . k8): the scales where the original has them."""
    indexer, _ = hf_indexer(pairing)
    indexer.double()
    x, compressed = hidden_states(29, torch.float64)
    compressed[3] = 0  # an index query of zeros
    tables = rope_tables(torch.arange(29), 16, 1e4, torch.float64)
    matrix = hadamard_matrix(32)
    query, weights, key = our_vectors(indexer, x, compressed, tables, with_pairing(pairing))
    q8, qs = emulated_act_quant(query @ matrix)
    k8, ks = emulated_act_quant(key @ matrix)
    products = torch.einsum("qhd,ed->qhe", q8, k8).relu()
    want = ks * torch.einsum("qh,qhe->qe", weights * qs, products)
    exact = torch.einsum("qh,qhe->qe", weights, torch.einsum("qhd,ed->qhe", query, key).relu())

    layout = with_pairing(pairing, quantized=True)
    query, weights, key = our_vectors(indexer, x, compressed, tables, layout)
    codec = make_codec("fp8_index", dim=32)
    key = codec.decode(codec.encode(key), torch.float64)
    got = scores(query, weights, key, tile_bytes=TILE)
    assert (got - want).abs().max() <= 1e-12
    assert 1e-4 < (got - exact).abs().max() < 0.1 * exact.abs().max()


class LargestProduct(TorchDispatchMode):
    """Records the bytes of the largest matrix product, which is the largest intermediate."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.bytes = max(self.bytes, out.nbytes)
        return out


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 700), (9, 4, 1100), (7, 2, 0), (0, 2, 7)])
@pytest.mark.parametrize("tile_bytes", [4_096, 6_000, 100_000, 1 << 30])
def test_tiles_cover_everything_and_bound_memory(
    shape: tuple[int, int, int], tile_bytes: int
) -> None:
    (num_queries, heads, entries), generator = shape, torch.Generator().manual_seed(7)
    query, weights, keys = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((num_queries, heads, 8), (num_queries, heads), (entries, 8))
    )
    with LargestProduct() as largest:
        got = scores(query, weights, keys, tile_bytes=tile_bytes)
    want = torch.einsum("qh,qhe->qe", weights, torch.einsum("qhd,ed->qhe", query, keys).relu())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert largest.bytes <= tile_bytes
    single = scores(query.float(), weights.float(), keys.bfloat16(), tile_bytes=tile_bytes)
    assert single.dtype == torch.float32


def test_dsa_rejects() -> None:
    tables = rope_tables(torch.arange(2), 16, 1e4, torch.float32)
    x, ones = torch.zeros(2, 64), torch.ones(32)
    with pytest.raises(ValueError, match=r"wq_b must be \(128, 64\)"):
        index_query(x, torch.zeros(64, 64), *tables, LAYOUT)
    with pytest.raises(ValueError, match=r"wk must be \(32, 64\)"):
        index_key(x, torch.zeros(32, 63), ones, ones, *tables, LAYOUT)
    with pytest.raises(ValueError, match=r"w_proj must be \(4, 64\)"):
        head_weights(x, torch.zeros(64, 4), LAYOUT)
    with pytest.raises(ValueError, match="power of two"):
        hadamard(torch.zeros(2, 12))
    with pytest.raises(ValueError, match="tile_bytes"):
        scores(torch.zeros(1, 4, 8), torch.zeros(1, 4), torch.zeros(3, 8), tile_bytes=15)
    with pytest.raises(ValueError, match=r"keys \(E, D\)"):
        scores(torch.zeros(1, 4, 8), torch.zeros(1, 4), torch.zeros(3, 9), tile_bytes=TILE)
    with pytest.raises(ValueError, match="quantised"):
        index_query(
            x * float("nan"), torch.zeros(128, 64), *tables, with_pairing("half", quantized=True)
        )


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
