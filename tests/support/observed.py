"""A small world in which something happens that counters, logs and profilers see."""

from __future__ import annotations

import torch

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig

TOKENS = 300


CONFIG = RuntimeConfig(
    model=uniform_model(named_layout("mla-tiny"), 1),
    max_blocks=24,
    block_tokens=16,
    lease_entries=48,
    mode="always-fetch",
    deadline_s=5.0,
)


def prepared(runtime: Runtime) -> None:
    g = torch.Generator().manual_seed(1)
    runtime.add_document("d", tokens=TOKENS)
    entries = torch.randn(TOKENS, 80, generator=g)
    runtime.load_document("d", 0, entries, torch.randn(TOKENS, 32, generator=g))


def attend(runtime: Runtime, first: int, count: int = 64) -> None:
    """Three queries over `count` entries of the document, from the `first` on."""
    g = torch.Generator().manual_seed(2)
    ids = torch.arange(first, first + count, dtype=torch.int32).repeat(3, 1)
    scope = runtime.scope(documents=["d"], queries=3)
    runtime.attend(0, torch.randn(3, 4, 80, generator=g), runtime.selection(ids, scope))
