"""Layouts of published models, by name, and how to make variants of them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from .layout import (
    Branch,
    IndexLayout,
    Layout,
    ModelLayout,
    Pairing,
    Projection,
    Rope,
    Stream,
    Yarn,
)


def uniform_model(layout: Layout, num_layers: int) -> ModelLayout:
    """`num_layers` times the same layer, each with an indexer of its own if the layout has one."""
    return ModelLayout(layers=(layout,) * num_layers, index_source=tuple(range(num_layers)))


def mla(
    *,
    name: str,
    heads: int,
    latent: int,
    rope: int,
    nope: int,
    value: int,
    softmax_scale: float,
    codec: str,
    index: IndexLayout | None,
    index_codec: str,
    pairing: Pairing = "interleaved",
    theta: float = 10000.0,
    yarn: Yarn | None = None,
) -> Layout:
    """Multi-head latent attention in the absorbed form: one branch, value tied to the latent."""
    streams = (
        Stream(name="latent", dim=latent, role="kv"),
        Stream(name="rope_key", dim=rope, role="k"),
    )
    return Layout(
        name=name,
        heads=heads,
        branches=(Branch(name="mla", streams=streams, head_start=0, heads=heads),),
        softmax_scale=softmax_scale,
        codec=codec,
        rope=Rope(dim=rope, pairing=pairing, theta=theta, yarn=yarn),
        projection=Projection(nope_dim=nope, out_dim=value),
        index=index,
        index_codec=index_codec,
    )


def mlra(variant: Literal[2, 4], *, heads: int, codec: str = "bf16") -> Layout:
    """MLRA (arXiv 2603.02188): four latents of 128 with a shared rope key, summed, never LSE-merged.

    MLRA-4: every latent serves all heads, weight 4**-0.5. MLRA-2: latents 0 and 2 serve the first
    half of the heads, 1 and 3 the second, weight 2**-0.5. The rope key is stored with every branch.
    """
    if variant == 2 and heads % 2:
        raise ValueError(f"MLRA-2 splits the heads in two, got {heads}")
    branch_heads = heads if variant == 4 else heads // 2

    def branch(b: int) -> Branch:
        streams = (
            Stream(name=f"latent{b}", dim=128, role="kv"),
            Stream(name="rope_key", dim=64, role="k"),
        )
        start = 0 if variant == 4 else (b % 2) * branch_heads
        weight = variant**-0.5
        return Branch(
            name=f"latent{b}", streams=streams, head_start=start, heads=branch_heads, weight=weight
        )

    return Layout(
        name=f"mlra-{variant}",
        heads=heads,
        branches=tuple(branch(b) for b in range(4)),
        softmax_scale=192**-0.5,
        codec=codec,
        rope=Rope(dim=64, pairing="half"),
        projection=Projection(nope_dim=128, out_dim=128),
    )


LAYOUT_NAMES = ("mla-v3.2", "glm-5", "mla-tiny", "mlra-4", "mlra-2")


def named_layout(name: str) -> Layout:
    """A published layer by name; `dataclasses.replace` gives variants.

    Sources: DeepSeek-V3.2-Exp `config_671B_v3.2.json` (scale with YaRN factor 40, mscale 1),
    GLM-5 `GlmMoeDsaConfig`, MLRA `mlra_4.py` / `mlra_2.py` (2.9 B: 24 heads).
    """
    match name:
        case "mla-v3.2":
            return mla(
                name=name,
                heads=128,
                latent=512,
                rope=64,
                nope=128,
                value=128,
                softmax_scale=192**-0.5 * (0.1 * math.log(40) + 1) ** 2,
                codec="fp8_v32",
                index=IndexLayout(
                    heads=64, head_dim=128, rope_dim=64, pairing="half", top_k=2048, quantized=True
                ),
                index_codec="fp8_index",
                yarn=Yarn(factor=40.0, original_positions=4096),
            )
        case "glm-5":
            return mla(
                name=name,
                heads=64,
                latent=512,
                rope=64,
                nope=192,
                value=256,
                softmax_scale=256**-0.5,
                codec="fp8_v32",
                index=IndexLayout(
                    heads=32,
                    head_dim=128,
                    rope_dim=64,
                    pairing="interleaved",
                    top_k=2048,
                    quantized=True,
                ),
                index_codec="fp8_index",
            )
        case "mla-tiny":
            return mla(
                name=name,
                heads=4,
                latent=64,
                rope=16,
                nope=32,
                value=32,
                softmax_scale=48**-0.5,
                codec="fp32",
                index=IndexLayout(heads=4, head_dim=32, rope_dim=16, pairing="half", top_k=256),
                index_codec="fp32",
            )
        case "mlra-4":
            return mlra(4, heads=24)
        case "mlra-2":
            return mlra(2, heads=24)
        case _:
            raise ValueError(f"unknown layout {name!r}; known: {', '.join(LAYOUT_NAMES)}")


def with_codec(layout: Layout, codec: str, index_codec: str | None = None) -> Layout:
    """The same layer stored by another codec."""
    return replace(layout, codec=codec, index_codec=index_codec or layout.index_codec)
