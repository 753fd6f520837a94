"""A runtime with two documents at position 10, to be attached elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qroam.partition.presets import named_layout, uniform_model, with_codec
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport

B, DI, HI = 4, 32, 4


LAYOUT = with_codec(named_layout("mla-tiny"), "fp64", "fp64")


H, D = LAYOUT.heads, LAYOUT.key_dim


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**changes: Any) -> RuntimeConfig:
    sizes: dict[str, Any] = {
        "model": uniform_model(LAYOUT, 2),
        "max_blocks": 8,
        "block_tokens": B,
        "private_blocks": 4,
        "request_blocks": 4,
        "dtype": torch.float64,
        "deadline_s": 10.0,
    }
    return RuntimeConfig(**(sizes | changes))


def opened(transport: Transport | None = None, **changes: Any) -> Runtime:
    """A runtime with documents a and b of two blocks, both at position 10."""
    runtime = Runtime.open(config(**changes), transport)
    for seed, name in enumerate("ab"):
        runtime.add_document(name, tokens=2 * B, position=10)
        for layer, layout in enumerate(runtime.config.model.layers):
            keys = numbers(2 * B, DI, seed=9 + seed) if layout.index else None
            runtime.load_document(name, layer, numbers(2 * B, D, seed=seed), keys)
    return runtime
