"""What a runtime with its entries on GPUs does not do (yet): refused at the door, in plain words.

Nothing here needs a GPU, or Triton, to be imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, get_args

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
from ..cost.predicate import Mode

if TYPE_CHECKING:
    from ..config import RuntimeConfig
    from ..cpu.step import Selection

Device = Literal["cpu", "cuda"]
GpuMode = Literal["auto", "always-route", "always-fetch"]
GPU_MODES: tuple[GpuMode, ...] = get_args(GpuMode)
_PACKAGES = {"triton": "triton", "cuda.bindings": "cuda-bindings", "nvshmem": "nvshmem4py-cu13"}


def check_config(config: RuntimeConfig) -> None:
    """Raise ValueError for a config with device "cuda" that the step on GPUs does not serve."""
    layouts, where = config.model.layers, "on GPUs"
    if config.num_branches != 1:
        raise ValueError(f"{where} a layer has one branch, got {config.num_branches}")
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
    if codec not in DTYPES or config.dtype != DTYPES[codec]:
        allowed = ", ".join(f"{name} with {dtype}" for name, dtype in DTYPES.items())
        raise ValueError(f"{where} codec and dtype are {allowed}; got {codec} with {config.dtype}")
    widths = ((FP8_LATENT,), (FP8_ROPE,)) if codec == "fp8_v32" else (LATENTS, ROPES)
    if value not in widths[0] or key - value not in widths[1] or key != entry or heads > MAX_HEADS:
        raise ValueError(
            f"{where} entries of {codec} have {widths[0]} value columns, all of them key columns, "
            f"{widths[1]} more key columns and at most {MAX_HEADS} heads; got {value} and {key} of "
            f"{entry}, and {heads} heads"
        )
    for name, most in (("max_queries", MAX_QUERIES), ("max_units", MAX_UNITS)):
        if getattr(config, name) > most:
            raise ValueError(f"{name} is at most {most} {where}, got {getattr(config, name)}")
    leased, block_tokens = config.lease_entries, config.block_tokens
    if leased % block_tokens:
        raise ValueError(
            f"lease_entries must be a multiple of block_tokens={block_tokens} {where}, where whole "
            f"blocks are leased; got {leased}"
        )
    if leased and config.max_queries * config.max_units < block_tokens:
        raise ValueError(
            f"leases come as a step's entries do {where}: max_queries * max_units must be at least "
            f"block_tokens={block_tokens}, got {config.max_queries} * {config.max_units}"
        )
    if config.mode not in GPU_MODES:
        raise ValueError(f"mode is one of {', '.join(GPU_MODES)} {where}, got {config.mode!r}")


def check_machine(world_size: int) -> torch.device:
    """The GPU that this process uses. Raises: ValueError if it has none, or a package is missing."""
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, and torch finds no CUDA device here")
    needed = [module for module in _PACKAGES if world_size > 1 or module != "nvshmem"]
    missing = [_PACKAGES[module] for module in needed if not _is_there(module)]
    if missing:
        raise ValueError(f"device 'cuda' needs {', '.join(missing)}: pip install 'qroam[gpu]'")
    return torch.device("cuda", torch.cuda.current_device())


def check_on_cpu(config: RuntimeConfig, what: str) -> None:
    """Raise RuntimeError if entries are on GPUs, where a runtime cannot do this."""
    if config.device != "cpu":
        raise RuntimeError(
            f"a runtime with its entries on GPUs cannot {what}: snapshot, and restore into a new one"
        )


def check_step(config: RuntimeConfig, selection: Selection, mode: Mode) -> None:
    """Raise ValueError for an `attend` that the step on GPUs does not do."""
    queries, listed = len(selection.ids), selection.ids.shape[-1]
    if queries > config.max_queries or listed > config.max_units:
        raise ValueError(
            f"max_queries={config.max_queries} and max_units={config.max_units} bound a step on "
            f"GPUs, got {queries} queries of {listed} units"
        )
    if selection.unit_tokens != 1:
        raise ValueError(f"on GPUs a unit is one entry, got units of {selection.unit_tokens}")
    if selection.scope.offsets is not None:
        raise ValueError(
            "on GPUs documents are attended to at their own positions; `lease` moves one elsewhere"
        )
    if mode not in GPU_MODES:
        raise ValueError(f"mode is one of {', '.join(GPU_MODES)} on GPUs, got {mode!r}")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
