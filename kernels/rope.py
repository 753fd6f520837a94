"""Move cached entries to other positions: launcher and kernel.

Letters: L layers, S stored entries a layer, N listed entries, R rotary columns in R / 2 pairs.
A rotation by position p and one by an offset d make a rotation by p + d, so a leased entry is moved
by rotating its rope key by the offset alone. All layers take part in one launch: the angles of a
tile of entries are computed once and used in several layers.

fp8 index keys are not rotated here: they are quantised after a Hadamard transform, so the rotation
would have to undo and redo both.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_ids, check_tensor

_WARPS = 4
_PROGRAMS = 132 * 16  # of four warps, what an H100 or H200 holds
_MAX_LAYERS = 16


@triton.jit
def _rotate_kernel(
    rope_ptr, index_ptr, offset_ptr, inv_freq_ptr, count_ptr,
    capacity, num_layers, layers, layer_stride, row_stride, index_stride,
    PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES entries in `layers` layers; the strides of `rope_ptr` count WIDTH columns."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    used = entry < capacity
    pair = tl.arange(0, BLOCK_P)[None, :]
    offset = tl.load(offset_ptr + entry, mask=used, other=0).to(tl.float32)
    inv_freq = tl.load(inv_freq_ptr + pair, mask=pair < PAIRS, other=0.0)
    if count_ptr is not None:
        used &= entry < tl.load(count_ptr)
    angle = offset[:, None] * inv_freq
    cos, sin = tl.cos(angle), tl.sin(angle)
    layer_step = tl.zeros((), tl.int64) + layer_stride
    first = tl.program_id(1) * layers
    for layer in range(first, tl.minimum(first + layers, num_layers)):
        row = tl.load(index_ptr + layer * index_stride + entry, mask=used, other=-1).to(tl.int64)
        live = (row >= 0)[:, None]
        base = rope_ptr + (layer * layer_step + row * row_stride)[:, None] * WIDTH
        if INTERLEAVED:
            column = tl.arange(0, 2 * BLOCK_P)[None, :]
            here = live & (column < 2 * PAIRS)
            x = tl.load(base + column, mask=here, other=0.0).to(tl.float32)
            a, b = tl.split(x.reshape(ENTRIES, BLOCK_P, 2))
            x = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(ENTRIES, 2 * BLOCK_P)
            tl.store(base + column, x.to(rope_ptr.dtype.element_ty), mask=here)
        else:
            here = live & (pair < PAIRS)
            a = tl.load(base + pair, mask=here, other=0.0).to(tl.float32)
            b = tl.load(base + PAIRS + pair, mask=here, other=0.0).to(tl.float32)
            first_half, second_half = a * cos - b * sin, b * cos + a * sin
            tl.store(base + pair, first_half.to(rope_ptr.dtype.element_ty), mask=here)
            tl.store(base + PAIRS + pair, second_half.to(rope_ptr.dtype.element_ty), mask=here)


def inverse_frequencies(dim: int, theta: float, device: torch.device | str) -> Tensor:
    """(dim / 2,) fp32 as models compute them; made once, outside of any step."""
    if dim < 2 or dim % 2 or theta <= 1:
        raise ValueError(f"needs an even rope dim and theta > 1, got {dim} and {theta}")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    return 1.0 / theta**exponents


def rotate(
    rope: Tensor,
    index: Tensor,
    offset: Tensor,
    inv_freq: Tensor,
    *,
    pairing: Literal["interleaved", "half"],
    count: Tensor | None = None,
    checked: bool = False,
) -> None:
    """Rotate the rope keys of listed entries in place, in all layers.

    Angles are offset * inv_freq in fp32, as models compute them. Nothing is scaled.

    Args:
        rope: (L, S, R) bf16 or fp32, a view of the rotary columns; columns contiguous. That is
            `rows.view(torch.bfloat16)[..., -R:]` of bf16 entries and of 656-byte rows alike.
        index: (N,) int32, or (L, N) where an entry has another place in every layer; distinct in a
            layer and below S; negative: not there.
        offset: (N,) int32, by how many positions each entry moves.
        inv_freq: (R / 2,) fp32, of `inverse_frequencies`, or scaled (YaRN).
        pairing: "interleaved" rotates columns (2i, 2i + 1) together, "half" (i, i + R / 2).
        count: (1,) int32, how many of the N are in use; what lies behind may hold anything.
        checked: read `index` back and refuse what is out of range.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    if rope.dim() != 3 or rope.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(
            f"rope must be (L, S, R) bf16 or fp32, got {tuple(rope.shape)} {rope.dtype}"
        )
    num_layers, _, dim = rope.shape
    if dim < 2 or dim % 2 or rope.stride(2) != 1:
        raise ValueError(
            f"rope needs an even number of contiguous columns, got {tuple(rope.shape)} "
            f"with strides {rope.stride()}"
        )
    if pairing not in ("interleaved", "half"):
        raise ValueError(f"pairing must be interleaved or half, got {pairing!r}")
    num = offset.numel()
    per_layer = index.dim() == 2
    check_tensor(offset, "offset", (num,), torch.int32, rope.device)
    check_tensor(
        index, "index", (num_layers, num) if per_layer else (num,), torch.int32, rope.device
    )
    check_tensor(inv_freq, "inv_freq", (dim // 2,), torch.float32, rope.device)
    check_tensor(count, "count", (1,), torch.int32, rope.device)
    if checked:
        check_ids(index, "index", rope.shape[1], count=count)
    if num == 0 or num_layers == 0:
        return

    width = 16 // rope.element_size()
    if any(step % width for step in rope.stride()[:2]) or rope.data_ptr() % 16:
        width = 1
    pairs = triton.next_power_of_2(dim // 2)
    entries = max(_WARPS * 32 * 8 // (2 * pairs), 1)
    tiles = triton.cdiv(num, entries)
    layers = min(max(tiles * num_layers // _PROGRAMS, 1), _MAX_LAYERS)
    _rotate_kernel[(tiles, triton.cdiv(num_layers, layers))](
        rope, index, offset, inv_freq, count,
        num, num_layers, layers, rope.stride(0) // width,
        rope.stride(1) // width, num if per_layer else 0,
        PAIRS=dim // 2, BLOCK_P=pairs, INTERLEAVED=pairing == "interleaved", WIDTH=width,
        ENTRIES=entries, num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
