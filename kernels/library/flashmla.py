"""Partial attention over 656-byte rows through FlashMLA's sparse decode kernel for Hopper:
`flash_mla`, or SGLang's build of it.

Letters: M rows, H heads, S stored entries, E list columns, U entries of a unit.

Its LSE is natural, but +inf for an empty row; it becomes -inf here and nowhere else. Its kernel for
bf16 rows is not used: its source states natural log, a build of it answered in base 2.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LIBRARIES = ("flash_mla", "sgl_kernel.flash_mla")
_HEADS = (64, 128)
_LATENT, _ROPE, _FP8_ROW_BYTES = 512, 64, 656
_PAGE = 64
_WIDTH = 64  # a list is a multiple of this wide


def new_schedule() -> Any:
    """A schedule of the sparse decode kernel, made by the first call that gets it.

    Later calls of the same shapes may reuse it: it depends on nothing else.
    Raises: RuntimeError if FlashMLA cannot be imported.
    """
    return _library().get_mla_metadata()[0]


def attend(
    query: Tensor,
    entries: Tensor,
    units: Tensor,
    *,
    value_dim: int,
    scale: float,
    unit_tokens: int = 1,
    lengths: Tensor | None = None,
    schedule: Any | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend.attend` without tables, coverage or a device-side number of rows.

    Args:
        query: (M, H, 576) bf16, contiguous. entries: (S, 656) uint8, S a multiple of 64, contiguous.
        units: (M, E) int32, the first entry of each unit, -1 padding anywhere.
        lengths: (M,) int32, list columns in use. schedule: from `new_schedule`.
    Returns:
        out (M, H, 512) bf16, lse (M, H) fp32, natural log; (0, -inf) if empty.
    Raises:
        ValueError: if shapes or dtypes do not fit together.
        RuntimeError: if FlashMLA is missing or has no kernel for this shape or device.
    """
    _check(query, entries, units, value_dim)
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] != 9:
        raise RuntimeError(f"FlashMLA's sparse kernels here need Hopper, got {query.device}")
    lists = _entry_lists(units, unit_tokens, lengths)
    out, lse = run(query, entries, lists, scale=scale, schedule=schedule)
    return out, torch.where(lse == torch.inf, -torch.inf, lse)


def run(
    query: Tensor, entries: Tensor, lists: Tensor, *, scale: float, schedule: Any | None = None
) -> tuple[Tensor, Tensor]:
    """FlashMLA's kernel alone, unchecked; its LSE is +inf for an empty row.

    Args: lists: (M, L) int32 entries, -1 padding; L a multiple of 64.
    """
    out, lse = _library().flash_mla_with_kvcache(
        query[:, None],
        entries.view(-1, _PAGE, 1, _FP8_ROW_BYTES),
        None,
        None,
        head_dim_v=_LATENT,
        tile_scheduler_metadata=new_schedule() if schedule is None else schedule,
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=lists[:, None],
    )
    return out[:, 0], lse[..., 0]


def _entry_lists(units: Tensor, unit_tokens: int, lengths: Tensor | None) -> Tensor:
    """(M, L) int32 entries, -1 padded to a width that the kernel takes."""
    if lengths is not None:
        columns = torch.arange(units.shape[1], dtype=torch.int32, device=units.device)
        units = torch.where(columns < lengths[:, None], units, -1)
    if unit_tokens > 1:
        steps = torch.arange(unit_tokens, dtype=torch.int32, device=units.device)
        units = torch.where(units[..., None] >= 0, units[..., None] + steps, -1).flatten(1)
    width = max(-(-units.shape[1] // _WIDTH), 1) * _WIDTH
    return F.pad(units, (0, width - units.shape[1]), value=-1)


def _check(query: Tensor, entries: Tensor, units: Tensor, value_dim: int) -> None:
    if units.dtype != torch.int32 or units.dim() != 2 or len(units) != len(query):
        raise ValueError(
            f"units must be ({len(query)}, E) int32, got {tuple(units.shape)} {units.dtype}"
        )
    if not query.is_contiguous() or not entries.is_contiguous():
        raise ValueError("query and entries must be contiguous")
    dim = _LATENT + _ROPE
    if query.dim() != 3 or query.shape[1] not in _HEADS or query.shape[2] != dim:
        raise RuntimeError(
            f"FlashMLA needs {_HEADS} heads of {dim} columns, got query {tuple(query.shape)}"
        )
    if value_dim != _LATENT or query.dtype != torch.bfloat16:
        raise RuntimeError(
            f"FlashMLA needs {_LATENT} value columns and bfloat16 queries, "
            f"got {value_dim} and {query.dtype}"
        )
    rows_fit = entries.shape[1:] == (_FP8_ROW_BYTES,) and entries.dtype == torch.uint8
    if not rows_fit or len(entries) % _PAGE:
        raise RuntimeError(
            f"FlashMLA needs a multiple of {_PAGE} uint8 rows of {_FP8_ROW_BYTES} bytes, "
            f"got {tuple(entries.shape)} {entries.dtype}"
        )


def _library() -> Any:
    reasons = []
    for name in _LIBRARIES:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:
            reasons.append(f"{name}: {error}")
    raise RuntimeError(f"FlashMLA cannot be imported: {'; '.join(reasons)}")
