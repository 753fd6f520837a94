"""A corpus spread evenly over two GPUs, in pools that they read from one another, and steps over it."""

from __future__ import annotations

import torch
from gpus import Rank
from torch import Tensor

from qroam.kernels.codec import encode_latent
from qroam.kernels.decide import PriceTable
from qroam.kernels.exchange.layout import Wire, chunk_of
from qroam.kernels.plan import BlockTable
from qroam.kernels.pool_layout import PoolLayout
from qroam.partition.codec import make_codec
from qroam.partition.layout import Form, Layout
from qroam.partition.presets import named_layout
from qroam.runtime import load_profile
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.prices import prices_of
from qroam.runtime.gpu.payload import Weights
from qroam.runtime.gpu.pool import GpuPool
from qroam.runtime.gpu.step import GpuStep
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

HEADS, QUERY, VALUE, ENTRIES, BLOCK = 128, 576, 512, 262144, 64
BF16 = torch.bfloat16
LAYOUT: Layout = named_layout("mla-v3.2")


def wire_of(rows: int, units: int, *, form: Form = "A") -> Wire:
    """Of 128 heads in bf16."""
    query, answer = LAYOUT.routed_dims(form)
    return Wire(
        world_size=2, rows=rows, heads=HEADS, query_words=HEADS * query // 2,
        answer_words=HEADS * answer // 2, units=units, chunk=chunk_of(rows),
    )  # fmt: skip


def map_of(*, entry_bytes: int, staged: int) -> PoolLayout:
    """One layer of it, of which each rank has half."""
    blocks = ENTRIES // BLOCK
    return PoolLayout(
        layers=1, keys=blocks, slots=blocks // 2, block_tokens=BLOCK, entry_bytes=entry_bytes,
        staged=staged,
    )  # fmt: skip


def prices(form: Form = "A") -> PriceTable:
    """Over NVLink, two ranks."""
    facts = LayerFacts.of(LAYOUT, entry_bytes=1152, element_bytes=2)
    model = CostModel(facts=facts, profile=load_profile("nvlink4"))
    return prices_of(model, world=2, forms=(form,), device="cuda")


class Corpus:
    """All entries of one seed, of which each rank's pool has half; blocks in order."""

    def __init__(
        self, here: Rank, memory: Tensor, peers: Tensor, shape: PoolLayout, *, codec: str = "bf16"
    ) -> None:
        generator = torch.Generator(here.device).manual_seed(7)  # the same on both ranks
        self.entries = torch.randn(
            ENTRIES, QUERY, dtype=BF16, device=here.device, generator=generator
        )
        half, blocks = ENTRIES // 2, ENTRIES // BLOCK
        own = slice(here.rank * half, (here.rank + 1) * half)
        self.pool = GpuPool(
            memory, shape, make_codec(codec, dim=QUERY, rope_dim=64), rank=here.rank, peers=peers
        )
        if codec == "fp8_v32":
            encode_latent(self.entries[own], rope_dim=64, out=self.pool.entries(0)[:half])
        else:
            self.pool.entries(0)[:half].copy_(self.entries[own])
        owners = torch.arange(blocks, dtype=torch.int32) // (blocks // 2)
        slots = torch.arange(blocks, dtype=torch.int32) % (blocks // 2)
        slots[owners != here.rank] = -1
        zeros = torch.zeros(blocks, dtype=torch.int32)
        self.pool.slot_of.copy_(slots)
        self.pool.fill.fill_(BLOCK)
        directory = BlockTable.of(
            owners[:, None], zeros, torch.full_like(zeros, BLOCK), slots, rank=here.rank,
            block_tokens=BLOCK, num_branches=1,
        )  # fmt: skip
        self.pool.directory.records.copy_(directory.records)
        torch.cuda.synchronize()


def step_of(
    here: Rank,
    corpus: Corpus,
    transport: SymmetricMemory,
    channel: int,
    rows: int,
    listed: int,
    *,
    weights: Weights | None = None,
) -> GpuStep:
    """Of form A, or with weights of form B."""
    return GpuStep(
        corpus.pool, [LAYOUT], prices=prices("A" if weights is None else "B"),
        ends=transport.ends(channel), rank=here.rank, world_size=2, rows=rows, listed=listed,
        dtype=BF16, weights=weights,
    )  # fmt: skip


def chosen(rows: int, count: int, owner: int, device: torch.device) -> Tensor:
    """(rows, count) int32 distinct entries of the half that a rank has, at random."""
    half = ENTRIES // 2
    lists = [torch.randperm(half, device=device)[:count] for _ in range(rows)]
    return (torch.stack(lists) + owner * half).to(torch.int32)
