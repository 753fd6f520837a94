"""Pack rows from scattered places: launcher and kernel. The definition is `rows[index]`.

Letters: S rows stored, N rows listed. A row is an entry (1152, 656 or 132 bytes), a whole block of
64 entries, or the H heads of a query. The copy is cut into words of 16 bytes, not into rows, so that
every thread has one (or four) in flight whatever the width of a row: 656 bytes are 41 words.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_ids, check_tensor

_WARPS = 4
# Up to as many words as an H100 or H200 holds threads, each is in flight at once; a longer copy
# needs four a thread to cover DRAM's latency at full rate.
_ONE_WAVE = 132 * 2048


@triton.jit
def _gather_kernel(
    rows_ptr, index_ptr, count_ptr, out_ptr, capacity, rows_stride, out_stride,
    WORDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE words of WIDTH int32; a row has WORDS of them, and strides count words."""
    word = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, column = word // WORDS, word % WORDS
    # The index is read before the count is known: it is there up to the capacity.
    source = tl.load(index_ptr + row, mask=row < capacity, other=-1)
    if count_ptr is not None:
        source = tl.where(row < tl.load(count_ptr), source, -1)
    live = (source >= 0)[:, None]
    parts = tl.arange(0, WIDTH)[None, :]
    at = (source.to(tl.int64) * rows_stride + column)[:, None] * WIDTH + parts
    to = (row.to(tl.int64) * out_stride + column)[:, None] * WIDTH + parts
    tl.store(out_ptr + to, tl.load(rows_ptr + at, mask=live), mask=live)


def gather(
    rows: Tensor,
    index: Tensor,
    *,
    count: Tensor | None = None,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Copy rows[index[i]] to out[i].

    Args:
        rows: (S, ...) of any dtype; a row is contiguous and a multiple of 4 bytes long. Multiples of
            16 bytes, also from row to row, are copied four times as fast.
        index: (N,) int32, below S; where it is negative, `out` is left as it was.
        count: (1,) int32, how many of the N are in use; what lies behind may hold anything.
        out: (N, ...) like `rows`; distances from row to row may differ.
        checked: read `index` back and refuse what is out of range.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    check_tensor(index, "index", (None,), torch.int32, rows.device)
    check_tensor(count, "count", (1,), torch.int32, rows.device)
    shape = (len(index), *rows.shape[1:])
    if out is None:
        out = rows.new_empty(shape)
    if out.shape != shape or out.dtype != rows.dtype:
        raise ValueError(f"out must be {shape} {rows.dtype}, got {tuple(out.shape)} {out.dtype}")
    if out.device != rows.device:
        raise ValueError(f"out must be on {rows.device}, got {out.device}")
    if checked:
        check_ids(index, "index", len(rows), count=count)
    if len(index) == 0:
        return out
    words_in, words_out = _as_int32("rows", rows), _as_int32("out", out)
    aligned = all(
        step % 4 == 0
        for words in (words_in, words_out)
        for step in (words.shape[1], words.stride(0), words.data_ptr() // 4)
    )
    width = 4 if aligned else 1
    words = words_in.shape[1] // width
    if len(index) * words >= 2**31:
        raise ValueError(f"{len(index)} rows of {words * width * 4} bytes are too many for a call")
    tile = 32 * _WARPS * (1 if len(index) * words <= _ONE_WAVE else 4)
    _gather_kernel[(triton.cdiv(len(index) * words, tile),)](
        words_in, index, count, words_out,
        len(index), words_in.stride(0) // width, words_out.stride(0) // width,
        WORDS=words, WIDTH=width, TILE=tile, num_warps=_WARPS,
    )  # fmt: skip
    return out


def _as_int32(name: str, rows: Tensor) -> Tensor:
    """Rows of any dtype as (S, words) int32, a view."""
    row_bytes = rows[0].numel() * rows.element_size() if len(rows) else 0
    if rows.dim() < 2 or row_bytes == 0 or row_bytes % 4:
        raise ValueError(
            f"{name} must be (S, ...) with rows of a positive multiple of 4 bytes, "
            f"got {tuple(rows.shape)} {rows.dtype}"
        )
    distance = rows.stride(0) * rows.element_size()
    if not rows[0].is_contiguous() or distance % 4 or rows.data_ptr() % 4:
        raise ValueError(
            f"{name}: rows must be contiguous and begin at multiples of 4 bytes, "
            f"got strides {rows.stride()} of {rows.dtype}"
        )
    if len(rows) == 1:
        return rows.reshape(1, -1).view(torch.int32)
    flat = rows.as_strided((len(rows), rows[0].numel()), (rows.stride(0), 1))
    return flat.view(torch.int32)
