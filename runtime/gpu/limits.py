"""What a runtime with its entries on GPUs does not do yet: refused when a config is made, or opened.

Nothing here needs a GPU, or Triton, to be imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, get_args

import torch

from ...kernels.limits import (
    DTYPES,
    FP8_LATENT,
    FP8_ROPE,
    LATENTS,
    MAX_HEADS,
    MAX_QUERIES,
    MAX_UNITS,
    ROPES,
)
from ...partition.layout import ModelLayout

Device = Literal["cpu", "cuda"]
GpuMode = Literal["auto", "always-route", "always-fetch"]
GPU_MODES: tuple[GpuMode, ...] = get_args(GpuMode)
_PACKAGES = {"triton": "triton", "cuda.bindings": "cuda-bindings", "nvshmem": "nvshmem4py-cu13"}


def check_config(
    model: ModelLayout,
    dtype: torch.dtype,
    *,
    max_queries: int,
    max_units: int,
    lease_entries: int,
    block_tokens: int,
    mode: str,
) -> None:
    """Raise ValueError for a config with device "cuda" that the step on GPUs does not serve."""
    layouts, where = model.layers, "on GPUs"
    if model.num_branches != 1:
        raise ValueError(f"{where} a layer has one branch, got {model.num_branches}")
    shapes = {
        (layout.codec, layout.heads, layout.entry_dim, layout.key_dim, layout.value_dim)
        for layout in layouts
    }
    if len(shapes) != 1:
        raise ValueError(
            f"{where} all layers must have the same (codec, heads, entry, key and value columns), "
            f"got {sorted(shapes)}"
        )
    ((codec, heads, entry, key, value),) = shapes
    if codec not in DTYPES or dtype != DTYPES[codec]:
        allowed = ", ".join(f"{name} with {dtype}" for name, dtype in DTYPES.items())
        raise ValueError(f"{where} codec and dtype are {allowed}; got {codec} with {dtype}")
    widths = ((FP8_LATENT,), (FP8_ROPE,)) if codec == "fp8_v32" else (LATENTS, ROPES)
    if value not in widths[0] or key - value not in widths[1] or key != entry or heads > MAX_HEADS:
        raise ValueError(
            f"{where} entries of {codec} have {widths[0]} value columns, all of them key columns, "
            f"{widths[1]} more key columns and at most {MAX_HEADS} heads; got {value} and {key} of "
            f"{entry}, and {heads} heads"
        )
    for name, size, most in (
        ("max_queries", max_queries, MAX_QUERIES),
        ("max_units", max_units, MAX_UNITS),
    ):
        if size > most:
            raise ValueError(f"{name} is at most {most} {where}, got {size}")
    if lease_entries % block_tokens:
        raise ValueError(
            f"lease_entries must be a multiple of block_tokens={block_tokens} {where}, where whole "
            f"blocks are leased; got {lease_entries}"
        )
    if lease_entries and max_queries * max_units < block_tokens:
        raise ValueError(
            f"leases come as a step's entries do {where}: max_queries * max_units must be at least "
            f"block_tokens={block_tokens}, got {max_queries} * {max_units}"
        )
    if mode not in GPU_MODES:
        raise ValueError(f"mode is one of {', '.join(GPU_MODES)} {where}, got {mode!r}")


def check_machine(world_size: int) -> torch.device:
    """The GPU that this process uses. Raises: ValueError if it has none, or a package is missing."""
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, and torch finds no CUDA device here")
    needed = [module for module in _PACKAGES if world_size > 1 or module != "nvshmem"]
    missing = [_PACKAGES[module] for module in needed if not _is_there(module)]
    if missing:
        raise ValueError(f"device 'cuda' needs {', '.join(missing)}: pip install 'qroam[gpu]'")
    return torch.device("cuda", torch.cuda.current_device())


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
