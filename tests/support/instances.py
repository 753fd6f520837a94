"""Instances with tensor-parallel lanes: a small model, and what the lanes do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import Architecture

from qroam.partition.head_split import Heads
from qroam.partition.layout import IndexLayout, Layout
from qroam.partition.placement import Placement
from qroam.partition.presets import mla, mlra, uniform_model
from qroam.runtime import FabricProfile, RuntimeConfig, load_profile
from qroam.runtime.cost.predicate import Mode

HEADS, INSTANCES = 8, 2


HALVES: tuple[Heads, ...] = ((0, 4), (4, 4))


TOKENS, PREFILLED, B = 40, 21, 8


Q = 4


TOP_K = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Play:
    """What the instances do; every number they use follows from it."""

    architecture: Architecture = "mla"
    weights: bool = True
    lanes: tuple[Heads, ...] = HALVES
    mode: Mode = "random"
    copies: int = 1
    lease_entries: int = 0
    serves: bool = False
    slow: bool = False


def whole_layout(play: Play) -> Layout:
    index = IndexLayout(heads=3, head_dim=8, rope_dim=4, pairing="half", top_k=TOP_K)
    if play.architecture == "mla":
        return mla(
            name="mla",
            heads=HEADS,
            latent=12,
            rope=4,
            nope=6,
            value=10,
            softmax_scale=0.4,
            codec="fp64",
            index=index,
            index_codec="fp32",
        )
    layout = mlra(4 if play.architecture == "mlra-4" else 2, heads=HEADS, codec="fp64")
    return replace(layout, index=index)


def config_of(play: Play, layout: Layout) -> RuntimeConfig:
    return RuntimeConfig(
        model=uniform_model(layout, 1),
        max_blocks=12,
        block_tokens=B,
        corpus_slots=48 * play.copies,
        private_blocks=2,
        request_blocks=2,
        placement=Placement(policy="block-cyclic", run=1, copies=play.copies),
        lease_entries=play.lease_entries,
        mode=play.mode,
        fabric=slow_fabric() if play.slow else load_profile("loopback"),
        dtype=torch.float64,
        deadline_s=10.0,
    )


def slow_fabric() -> FabricProfile:
    """A megabyte per second: whoever sends less is faster."""
    profile = load_profile("loopback")
    slow = replace(
        profile.path, push_bytes_per_s=1e6, egress_bytes_per_s=1e6, ingress_bytes_per_s=1e6
    )
    return replace(profile, path=slow)
