"""MLRA over four branch ranks times two token shards, against the un-absorbed training form.

The training form is written from the formulas of arXiv 2603.02188 and its `mlra_4.py`,
`mlra_2.py`: T tokens, d hidden columns, h heads, q query_lora columns, r latent columns (128).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import pytest
import torch
from ranks import run_loopback
from torch import Tensor

from qroam.kernels import reference
from qroam.partition.placement import Placement
from qroam.partition.presets import mlra, uniform_model
from qroam.partition.rope import apply_rope, rope_tables
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport

T, HIDDEN, Q_LORA, HEADS = 40, 96, 48, 6
LATENT, NOPE, ROPE, VALUE = 128, 128, 64, 128
SHARDS, B = 2, 8
EPS = 1e-6


class Weights(NamedTuple):
    """One layer's, by their names in the training code."""

    q_a: Tensor  # (d, q)
    q_norm: Tensor  # (q,)
    q_b: Tensor  # (q, h * 192)
    kv_a: Tensor  # (d, 4 r + 64)
    kv_norms: Tensor  # (4, r)
    kv_b: Tensor  # (4, r, h' * 256), h' the heads that a latent serves


def normal(g: torch.Generator, *shape: int, std: float) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64) * std


def make_weights(variant: Literal[2, 4]) -> tuple[Weights, Tensor]:
    """Random weights and hidden states (T, d)."""
    g = torch.Generator().manual_seed(variant)
    branch_heads = HEADS if variant == 4 else HEADS // 2
    weights = Weights(
        q_a=normal(g, HIDDEN, Q_LORA, std=HIDDEN**-0.5),
        q_norm=1 + normal(g, Q_LORA, std=0.2),
        q_b=normal(g, Q_LORA, HEADS * (NOPE + ROPE), std=Q_LORA**-0.5),
        kv_a=normal(g, HIDDEN, 4 * LATENT + ROPE, std=HIDDEN**-0.5),
        kv_norms=1 + normal(g, 4, LATENT, std=0.2),
        kv_b=normal(g, 4, LATENT, branch_heads * (NOPE + VALUE), std=LATENT**-0.5),
    )
    return weights, normal(g, T, HIDDEN, std=1.0)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def half_split_rope(x: Tensor) -> Tensor:
    """x (T, ..., 64): columns (i, i + 32) of token t turn by t * 10000**(-i / 32)."""
    frequency = 10000.0 ** (-torch.arange(ROPE // 2, dtype=torch.float64) / (ROPE // 2))
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
    angle = angle.view(len(x), *[1] * (x.dim() - 2), -1)
    first, second = x[..., : ROPE // 2], x[..., ROPE // 2 :]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def queries(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """q_nope (T, h, 128) and q_pe (T, h, 64), rope applied."""
    compressed = rms_norm(x @ weights.q_a, weights.q_norm) * math.sqrt(HIDDEN / Q_LORA)
    q = (compressed @ weights.q_b).view(T, HEADS, NOPE + ROPE)
    return q[..., :NOPE], half_split_rope(q[..., NOPE:])


def latents(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
    """c (T, 4, r), each latent with a norm of its own and scaled, and k_pe (T, 64) after rope."""
    compressed = x @ weights.kv_a
    c = [
        rms_norm(compressed[:, LATENT * b : LATENT * (b + 1)], weights.kv_norms[b])
        * math.sqrt(HIDDEN / LATENT)
        for b in range(4)
    ]
    return torch.stack(c, dim=1), half_split_rope(compressed[:, 4 * LATENT :])


def training_form(variant: Literal[2, 4], weights: Weights, x: Tensor) -> Tensor:
    """y (T, h, 128): every latent expanded to keys and values, dense causal softmax, then the sum."""
    q_nope, q_pe = queries(weights, x)
    c, k_pe = latents(weights, x)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    branch_outputs = []
    for b in range(4):
        kv = (c[:, b] @ weights.kv_b[b]).view(T, -1, NOPE + VALUE)
        k_nope, v = kv[..., :NOPE], kv[..., NOPE:]
        served = slice(None)
        if variant == 2:
            served = slice(0, HEADS // 2) if b % 2 == 0 else slice(HEADS // 2, HEADS)
        logits = torch.einsum("thn,shn->hts", q_nope[:, served], k_nope)
        logits = logits + torch.einsum("thr,sr->hts", q_pe[:, served], k_pe)
        logits = (logits * (NOPE + ROPE) ** -0.5).masked_fill(future, -math.inf)
        branch_outputs.append(torch.einsum("hts,shv->thv", logits.softmax(-1), v))
    if variant == 4:
        return 0.5 * (branch_outputs[0] + branch_outputs[1] + branch_outputs[2] + branch_outputs[3])
    group_a = torch.cat(branch_outputs[:2], dim=1)
    group_b = torch.cat(branch_outputs[2:], dim=1)
    return (group_a + group_b) / math.sqrt(2)


def cached(weights: Weights, x: Tensor) -> Tensor:
    """Entries (T, 4, 192) as a branch owner caches them: its latent, and the shared rope key."""
    c, k_pe = latents(weights, x)
    return torch.cat((c, k_pe[:, None].expand(-1, 4, -1)), dim=-1)


def projections(weights: Weights) -> tuple[Tensor, Tensor]:
    """w_uk (4, h', nope, r) and w_uv (4, h', r, value) out of `kv_b`."""
    per_head = weights.kv_b.view(4, LATENT, -1, NOPE + VALUE).permute(0, 2, 1, 3)
    return per_head[..., :NOPE].mT.contiguous(), per_head[..., NOPE:].contiguous()


def distributed(variant: Literal[2, 4], weights: Weights, x: Tensor, mode: str) -> Tensor:
    """The same layer, absorbed, on 8 ranks; every rank asks for the queries of every 8th token."""
    config = RuntimeConfig(
        model=uniform_model(mlra(variant, heads=HEADS, codec="fp64"), 1),
        max_blocks=T // B,
        block_tokens=B,
        corpus_slots=4,
        placement=Placement(policy="branch-split"),
        dtype=torch.float64,
        mode=mode,  # type: ignore[arg-type]
    )
    query = torch.cat(queries(weights, x), dim=-1)
    entries = cached(weights, x)
    position = torch.arange(T, dtype=torch.int32)

    def worker(transport: Transport) -> tuple[Tensor, set[int]]:
        with Runtime.open(config, transport) as runtime:
            runtime.add_document("text", tokens=T)
            runtime.load_document("text", 0, entries)
            runtime.load_weights(0, *projections(weights))
            mine = position[runtime.rank :: runtime.world_size]
            causal = torch.where(position <= mine[:, None], position, -1)
            scope = runtime.scope(documents=["text"], queries=len(mine))
            out = runtime.attend(0, query[mine], runtime.selection(causal, scope))
            held = {int(key) % 4 for key in runtime._world.stores.entries.key_of if key >= 0}
            return out, held

    results = run_loopback(4 * SHARDS, worker)
    for rank, (_, held) in enumerate(results):
        assert held == {rank % 4}  # one branch of half of the blocks
    out = torch.empty(T, HEADS, VALUE, dtype=torch.float64)
    for rank, (part, _) in enumerate(results):
        out[rank :: 4 * SHARDS] = part
    return out


@pytest.mark.parametrize("mode", ["random", "always-route", "always-fetch"])
@pytest.mark.parametrize("variant", [4, 2], ids=["mlra-4", "mlra-2"])
def test_branches_times_shards_equal_the_training_form(variant: Literal[2, 4], mode: str) -> None:
    weights, x = make_weights(variant)
    exact = training_form(variant, weights, x)
    out = distributed(variant, weights, x, mode)
    assert float((out - exact).abs().max()) <= 1e-12
    assert float(exact.abs().mean()) > 0.1


@pytest.mark.parametrize("variant", [4, 2], ids=["mlra-4", "mlra-2"])
def test_merging_branches_by_lse_would_be_wrong(variant: Literal[2, 4]) -> None:
    weights, x = make_weights(variant)
    layout = mlra(variant, heads=HEADS, codec="fp64")
    exact = training_form(variant, weights, x)
    query, entries = torch.cat(queries(weights, x), dim=-1), cached(weights, x)
    w_uk, w_uv = projections(weights)
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    outs, lses, items = [], [], []
    summed = torch.zeros_like(exact)
    for b, branch in enumerate(layout.branches):
        heads = slice(branch.head_start, branch.head_start + branch.heads)
        rows = reference.absorb(query[:, None, heads], w_uk[b : b + 1])[:, 0]
        listed = entries[:, b].expand(T, -1, -1)
        out, lse = reference.attend(
            rows, listed, causal, value_dim=LATENT, scale=layout.softmax_scale
        )
        out = reference.project(out[:, None], w_uv[b : b + 1])[:, 0]
        summed[:, heads] += branch.weight * out
        # An item is a (token, head): branches that serve the same head are what is mistaken.
        outs.append(out.reshape(-1, 1, VALUE))
        lses.append(lse.reshape(-1, 1))
        served = torch.arange(HEADS)[heads]
        items.append((torch.arange(T)[:, None] * HEADS + served).reshape(-1))
    mistaken, _ = reference.merge(torch.cat(outs), torch.cat(lses), torch.cat(items), T * HEADS)
    mistaken = (
        mistaken.view(T, HEADS, VALUE) * (4 if variant == 4 else 2) * layout.branches[0].weight
    )
    assert float((summed - exact).abs().max()) <= 1e-12
    assert float((mistaken - exact).abs().max()) > 1e-2


def test_the_rope_of_the_formulas_is_the_indexers() -> None:
    x = normal(torch.Generator().manual_seed(0), T, 3, ROPE, std=1.0)
    cos, sin = rope_tables(torch.arange(T), ROPE, 10000.0, torch.float64)
    assert torch.allclose(
        half_split_rope(x), apply_rope(x, cos, sin, pairing="half"), rtol=0, atol=1e-12
    )
