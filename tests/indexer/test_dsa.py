"""Index scores against transformers' own, and their fp8 path against an emulation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from at_offsets import numbers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_indexer import TINY, hf_indexer

from qroam.indexer import (
    hadamard,
    head_weights,
    index_key,
    index_query,
    rotate_index,
    scores,
)
from qroam.partition.codec import make_codec
from qroam.partition.layout import IndexLayout, Pairing, Rope
from qroam.partition.rope import rope_tables, rotate

TILE = 1 << 20
LAYOUT = IndexLayout(heads=4, head_dim=32, rope_dim=16, pairing="half", top_k=8)


class Captured(Exception):
    """Carries the scores out of a transformers indexer, which returns only their top-k."""


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


def test_a_quantised_index_query_is_rotated_behind_its_hadamard_matrix() -> None:
    index = IndexLayout(heads=2, head_dim=16, rope_dim=8, pairing="half", top_k=1, quantized=True)
    rope = Rope(dim=8, pairing="half")
    query, keys, weights = numbers(3, 2, 16), numbers(9, 16, seed=1), numbers(3, 2, seed=2)
    by = torch.full((3,), -6)
    turned = rotate_index(hadamard(query), by, index, rope)
    moved = rotate_index(hadamard(keys), torch.full((9,), 6), index, rope)
    plain = torch.cat((rotate(keys[:, :8], torch.full((9,), 6), rope), keys[:, 8:]), dim=1)
    expected = scores(query, weights, plain, tile_bytes=1 << 20)
    for found in (
        scores(turned, weights, hadamard(keys), tile_bytes=1 << 20),
        scores(hadamard(query), weights, moved, tile_bytes=1 << 20),
    ):
        assert float((found - expected).abs().max()) < 1e-12
