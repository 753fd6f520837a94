"""Merge partials over disjoint entries into one softmax: launcher and kernel.

Letters: P partials, N items merged into, H heads, C value columns. The definition is
`reference.merge` and `reference.apply_sink`; coverage is compared here too, because after a merge
an absent or doubled holder can no longer be seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_ids, check_tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_MAX_COLUMNS = 2048
_MAX_ITEMS = 65535  # the second dimension of a grid


@triton.jit
def _merge_kernel(
    outs_ptr, lses_ptr, covered_ptr, expected_ptr, offsets_ptr, num_items_ptr, sink_ptr,
    out_ptr, lse_ptr, fault_ptr,
    num_partials, num_heads,
    outs_partial, outs_item, lses_partial, lses_item,
    covered_partial, covered_item, expected_partial, expected_item,
    C: tl.constexpr, BLOCK_C: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One head of one item; the loads of STEP partials are in flight together."""
    head = tl.program_id(0)
    item = tl.program_id(1)
    first = 0
    end = num_partials
    item_in = item.to(tl.int64)  # a list of partials has no such dimension: its strides are 0
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + item)
        end = tl.load(offsets_ptr + item + 1)
    if num_items_ptr is not None and item >= tl.load(num_items_ptr):
        return
    sink = 0.0
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head)

    columns = tl.arange(0, BLOCK_C)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((BLOCK_C,), tl.float32)
    fault = tl.zeros((), tl.int32)
    for start in range(first, end, STEP):
        partial = start + tl.arange(0, STEP)
        used = partial < end
        at = partial.to(tl.int64)
        if expected_ptr is not None:
            covered = covered_ptr + at * covered_partial + item_in * covered_item
            expected = expected_ptr + at * expected_partial + item_in * expected_item
            count = tl.load(covered, used, 0) - tl.load(expected, used, 0)
            mix = tl.load(covered + 1, used, 0) - tl.load(expected + 1, used, 0)
            fault = tl.maximum(fault, tl.max(tl.where((count | mix) != 0, partial + 1, 0), axis=0))
        lse_at = at * lses_partial + item_in * lses_item + head
        lses = tl.load(lses_ptr + lse_at, mask=used, other=-float("inf"))
        row = at * outs_partial + item_in * outs_item + head * C
        # An empty partial is not even read: whatever it holds cannot leak.
        outs = tl.load(
            outs_ptr + row[:, None] + columns[None, :],
            mask=(lses != -float("inf"))[:, None] & (columns < C)[None, :],
            other=0.0,
        )
        # The maximum may skip a NaN; the shares do not.
        new_top = tl.maximum(top, tl.max(lses, axis=0))
        safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
        shares = tl.exp(lses - safe_top)
        decay = tl.exp(top - safe_top)
        total = total * decay + tl.sum(shares, axis=0)
        acc = acc * decay + tl.sum(outs.to(tl.float32) * shares[:, None], axis=0)
        top = new_top

    lse = top + tl.log(total)
    scale = 1.0 / tl.where(total == 0.0, 1.0, total)
    if sink_ptr is not None:
        scale = scale / (1.0 + tl.exp(sink - lse))
    if expected_ptr is not None:
        scale = tl.where(fault > 0, float("nan"), scale)
        lse = tl.where(fault > 0, float("nan"), lse)
        tl.store(fault_ptr + item, fault, mask=head == 0)
    row = item.to(tl.int64) * num_heads + head
    out = (acc * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * C + columns, out, mask=columns < C)
    tl.store(lse_ptr + row, lse)


class _Tiling(NamedTuple):
    block_columns: int
    step: int
    num_warps: int


def _tiling(num_partials: int | None, columns: int, element_size: int) -> _Tiling:
    """A lane keeps 32 bytes of each of `step` partials in flight: 4 KB a warp, 128 KB an SM.

    So a row of 512 bf16 is one warp's. `num_partials` is None for a list of partials, whose
    counts only the device knows.
    """
    step = 4 if num_partials is None else min(4, triton.next_power_of_2(max(num_partials, 1)))
    block_columns = triton.next_power_of_2(columns)
    num_warps = min(max(block_columns * element_size // 1024, 1), 8)
    return _Tiling(block_columns=block_columns, step=step, num_warps=num_warps)


def merge(
    outs: Tensor,
    lses: Tensor,
    *,
    offsets: Tensor | None = None,
    num_items: Tensor | None = None,
    sink: Tensor | None = None,
    covered: Tensor | None = None,
    expected: Tensor | None = None,
    fault: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge each item's partials; an empty partial (lse -inf) may hold anything, NaN stays NaN.

    Args:
        outs: (P, N, H, C) with P partials for every item, or (P, H, C) with `offsets`; bf16, fp16
            or fp32, (H, C) contiguous.
        lses: (P, N, H) or (P, H) fp32, natural log, heads contiguous.
        offsets: (N + 1,) int32; partials offsets[n] .. offsets[n + 1] belong to item n.
        num_items: (1,) int32, how many items are in use; what lies behind is not written.
        sink: (H,) fp32 natural-log logits without a value; scales `out`, leaves `lse`.
        covered, expected: (P, N, 2) or (P, 2) int32, what each partial covers and should cover. An
            item with a difference gets NaN in `out` and `lse`.
        fault: (N,) int32, needed with `expected`: 0, or 1 + the last differing partial of the item.
        out: (N, H, C) bf16, fp16 or fp32, `outs.dtype` by default. lse: (N, H) fp32.
        checked: read `offsets` back and refuse what does not rise from 0 or more to at most P.
    Returns:
        out and lse; an item without entries is 0 and -inf.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    listed = offsets is not None
    if outs.dim() != (3 if listed else 4):
        wanted = "(P, H, C) with offsets" if listed else "(P, N, H, C) without offsets"
        raise ValueError(f"outs must be {wanted}, got {tuple(outs.shape)}")
    num_heads, columns = outs.shape[-2:]
    if not 0 < columns <= _MAX_COLUMNS or num_heads == 0:
        raise ValueError(
            f"outs {tuple(outs.shape)}: needs heads, and 1 to {_MAX_COLUMNS} value columns"
        )
    packed = outs.stride(-1) == 1 and (num_heads == 1 or outs.stride(-2) == columns)
    if outs.dtype not in _FLOATS or not packed:
        raise ValueError(
            f"outs must be bf16, fp16 or fp32 with (H, C) contiguous, "
            f"got {outs.dtype} with strides {outs.stride()}"
        )
    count = outs.shape[1] if offsets is None else max(offsets.numel() - 1, 0)
    if count > _MAX_ITEMS:
        raise ValueError(f"at most {_MAX_ITEMS} items can be merged at once, got {count}")
    if (covered is None) != (expected is None) or (expected is None) != (fault is None):
        raise ValueError("covered, expected and fault go together: give all three or none")
    if out is None:
        out = outs.new_empty(count, num_heads, columns)
    if lse is None:
        lse = torch.empty(count, num_heads, dtype=torch.float32, device=outs.device)
    if out.dtype not in _FLOATS:
        raise ValueError(f"out must be bf16, fp16 or fp32, got {out.dtype}")
    pairs = (*outs.shape[:-2], 2)
    check_tensor(lses, "lses", outs.shape[:-1], torch.float32, outs.device, columns=True)
    check_tensor(offsets, "offsets", (count + 1,), torch.int32, outs.device)
    check_tensor(num_items, "num_items", (1,), torch.int32, outs.device)
    check_tensor(sink, "sink", (num_heads,), torch.float32, outs.device)
    check_tensor(covered, "covered", pairs, torch.int32, outs.device, columns=True)
    check_tensor(expected, "expected", pairs, torch.int32, outs.device, columns=True)
    check_tensor(fault, "fault", (count,), torch.int32, outs.device)
    check_tensor(out, "out", (count, num_heads, columns), out.dtype, outs.device)
    check_tensor(lse, "lse", (count, num_heads), torch.float32, outs.device)
    if checked and offsets is not None:
        used = offsets if num_items is None else offsets[: int(num_items) + 1]
        if bool((used.diff() < 0).any()) or int(used[0]) < 0:
            raise ValueError(f"offsets must rise from 0 or more, got {used.tolist()[:16]} ...")
        check_ids(used, "offsets", len(outs) + 1)
    if count == 0:
        return out, lse

    tiling = _tiling(None if listed else len(outs), columns, outs.element_size())
    strides = [
        (t.stride(0), 0 if listed else t.stride(1)) if t is not None else (0, 0)
        for t in (outs, lses, covered, expected)
    ]
    _merge_kernel[(num_heads, count)](
        outs, lses, covered, expected, offsets, num_items, sink,
        out, lse, fault,
        len(outs), num_heads,
        *(step for pair in strides for step in pair),
        C=columns, BLOCK_C=tiling.block_columns, STEP=tiling.step,
        num_warps=tiling.num_warps, num_stages=1,
    )  # fmt: skip
    return out, lse
