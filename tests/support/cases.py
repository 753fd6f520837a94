"""One random world, played rank by rank and compared with dense attention at every step.

A `Case` is a handful of facts; everything else follows from its seed, so that every rank plays its
part of the same script: documents are loaded whole, or prefilled chunk by chunk on changing ranks;
then requests come, grow, ask and go. Letters: Q queries, G branches, I entry ids, K units.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import torch

from qroam.partition.layout import (
    Branch,
    IndexLayout,
    Layout,
    Projection,
    Role,
    Rope,
    Stream,
    Yarn,
)
from qroam.partition.placement import Placement, PlacementPolicy
from qroam.partition.presets import mla, mlra, uniform_model
from qroam.runtime.config import IndexPlacement, RuntimeConfig
from qroam.runtime.cost.predicate import Mode
from qroam.runtime.cost.profile import PROFILE_NAMES, load_profile

Architecture = Literal["mla", "mlra-2", "mlra-4", "mixed"]
Picks = Literal["random", "all", "one-holder", "none", "select"]

# The dtype of queries and outputs, and the codec of entries.
STORAGE = {
    "fp64": (torch.float64, "fp64"),
    "fp32": (torch.float32, "fp32"),
    "bf16": (torch.bfloat16, "bf16"),
    "fp8-fp64": (torch.float64, "fp8_v32"),
    "fp8-fp32": (torch.float32, "fp8_v32"),
}
REQUESTS, REQUEST_BLOCKS = 6, 3
_STREAMS: tuple[tuple[tuple[Role, int], ...], ...] = (
    (("v", 3), ("kv", 5), ("k", 4)),
    (("v", 4), ("k", 6)),
    (("kv", 5), ("k", 2)),
    (("kv", 6),),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is drawn.

    `documents`: tokens of each; the last `prefilled` are prefilled in chunks of `chunk`. `queries`:
    of each rank per step, besides those of its requests. `stranger` is the document that nobody
    attaches, `perturbed` one that is given other contents. With `offsets` documents are attached
    away from their own positions too, and some are leased by requests.
    """

    seed: int
    world: int = 3
    architecture: Architecture = "mla"
    heads: int = 2
    storage: str = "fp64"
    weights: bool = True
    layers: int = 1
    block_tokens: int = 8
    documents: tuple[int, ...] = (40, 21, 16)
    prefilled: int = 0
    chunk: int = 11
    policy: PlacementPolicy = "block-cyclic"
    run: int = 1
    copies: int = 1
    index_placement: IndexPlacement = "with-blocks"
    mode: Mode = "random"
    lease_entries: int = 0
    reuse: float = 1.0
    picks: Picks = "random"
    unit_tokens: int = 1
    per_branch: bool = False
    sink: bool = False
    steps: int = 2
    repeats: int = 1
    queries: tuple[int, ...] = (3, 2, 0, 5)
    requests: int = 2
    stranger: int | None = None
    perturbed: int | None = None
    offsets: bool = False


def make_layout(case: Case) -> Layout:
    """The case's architecture in small and odd sizes, with an indexer if the case selects by one."""
    rng = random.Random(case.seed)
    codec = STORAGE[case.storage][1]
    index = IndexLayout(heads=2, head_dim=8, rope_dim=4, pairing="half", top_k=rng.randint(1, 30))
    index_or_none = index if case.picks == "select" else None
    index_codec = rng.choice(("fp32", "fp8_index"))
    match case.architecture:
        case "mla":
            return mla(
                name="mla",
                heads=case.heads,
                latent=128 if codec == "fp8_v32" else rng.choice((7, 12)),
                rope=rng.choice((2, 4)),
                nope=5,
                value=6,
                softmax_scale=0.4,
                codec=codec,
                index=index_or_none,
                index_codec=index_codec,
            )
        case "mlra-2" | "mlra-4":
            layout = mlra(2, heads=2 * case.heads) if case.architecture == "mlra-2" else None
            layout = layout or mlra(4, heads=case.heads)
            return replace(layout, codec=codec, index=index_or_none, index_codec=index_codec)
        case "mixed":
            return _mixed(rng, case, index_or_none)


def _scaled(layout: Layout, seed: int) -> Layout:
    """The layer with YaRN's frequencies, every other time."""
    rng = random.Random(f"{seed} yarn")
    if layout.rope is None or rng.random() < 0.5:
        return layout
    yarn = Yarn(factor=rng.choice((4.0, 40.0)), original_positions=rng.choice((16, 4096)))
    return replace(layout, rope=replace(layout.rope, yarn=yarn))


def _mixed(rng: random.Random, case: Case, index: IndexLayout | None) -> Layout:
    """A made-up layout: value-only, tied and key-only streams, overlapping heads, odd weights."""
    dims, branches = rng.choice(_STREAMS), rng.choice((2, 3))
    streams = tuple(Stream(name=role, dim=dim, role=role) for role, dim in dims)
    stride = rng.randint(0, case.heads)
    return Layout(
        name="mixed",
        heads=(branches - 1) * stride + case.heads,
        branches=tuple(
            Branch(
                name=f"b{b}",
                streams=streams,
                head_start=b * stride,
                heads=case.heads,
                weight=rng.uniform(-1.5, 1.5),
            )
            for b in range(branches)
        ),
        softmax_scale=0.3,
        codec=STORAGE[case.storage][1],
        rope=rng.choice((None, Rope(dim=2, pairing="half"))),
        projection=Projection(nope_dim=3, out_dim=4) if case.weights else None,
        index=index,
    )


def make_config(case: Case) -> RuntimeConfig:
    rng = random.Random(case.seed)
    layout = make_layout(case)
    layout = _scaled(layout, case.seed) if case.offsets else layout
    blocks = sum(-(-tokens // case.block_tokens) for tokens in case.documents) + 1
    blocks += blocks % 2  # units of two blocks fill the corpus
    return RuntimeConfig(
        model=uniform_model(layout, case.layers),
        max_blocks=blocks,
        block_tokens=case.block_tokens,
        corpus_slots=blocks * layout.num_branches,
        private_blocks=REQUESTS,
        request_blocks=REQUEST_BLOCKS,
        placement=Placement(policy=case.policy, run=case.run, copies=case.copies),
        index_placement=case.index_placement,
        lease_entries=case.lease_entries,
        mode=case.mode,
        seed=case.seed,
        reuse=case.reuse,
        fabric=load_profile(rng.choice(PROFILE_NAMES)),
        dtype=STORAGE[case.storage][0],
        workspace_bytes=rng.choice((1 << 13, 32 << 20)),
        checked=rng.random() < 0.8,
    )


def generator_of(*facts: object) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(repr(facts).encode()))
    return generator
