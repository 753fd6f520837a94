"""The verbs in plain torch against fp64 brute force written with Python loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qroam.kernels import reference

H, K, C, D = 3, 5, 4, 6  # heads, key columns (last), value columns (first), entry columns
SCALE = 0.4
INF = math.inf


def case(
    rows: int, entries: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """query (M, H, K), entries (M, E, D), valid (M, E) with every kind of row: none, some, all."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, H, K, generator=g, dtype=torch.float64).to(dtype)
    kv = torch.randn(rows, entries, D, generator=g, dtype=torch.float64).to(dtype)
    chance = torch.tensor([0.0, 0.5, 1.0]).repeat(rows)[:rows, None]
    return query, kv, torch.rand(rows, entries, generator=g) < chance


def brute_force(query: Tensor, kv: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax by its definition, one head of one row at a time, over a list of entries."""
    query, kv = query.double(), kv.double()
    out = torch.zeros(len(query), H, C, dtype=torch.float64)
    lse = torch.full((len(query), H), -INF, dtype=torch.float64)
    for m in range(len(query)):
        listed = [kv[m, e] for e in range(kv.shape[1]) if valid[m, e]]
        for h in range(H):
            logits = [SCALE * float(query[m, h] @ entry[-K:]) for entry in listed]
            if logits:
                weights = [math.exp(logit) for logit in logits]
                lse[m, h] = math.log(math.fsum(weights))
                for weight, entry in zip(weights, listed, strict=True):
                    out[m, h] += weight / math.fsum(weights) * entry[:C]
    return out, lse


def attend(query: Tensor, kv: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    return reference.attend(query, kv, valid, value_dim=C, scale=SCALE)


def worst(actual: Tensor, exact: Tensor) -> float:
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite], exact[~finite])
    return float((actual.double() - exact)[finite].abs().max()) if bool(finite.any()) else 0.0


@pytest.mark.parametrize("entries", [0, 1, 7])
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)],
    ids=["fp64", "fp32", "bf16"],
)
def test_attend_is_a_softmax(entries: int, dtype: torch.dtype, limit: float) -> None:
    query, kv, valid = case(9, entries, dtype=dtype)
    out, lse = attend(query, kv, valid)
    exact_out, exact_lse = brute_force(query, kv, valid)
    assert out.shape == (9, H, C)
    assert lse.shape == (9, H)
    assert out.dtype == lse.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert worst(out, exact_out) <= limit
    assert worst(lse, exact_lse) <= limit
    empty = ~valid.any(1)
    assert bool(empty.any())
    assert bool((out[empty] == 0).all())
    assert bool((lse[empty] == -INF).all())


@pytest.mark.parametrize("poison", [math.nan, INF, -INF], ids=["nan", "inf", "-inf"])
def test_invalid_entries_are_never_read(poison: float) -> None:
    query, kv, valid = case(9, 7)
    clean = attend(query, kv, valid)
    kv[~valid] = poison
    for got, want in zip(attend(query, kv, valid), clean, strict=True):
        assert torch.equal(got, want)


def test_attend_of_no_rows() -> None:
    out, lse = attend(*case(0, 4))
    assert (out.shape, lse.shape) == ((0, H, C), (0, H))


def test_large_logits_do_not_overflow() -> None:
    query, kv, valid = case(3, 7)
    valid[:] = True
    out, lse = attend(query * 1e4, kv, valid)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())
    top = torch.einsum("mhk,mek->mhe", query * 1e4 * SCALE, kv[..., -K:]).max(-1)
    assert worst(lse, top.values) < 1e-6 * float(top.values.abs().max())


def partials(parts: int, items: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Partials over a random split of each item's entries, their items, and the unsplit answer."""
    query, kv, valid = case(items, 8, seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    side = torch.randint(parts, valid.shape, generator=g)
    split = [attend(query, kv, valid & (side == part)) for part in range(parts)]
    item = torch.arange(items).repeat(parts)
    order = torch.randperm(parts * items, generator=g)
    outs, lses = (torch.cat(column)[order] for column in zip(*split, strict=True))
    return outs, lses, item[order], *attend(query, kv, valid)


@given(parts=st.integers(1, 5), items=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_merge_of_any_split_is_the_unsplit_attention(parts: int, items: int, seed: int) -> None:
    outs, lses, item, out, lse = partials(parts, items, seed)
    merged_out, merged_lse = reference.merge(outs, lses, item, items)
    assert worst(merged_out, out) <= 1e-12
    assert worst(merged_lse, lse) <= 1e-12


@given(seed=st.integers(0, 10**6), cut=st.integers(0, 20))
def test_merge_is_associative(seed: int, cut: int) -> None:
    outs, lses, item, out, lse = partials(4, 5, seed)
    first = reference.merge(outs[:cut], lses[:cut], item[:cut], 5)
    everyone = torch.arange(5)
    again = reference.merge(
        torch.cat((outs[cut:], first[0])),
        torch.cat((lses[cut:], first[1])),
        torch.cat((item[cut:], everyone)),
        5,
    )
    assert worst(again[0], out) <= 1e-12
    assert worst(again[1], lse) <= 1e-12


def test_merge_skips_unused_capacity_and_empty_partials_whatever_they_hold() -> None:
    outs, lses, item, _, _ = partials(3, 4, seed=3)
    clean = reference.merge(outs, lses, item, 4)
    junk = torch.full((2, H, C), math.nan, dtype=torch.float64)
    junk_lse = torch.tensor([[math.nan] * H, [INF] * H], dtype=torch.float64)
    empty_lse = torch.full((2, H), -INF, dtype=torch.float64)
    poisoned = reference.merge(
        torch.cat((outs, junk, junk)),
        torch.cat((lses, junk_lse, empty_lse)),
        torch.cat((item, torch.tensor([-1, -1, 0, 1]))),
        4,
    )
    for got, want in zip(poisoned, clean, strict=True):
        assert torch.equal(got, want)


def test_an_item_without_partials_is_empty() -> None:
    out, lse = reference.merge(torch.zeros(0, H, C), torch.zeros(0, H), torch.zeros(0).long(), 2)
    assert bool((out == 0).all())
    assert bool((lse == -INF).all())


@pytest.mark.parametrize("broken", [INF, math.nan], ids=["flashmla-inf", "nan"])
def test_a_foreign_empty_or_a_nan_stays_visible(broken: float) -> None:
    """FlashMLA says +inf for "no keys": unconverted, it may not pass for an empty partial."""
    outs, lses, item, out, _ = partials(2, 3, seed=5)
    lses[(item == 1).nonzero()[0, 0]] = broken
    merged, merged_lse = reference.merge(outs, lses, item, 3)
    assert not bool(merged_lse[1].isfinite().any())
    assert not bool(merged[1].isfinite().any())
    for healthy in (0, 2):
        assert worst(merged[healthy], out[healthy]) <= 1e-12


def test_base_two_is_caught_and_converts_exactly() -> None:
    """FlashInfer's LSE is in base 2: times ln 2 it is ours, as it is it moves the answer."""
    outs, lses, item, out, lse = partials(2, 9, seed=8)
    base_two = lses / math.log(2)
    converted = reference.merge(outs, base_two * math.log(2), item, 9)
    assert worst(converted[0], out) <= 1e-12
    assert worst(converted[1], lse) <= 1e-12
    mistaken = reference.merge(outs, base_two, item, 9)
    assert float((mistaken[0] - out).abs().max()) > 1e-2


def test_the_sink_is_one_more_logit_without_a_value() -> None:
    query, kv, valid = case(9, 7)
    sink = torch.tensor([-1.0, 0.0, 30.0], dtype=torch.float64)
    out = reference.apply_sink(*attend(query, kv, valid), sink)
    logits = torch.einsum("mhk,mek->mhe", query * SCALE, kv[..., -K:])
    logits = logits.masked_fill(~valid[:, None], -INF)
    logits = torch.cat((logits, sink[None, :, None].expand(9, -1, 1)), dim=2)
    exact = torch.softmax(logits, -1)[..., :-1] @ kv[..., :C]
    assert worst(out, exact) <= 1e-12


def test_absorb_and_project_against_loops() -> None:
    g = torch.Generator().manual_seed(2)
    queries, branches, nope, rope, latent, out_dim = 2, 2, 4, 2, 5, 3
    query = torch.randn(queries, branches, H, nope + rope, generator=g, dtype=torch.float64)
    w_uk = torch.randn(branches, H, nope, latent, generator=g, dtype=torch.float64)
    w_uv = torch.randn(branches, H, latent, out_dim, generator=g, dtype=torch.float64)
    absorbed = reference.absorb(query, w_uk)
    projected = reference.project(absorbed[..., :latent], w_uv)
    for q in range(queries):
        for b in range(branches):
            for h in range(H):
                row = torch.cat((query[q, b, h, :nope] @ w_uk[b, h], query[q, b, h, nope:]))
                assert worst(absorbed[q, b, h], row) <= 1e-12
                assert worst(projected[q, b, h], row[:latent] @ w_uv[b, h]) <= 1e-12


def test_projecting_partials_before_the_merge_is_exact() -> None:
    outs, lses, item, out, _ = partials(3, 4, seed=4)
    w_uv = torch.randn(1, H, C, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    early, _ = reference.merge(reference.project(outs[:, None], w_uv)[:, 0], lses, item, 4)
    assert worst(early, reference.project(out[:, None], w_uv)[:, 0]) <= 1e-12
