"""Entries and index keys as fp8 bytes and back: launchers and kernels.

Letters: N entries, L latent columns, R rope columns, S stored rows or slots, B tokens of a block.
The bytes are those of `LatentFp8Codec` and `IndexFp8Codec` (`partition/codec.py`):

    entry       L e4m3 | L / 128 fp32 scales | R bf16              656 bytes at 512 + 64
    index block B * D e4m3 | B fp32 scales                         132 bytes a key at D = 128

A scale is a power of two, so to multiply by its inverse is exact. 1e-4, the lowest that the codecs
allow of a scale or of an amax, becomes 2**-13 or 2**-22. Nothing is checked on the device: an entry
with NaN or infinities decodes to one with NaN or infinities.
Every launcher can read or write the pool in place, at listed rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_ids, check_tensor

_FLOATS = (torch.bfloat16, torch.float32)
_TILE_COLUMNS = 128  # latent columns of a scale
_TILE = tl.constexpr(_TILE_COLUMNS)
_ENTRIES = 8  # of a program: 128 threads hold 16 bytes of bf16 each per 128 columns
_WARPS = 4


@triton.jit
def _places(index_ptr, count_ptr, capacity, ENTRIES: tl.constexpr):
    """The entries of this program, and the row of the pool of each: -1 where there is none."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    if index_ptr is not None:
        row = tl.load(index_ptr + entry, mask=entry < capacity, other=-1)
    else:
        row = tl.where(entry < capacity, entry, -1)
    if count_ptr is not None:
        row = tl.where(entry < tl.load(count_ptr), row, -1)
    return entry.to(tl.int64), row.to(tl.int64)


@triton.jit
def _scale(amax, LOWEST: tl.constexpr):
    """The least power of two with amax <= 448 * scale, at least 2**LOWEST, and its inverse.

    448 is 1.75 * 2**8: a mantissa above .75 carries into the exponent, from which 8 is taken.
    """
    bits = ((amax.to(tl.int32, bitcast=True) + 0x001FFFFF) & 0x7F800000) - 0x04000000
    bits = tl.maximum(bits, (127 + LOWEST) << 23)
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _encode_latent_kernel(
    entries_ptr, values_ptr, scales_ptr, rope_ptr, index_ptr, count_ptr, capacity, stride,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    """`values_ptr`, `scales_ptr` and `rope_ptr` are the same rows, as e4m3, fp32 and bf16."""
    ROW: tl.constexpr = TILES * (_TILE + 4) + 2 * R
    entry, row = _places(index_ptr, count_ptr, capacity, ENTRIES)
    tiles = tl.arange(0, BLOCK_T)[None, :]
    columns = tiles[:, :, None] * _TILE + tl.arange(0, _TILE)[None, None, :]
    live = (row >= 0)[:, None] & (tiles < TILES)
    at = (entry * stride)[:, None, None] + columns
    x = tl.load(entries_ptr + at, mask=live[:, :, None], other=0.0).to(tl.float32)
    scale, inverse = _scale(tl.max(tl.abs(x), axis=2), LOWEST=-13)
    # A NaN or infinity makes its tile's scale NaN, so that every reader sees it.
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), axis=2)
    scale = tl.where(finite != 0, scale, float("nan"))
    values = (x * inverse[:, :, None]).to(tl.float8e4nv)
    tl.store(values_ptr + (row * ROW)[:, None, None] + columns, values, mask=live[:, :, None])
    to = (row * (ROW // 4))[:, None] + TILES * _TILE // 4 + tiles
    tl.store(scales_ptr + to, scale, mask=live)
    if R > 0:
        columns = tl.arange(0, BLOCK_R)[None, :]
        live = (row >= 0)[:, None] & (columns < R)
        at = (entry * stride)[:, None] + TILES * _TILE + columns
        rope = tl.load(entries_ptr + at, mask=live, other=0.0)
        to = (row * (ROW // 2))[:, None] + TILES * (_TILE + 4) // 2 + columns
        tl.store(rope_ptr + to, rope.to(tl.bfloat16), mask=live)


@triton.jit
def _decode_latent_kernel(
    entries_ptr, values_ptr, scales_ptr, rope_ptr, index_ptr, count_ptr, capacity, stride,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr,
    ENTRIES: tl.constexpr,
):  # fmt: skip
    ROW: tl.constexpr = TILES * (_TILE + 4) + 2 * R
    entry, row = _places(index_ptr, count_ptr, capacity, ENTRIES)
    tiles = tl.arange(0, BLOCK_T)[None, :]
    columns = tiles[:, :, None] * _TILE + tl.arange(0, _TILE)[None, None, :]
    live = (row >= 0)[:, None] & (tiles < TILES)
    at = (row * (ROW // 4))[:, None] + TILES * _TILE // 4 + tiles
    scale = tl.load(scales_ptr + at, mask=live, other=0.0)
    values = tl.load(values_ptr + (row * ROW)[:, None, None] + columns, mask=live[:, :, None])
    x = (values.to(tl.float32) * scale[:, :, None]).to(entries_ptr.dtype.element_ty)
    tl.store(entries_ptr + (entry * stride)[:, None, None] + columns, x, mask=live[:, :, None])
    if R > 0:
        columns = tl.arange(0, BLOCK_R)[None, :]
        live = (row >= 0)[:, None] & (columns < R)
        at = (row * (ROW // 2))[:, None] + TILES * (_TILE + 4) // 2 + columns
        rope = tl.load(rope_ptr + at, mask=live, other=0.0).to(tl.float32)
        to = (entry * stride)[:, None] + TILES * _TILE + columns
        tl.store(entries_ptr + to, rope.to(entries_ptr.dtype.element_ty), mask=live)


@triton.jit
def _encode_index_kernel(
    keys_ptr, values_ptr, scales_ptr, index_ptr, count_ptr, capacity, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, B: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """`values_ptr` and `scales_ptr` are the same blocks, as e4m3 and fp32."""
    entry, row = _places(index_ptr, count_ptr, capacity, ENTRIES)
    slot, offset = row // B, row % B
    columns = tl.arange(0, BLOCK_D)[None, :]
    live = (row >= 0)[:, None] & (columns < D)
    x = tl.load(keys_ptr + (entry * stride)[:, None] + columns, mask=live, other=0.0)
    x = x.to(tl.float32)
    scale, inverse = _scale(tl.max(tl.abs(x), axis=1), LOWEST=-22)
    to = (slot * (B * (D + 4)) + offset * D)[:, None] + columns
    tl.store(values_ptr + to, (x * inverse[:, None]).to(tl.float8e4nv), mask=live)
    tl.store(scales_ptr + slot * (B * (D + 4) // 4) + B * D // 4 + offset, scale, mask=row >= 0)


@triton.jit
def _decode_index_kernel(
    keys_ptr, values_ptr, scales_ptr, index_ptr, count_ptr, capacity, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, B: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    entry, row = _places(index_ptr, count_ptr, capacity, ENTRIES)
    slot, offset = row // B, row % B
    columns = tl.arange(0, BLOCK_D)[None, :]
    live = (row >= 0)[:, None] & (columns < D)
    at = (slot * (B * (D + 4)) + offset * D)[:, None] + columns
    values = tl.load(values_ptr + at, mask=live).to(tl.float32)
    at = slot * (B * (D + 4) // 4) + B * D // 4 + offset
    x = values * tl.load(scales_ptr + at, mask=row >= 0, other=0.0)[:, None]
    tl.store(
        keys_ptr + (entry * stride)[:, None] + columns, x.to(keys_ptr.dtype.element_ty), mask=live
    )


def encode_latent(
    entries: Tensor,
    *,
    rope_dim: int,
    index: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Encode entries[i] to out[index[i]], or to out[i].

    Args:
        entries: (N, L + R) bf16 or fp32, the last `rope_dim` = R columns rotary; columns contiguous.
        index: (N,) int32, distinct rows below S; negative: skipped. Needs `out`.
        count: (1,) int32, how many of the N are in use; what lies behind may hold anything.
        out: (S, entry_bytes) uint8, contiguous; (N, entry_bytes) without `index`.
        checked: read `index` back and refuse what is out of range; likewise in the other verbs.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    tiles = _num_tiles(entries.shape[-1], rope_dim)
    row_bytes = tiles * (_TILE_COLUMNS + 4) + 2 * rope_dim
    out = _target(entries, index, out, len(entries), row_bytes)
    _check_floats("entries", entries, len(entries), entries.shape[-1], out)
    _launch_latent(_encode_latent_kernel, entries, out, index, count, tiles, rope_dim, checked)
    return out


def decode_latent(
    rows: Tensor,
    *,
    rope_dim: int,
    dtype: torch.dtype = torch.bfloat16,
    index: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Decode rows[index[i]], or rows[i], to out[i].

    Args:
        rows: (S, entry_bytes) uint8, contiguous. rope_dim: R, of which L follows.
        index: (N,) int32 below S; where it is negative, `out` is left as it was. count: (1,) int32.
        out: (N, L + R) bf16 or fp32, columns contiguous; allocated in `dtype` if not given.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    row_bytes = rows.shape[-1]
    tiles, rest = divmod(row_bytes - 2 * rope_dim, _TILE_COLUMNS + 4)
    if rest:
        raise ValueError(f"no latent of whole tiles has {row_bytes} bytes with rope_dim {rope_dim}")
    dim = tiles * _TILE_COLUMNS + rope_dim
    _num_tiles(dim, rope_dim)
    num = len(rows) if index is None else len(index)
    if out is None:
        out = torch.empty(num, dim, dtype=dtype, device=rows.device)
    _check_bytes("rows", rows, row_bytes)
    _check_floats("out", out, num, dim, rows)
    _launch_latent(_decode_latent_kernel, out, rows, index, count, tiles, rope_dim, checked)
    return out


def encode_index(
    keys: Tensor,
    *,
    block_tokens: int = 1,
    index: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Encode index keys[i] as key index[i] (slot * B + offset), or key i, of the blocks `out`.

    Args:
        keys: (N, D) bf16 or fp32, D a multiple of 4; columns contiguous.
        block_tokens: B, keys of a block. 1 gives rows of D + 4 bytes.
        index: (N,) int32, distinct, below S * B; negative: skipped. Needs `out`. count: (1,) int32.
        out: (S, B * (D + 4)) uint8, contiguous; S = ceil(N / B) without `index`.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    dim = keys.shape[-1]
    _check_index_dim(dim, block_tokens)
    slots = triton.cdiv(len(keys), block_tokens)
    out = _target(keys, index, out, slots, block_tokens * (dim + 4))
    _check_floats("keys", keys, len(keys), dim, out)
    _launch_index(_encode_index_kernel, keys, out, index, count, dim, block_tokens, checked)
    return out


def decode_index(
    blocks: Tensor,
    *,
    block_tokens: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    index: Tensor | None = None,
    count: Tensor | None = None,
    out: Tensor | None = None,
    checked: bool = False,
) -> Tensor:
    """Decode key index[i], or key i, of `blocks` (S, B * (D + 4)) to out[i]; see `encode_index`.

    Args:
        out: (N, D) bf16 or fp32, allocated in `dtype` if not given; N = S * B without `index`. Rows
            of a negative index are left as they were.
    Raises:
        ValueError: on shapes, dtypes, strides or devices other than these.
    """
    dim = blocks.shape[-1] // max(block_tokens, 1) - 4
    _check_index_dim(dim, block_tokens)
    num = len(blocks) * block_tokens if index is None else len(index)
    if out is None:
        out = torch.empty(num, dim, dtype=dtype, device=blocks.device)
    _check_bytes("blocks", blocks, block_tokens * (dim + 4))
    _check_floats("out", out, num, dim, blocks)
    _launch_index(_decode_index_kernel, out, blocks, index, count, dim, block_tokens, checked)
    return out


def _launch_latent(
    kernel: triton.JITFunction[None],
    entries: Tensor,
    rows: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    tiles: int,
    rope_dim: int,
    checked: bool,
) -> None:
    _check_list(index, count, entries, len(rows) if checked else None)
    if len(entries) == 0:
        return
    kernel[(triton.cdiv(len(entries), _ENTRIES),)](
        entries,
        rows.view(torch.float8_e4m3fn),
        rows.view(torch.float32),
        rows.view(torch.bfloat16),
        index,
        count,
        len(entries),
        entries.stride(0),
        TILES=tiles,
        BLOCK_T=triton.next_power_of_2(tiles),
        R=rope_dim,
        BLOCK_R=triton.next_power_of_2(rope_dim),
        ENTRIES=_ENTRIES,
        num_warps=_WARPS,
    )


def _launch_index(
    kernel: triton.JITFunction[None],
    keys: Tensor,
    blocks: Tensor,
    index: Tensor | None,
    count: Tensor | None,
    dim: int,
    block_tokens: int,
    checked: bool,
) -> None:
    _check_list(index, count, keys, len(blocks) * block_tokens if checked else None)
    if len(keys) == 0:
        return
    kernel[(triton.cdiv(len(keys), _ENTRIES),)](
        keys,
        blocks.view(torch.float8_e4m3fn),
        blocks.view(torch.float32),
        index,
        count,
        len(keys),
        keys.stride(0),
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        B=block_tokens,
        ENTRIES=_ENTRIES,
        num_warps=_WARPS,
    )


def _num_tiles(dim: int, rope_dim: int) -> int:
    tiles, rest = divmod(dim - rope_dim, _TILE_COLUMNS)
    if tiles < 1 or rest or rope_dim < 0 or rope_dim % 2:
        raise ValueError(
            f"an entry needs a latent of a positive multiple of {_TILE_COLUMNS} columns and an even "
            f"rope_dim, got {dim} columns and rope_dim {rope_dim}"
        )
    return tiles


def _check_index_dim(dim: int, block_tokens: int) -> None:
    if block_tokens < 1 or dim < 4 or dim % 4:
        raise ValueError(
            f"index keys need a positive multiple of 4 columns and block_tokens >= 1, "
            f"got {dim} and {block_tokens}"
        )


def _target(
    entries: Tensor, index: Tensor | None, out: Tensor | None, num_rows: int, row_bytes: int
) -> Tensor:
    """Where encoded rows go: `out`, checked, or a new tensor."""
    if out is None and index is not None:
        raise ValueError("index names rows of out, which is missing")
    if out is None:
        out = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=entries.device)
    _check_bytes("out", out, row_bytes)
    if index is None and len(out) != num_rows:
        raise ValueError(f"out must have {num_rows} rows, got {len(out)}")
    return out


def _check_bytes(name: str, rows: Tensor, row_bytes: int) -> None:
    if rows.dim() != 2 or rows.shape[1] != row_bytes or rows.dtype != torch.uint8:
        raise ValueError(
            f"{name} must be (S, {row_bytes}) uint8, got {tuple(rows.shape)} {rows.dtype}"
        )
    if not rows.is_contiguous() or rows.storage_offset() % 4:
        raise ValueError(
            f"{name} must be contiguous and begin at a multiple of 4 bytes, "
            f"got strides {rows.stride()} at {rows.storage_offset()}"
        )


def _check_floats(name: str, entries: Tensor, num: int, dim: int, rows: Tensor) -> None:
    if entries.shape != (num, dim) or entries.dtype not in _FLOATS or entries.stride(1) != 1:
        raise ValueError(
            f"{name} must be ({num}, {dim}) bf16 or fp32 with contiguous columns, "
            f"got {tuple(entries.shape)} {entries.dtype} with strides {entries.stride()}"
        )
    if entries.device != rows.device:
        raise ValueError(f"floats on {entries.device} and bytes on {rows.device}")


def _check_list(
    index: Tensor | None, count: Tensor | None, entries: Tensor, limit: int | None
) -> None:
    """With a `limit`, the ids in use are read back."""
    check_tensor(index, "index", (len(entries),), torch.int32, entries.device)
    check_tensor(count, "count", (1,), torch.int32, entries.device)
    if limit is not None and index is not None:
        check_ids(index, "index", limit, count=count)
