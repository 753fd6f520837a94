"""Partial attention through FlashInfer's paged MLA kernels, `fa3` (Hopper) or `fa2`.

Letters: M rows, H heads, C value (latent) columns, R rope columns, S stored entries, E list
columns, U entries of a unit, T entries of a page, L pages of all rows together.

FlashInfer schedules on the host: the number of entries of every row must be known there, its lists
have no holes, and a plan holds for these lengths only. It would return LSE in base 2; it is asked
for the natural log here and nowhere else. An empty row is `out = 0, lse = -inf` there as well.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["fa3", "fa2"]

_WORKSPACE_BYTES = 128 << 20
_LATENT, _ROPE = 512, 64


class FlashInferAttend:
    """FlashInfer's kernel for a fixed number of rows, scheduled on the host by `plan`.

    pages: (L,) int32 on the device, the pages of row after row without holes; filled by the caller
    before `run`. Page p holds entries p * T .. p * T + T - 1.
    """

    def __init__(
        self,
        *,
        rows: int,
        num_pages: int,
        num_heads: int,
        value_dim: int,
        rope_dim: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device | str,
        backend: Backend = "fa3",
        page_tokens: int = 1,
        workspace: Tensor | None = None,
    ) -> None:
        """Allocate for at least one row and `num_pages` pages of all rows.

        Args: workspace: (bytes,) uint8, 128 MiB; may be shared by wrappers that never run at the same time.
        Raises: RuntimeError if FlashInfer is missing or has no kernel for this shape or device.
        """
        device = torch.device(device)
        wrapper = _require(value_dim, rope_dim, dtype, device, backend)
        if workspace is None:
            workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.pages = torch.zeros(max(num_pages, 1), dtype=torch.int32, device=device)
        self._query_shape = (rows, num_heads, value_dim + rope_dim)
        self._value_dim, self._page_tokens = value_dim, page_tokens
        self._scale, self._dtype = scale, dtype
        self._wrapper = wrapper(
            workspace,
            use_cuda_graph=True,  # every run reads these very tensors
            qo_indptr=torch.empty(rows + 1, dtype=torch.int32, device=device),
            kv_indptr=torch.empty(rows + 1, dtype=torch.int32, device=device),
            kv_indices=self.pages,
            kv_len_arr=torch.empty(rows, dtype=torch.int32, device=device),
            backend=backend,
        )

    def plan(self, lengths: Sequence[int]) -> None:
        """Schedule rows of these numbers of entries; later runs and replays keep to it.

        Raises: ValueError if they are not one for each row, or need more than the pages there are.
        """
        rows, num_heads, dim = self._query_shape
        entries = torch.tensor(lengths, dtype=torch.int32)
        ends = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        ends[1:] = (-(-entries // self._page_tokens)).cumsum(0)
        if len(lengths) != rows or int(ends[-1]) > len(self.pages):
            raise ValueError(
                f"planned for {rows} rows of together {len(self.pages)} pages, "
                f"got {len(lengths)} rows of {int(ends[-1])}"
            )
        self._wrapper.plan(
            torch.arange(rows + 1, dtype=torch.int32),
            ends,
            self.pages[:0],  # they are in place
            entries,
            num_heads,
            self._value_dim,
            dim - self._value_dim,
            self._page_tokens,
            False,  # not causal
            self._scale,
            self._dtype,
            self._dtype,
        )

    def run(
        self,
        query: Tensor,
        entries: Tensor,
        *,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend over `pages`, whose values are not checked; may be captured.

        Args:
            query: (M, H, C + R). entries: (S, C + R), S a multiple of the page.
        Returns:
            out (M, H, C) in the query's dtype and lse (M, H) fp32, natural log.
        Raises:
            ValueError: on other shapes or dtypes than it was made for.
        """
        dim = self._query_shape[2]
        fits = query.shape == self._query_shape and entries.shape[1:] == (dim,)
        if not fits or len(entries) % self._page_tokens:
            raise ValueError(
                f"needs query {self._query_shape} and entries (S, {dim}), S a multiple of "
                f"{self._page_tokens}, got {tuple(query.shape)} and {tuple(entries.shape)}"
            )
        if {query.dtype, entries.dtype} != {self._dtype}:
            raise ValueError(f"needs {self._dtype}, got {query.dtype} and {entries.dtype}")
        out, lse = self.launch(query, entries, out=out, lse=lse)
        return out, lse.mul_(math.log(2.0))

    def launch(
        self, query: Tensor, entries: Tensor, *, out: Tensor | None, lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """FlashInfer's kernel alone, unchecked; its LSE is in base 2."""
        stored = entries.view(-1, self._page_tokens, self._query_shape[2])
        found: tuple[Tensor, Tensor] = self._wrapper.run(
            query[..., : self._value_dim],
            query[..., self._value_dim :],
            stored[..., : self._value_dim],
            stored[..., self._value_dim :],
            out=out,
            lse=lse,
            return_lse=True,
        )
        return found


def attend(
    query: Tensor,
    entries: Tensor,
    units: Tensor,
    lengths: Sequence[int],
    *,
    value_dim: int,
    scale: float,
    unit_tokens: int = 1,
    backend: Backend = "fa3",
) -> tuple[Tensor, Tensor]:
    """`attend.attend` without tables, coverage or device-side counts; plans anew on every call.

    Args:
        query: (M, H, C + R) bf16 or fp16, contiguous. entries: (S, C + R) of the same dtype.
        units: (M, E) int32, the first entry of each unit, -1 padding anywhere.
        lengths: how many units each row lists, padding not counted.
    Returns:
        out (M, H, C) in the query's dtype, lse (M, H) fp32, natural log; (0, -inf) if empty.
    Raises:
        ValueError: if shapes or dtypes do not fit, or `lengths` are not those of `units`.
        RuntimeError: if FlashInfer is missing or has no kernel for this shape or device.
    """
    if query.dim() != 3 or query.shape[2] < value_dim or not query.is_contiguous():
        raise ValueError(
            f"query must be (M, H, C + R) with C = {value_dim}, contiguous, "
            f"got {tuple(query.shape)} with strides {query.stride()}"
        )
    if units.dtype != torch.int32 or units.dim() != 2 or len(units) != len(query):
        raise ValueError(
            f"units must be ({len(query)}, E) int32, got {tuple(units.shape)} {units.dtype}"
        )
    if entries.dtype == torch.uint8:
        raise RuntimeError("FlashInfer has no kernel for fp8 rows with their scales inside")
    listed = (units >= 0).sum(1).tolist()
    if listed != list(lengths):
        raise ValueError(f"lengths must be those of units, {listed}, got {list(lengths)}")
    first = units[units >= 0]  # row after row
    steps = torch.arange(unit_tokens, dtype=torch.int32, device=units.device)
    planned = FlashInferAttend(
        rows=len(units),
        num_pages=len(first) * unit_tokens,
        num_heads=query.shape[1],
        value_dim=value_dim,
        rope_dim=query.shape[2] - value_dim,
        scale=scale,
        dtype=query.dtype,
        device=query.device,
        backend=backend,
    )
    planned.plan([unit_tokens * number for number in listed])
    planned.pages[: len(first) * unit_tokens] = (first[:, None] + steps).flatten()
    return planned.run(query, entries)


def _require(
    value_dim: int, rope_dim: int, dtype: torch.dtype, device: torch.device, backend: str
) -> Any:
    """FlashInfer's wrapper class, or a RuntimeError with the reason why it cannot serve this."""
    try:
        library = importlib.import_module("flashinfer.mla")
    except ImportError as error:
        raise RuntimeError(f"FlashInfer cannot be imported: {error}") from error
    if (value_dim, rope_dim) != (_LATENT, _ROPE):
        raise RuntimeError(
            f"FlashInfer is used with {_LATENT} value and {_ROPE} rope columns, "
            f"got {value_dim} and {rope_dim}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"FlashInfer needs bfloat16 or float16, got {dtype}")
    capability = _capability(device)
    if capability < (8, 0) or (backend == "fa3" and capability[0] != 9):
        raise RuntimeError(f"FlashInfer's {backend} does not run on {device} ({capability})")
    return library.BatchMLAPagedAttentionWrapper


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
