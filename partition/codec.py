"""How the entries of one branch, or index keys, are stored as bytes.

Dimension letters: N entries, D columns of an entry, S slots of a pool. A codec turns (N, D) floats
into (N, entry_bytes) uint8 rows and back; numbers are little-endian. A row is the concatenation of
the codec's planes. A block stores plane by plane: all its entries' plane 0, then all plane 1, which
for `fp8_index` is DeepGEMM's paged layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

CODEC_NAMES = ("fp64", "fp32", "bf16", "fp8_v32", "fp8_index")

_E4M3_MAX = 448.0
_LATENT_TILE = 128


class Codec(Protocol):
    """The bytes of an entry. `planes` are the bytes per entry of each plane of a block."""

    @property
    def name(self) -> str: ...
    @property
    def dim(self) -> int: ...
    @property
    def planes(self) -> tuple[int, ...]: ...
    @property
    def entry_bytes(self) -> int: ...

    def encode(self, entries: Tensor) -> Tensor:
        """(N, D) floats -> (N, entry_bytes) uint8, perhaps sharing memory with `entries`.

        Raises:
            ValueError: on another shape or dtype, or if a stored number would be NaN or infinite.
        """
        ...

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, entry_bytes) uint8 -> (N, D) of `dtype`; ValueError on another shape or dtype."""
        ...


def make_codec(name: str, *, dim: int, rope_dim: int = 0) -> Codec:
    """The codec `name` for entries of `dim` columns, the last `rope_dim` of which are rotary.

    Only `fp8_v32` stores the rotary columns apart (as bf16, beside an e4m3 latent).

    Raises:
        ValueError: if the name is unknown or the codec cannot store such an entry.
    """
    if dim <= 0 or not 0 <= rope_dim <= dim:
        raise ValueError(f"codec {name!r}: needs 0 <= rope_dim <= dim, got {rope_dim} and {dim}")
    match name:
        case "fp64":
            return PlainCodec(name=name, dim=dim, stored=torch.float64)
        case "fp32":
            return PlainCodec(name=name, dim=dim, stored=torch.float32)
        case "bf16":
            return PlainCodec(name=name, dim=dim, stored=torch.bfloat16)
        case "fp8_v32":
            return LatentFp8Codec(latent_dim=dim - rope_dim, rope_dim=rope_dim)
        case "fp8_index":
            return IndexFp8Codec(dim=dim)
        case _:
            raise ValueError(f"unknown codec {name!r}; known: {', '.join(CODEC_NAMES)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainCodec:
    """The numbers themselves. Decoding to the stored dtype is a view."""

    name: str
    dim: int
    stored: torch.dtype

    @property
    def planes(self) -> tuple[int, ...]:
        return (self.dim * self.stored.itemsize,)

    @property
    def entry_bytes(self) -> int:
        return sum(self.planes)

    def encode(self, entries: Tensor) -> Tensor:
        _check_entries(self, entries)
        stored = entries.to(self.stored).contiguous()
        _check_finite(self, stored)
        return stored.view(torch.uint8)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        _check_rows(self, rows, dtype)
        return _reinterpret(rows, self.stored).to(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFp8Codec:
    """FlashMLA's V3.2 row: e4m3 latent | one fp32 scale per 128 columns | bf16 rope.

    656 bytes at latent 512 and rope 64. A tile's scale is max(amax / 448, 1e-4) rounded up to a
    power of two (FlashMLA `tests/quant.py`, which clamps the scale; `act_quant` clamps the amax).
    """

    latent_dim: int
    rope_dim: int

    def __post_init__(self) -> None:
        if self.latent_dim <= 0 or self.latent_dim % _LATENT_TILE:
            raise ValueError(
                f"codec {self.name!r}: the latent must be a positive multiple of {_LATENT_TILE} "
                f"columns, got {self.latent_dim} (and {self.rope_dim} rotary)"
            )
        if self.rope_dim < 0 or self.rope_dim % 2:
            raise ValueError(f"codec {self.name!r}: rope_dim must be even, got {self.rope_dim}")

    @property
    def name(self) -> str:
        return "fp8_v32"

    @property
    def dim(self) -> int:
        return self.latent_dim + self.rope_dim

    @property
    def num_tiles(self) -> int:
        return self.latent_dim // _LATENT_TILE

    @property
    def planes(self) -> tuple[int, ...]:
        return (self.latent_dim + 4 * self.num_tiles + 2 * self.rope_dim,)

    @property
    def entry_bytes(self) -> int:
        return sum(self.planes)

    def encode(self, entries: Tensor) -> Tensor:
        _check_entries(self, entries)
        latent, rope = entries.split_with_sizes((self.latent_dim, self.rope_dim), dim=1)
        tiles = latent.float().reshape(-1, self.num_tiles, _LATENT_TILE)
        rope = rope.to(torch.bfloat16).contiguous()
        amax = tiles.abs().amax(dim=-1, keepdim=True)
        _check_finite(self, amax)
        _check_finite(self, rope)
        scale = _round_up_to_power_of_two((amax / _E4M3_MAX).clamp_min(1e-4))
        parts = (_to_e4m3(tiles, scale).flatten(1), scale.flatten(1), rope)
        return torch.cat([part.view(torch.uint8) for part in parts], dim=1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        _check_rows(self, rows, dtype)
        sizes = (self.latent_dim, 4 * self.num_tiles, 2 * self.rope_dim)
        values, scale, rope = rows.split_with_sizes(sizes, dim=1)
        tiles = _from_e4m3(values).view(-1, self.num_tiles, _LATENT_TILE)
        tiles *= _reinterpret(scale, torch.float32)[..., None]
        entries = rows.new_empty(len(rows), self.dim, dtype=dtype)
        entries[:, : self.latent_dim] = tiles.flatten(1)
        entries[:, self.latent_dim :] = _reinterpret(rope, torch.bfloat16)
        return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexFp8Codec:
    """DeepGEMM's paged index key: a plane of e4m3 values, a plane of one fp32 scale per entry.

    132 bytes at 128 columns. Keys arrive rotated (Hadamard); see `act_quant` for the scale.
    """

    dim: int

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 4:
            raise ValueError(
                f"codec {self.name!r}: dim must be a positive multiple of 4, so that a block's "
                f"scales are aligned, got {self.dim}"
            )

    @property
    def name(self) -> str:
        return "fp8_index"

    @property
    def planes(self) -> tuple[int, ...]:
        return (self.dim, 4)

    @property
    def entry_bytes(self) -> int:
        return sum(self.planes)

    def encode(self, entries: Tensor) -> Tensor:
        _check_entries(self, entries)
        values, scale = act_quant(entries)
        rows = entries.new_empty(len(entries), self.entry_bytes, dtype=torch.uint8)
        rows[:, : self.dim] = values.view(torch.uint8)
        rows[:, self.dim :].view(torch.float32).copy_(scale)
        return rows

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        _check_rows(self, rows, dtype)
        values, scale = rows.split_with_sizes(self.planes, dim=1)
        return (_from_e4m3(values) * _reinterpret(scale, torch.float32)).to(dtype)


def act_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3.2's `act_quant` with power-of-two scales (`ue8m0`), one group per row.

    Args:
        x: (..., D) floats.
    Returns:
        values: (..., D) e4m3, x / scale.
        scale: (..., 1) fp32, max(amax, 1e-4) / 448 rounded up to a power of two.
    Raises:
        ValueError: if `x` holds NaN or infinities.
    """
    x = x.float()
    amax = x.abs().amax(dim=-1, keepdim=True)
    if not amax.isfinite().all():
        raise ValueError("act_quant: NaN or infinite numbers cannot be quantised")
    scale = _round_up_to_power_of_two(amax.clamp_min(1e-4) / _E4M3_MAX)
    return _to_e4m3(x, scale), scale


def gather_rows(blocks: Tensor, codec: Codec, block_tokens: int, entry_index: Tensor) -> Tensor:
    """The stored rows of entries, (N, entry_bytes) uint8, a copy.

    Args:
        blocks: (S, block_tokens * entry_bytes) uint8, contiguous.
        entry_index: (N,) int64, slot * block_tokens + offset.
    Raises:
        ValueError: if `blocks` does not hold such blocks or an index is out of range.
    """
    _check_pool(blocks, codec, block_tokens, entry_index)
    planes = _planes(blocks, codec, block_tokens)
    if len(planes) == 1:
        return planes[0].flatten(0, 1).index_select(0, entry_index).view(torch.uint8)
    slot, offset = entry_index // block_tokens, entry_index % block_tokens
    return torch.cat([plane[slot, offset] for plane in planes], dim=1).view(torch.uint8)


def scatter_rows(
    blocks: Tensor, codec: Codec, block_tokens: int, entry_index: Tensor, rows: Tensor
) -> None:
    """Store rows (N, entry_bytes) uint8 at distinct entries; arguments as in `gather_rows`."""
    _check_pool(blocks, codec, block_tokens, entry_index)
    if rows.dtype != torch.uint8 or rows.shape != (len(entry_index), codec.entry_bytes):
        raise ValueError(
            f"codec {codec.name!r}: {len(entry_index)} rows of {codec.entry_bytes} uint8 expected, "
            f"got {tuple(rows.shape)} {rows.dtype}"
        )
    planes = _planes(blocks, codec, block_tokens)
    words = _reinterpret(rows, planes[0].dtype)
    if len(planes) == 1:
        planes[0].flatten(0, 1)[entry_index] = words
        return
    slot, offset = entry_index // block_tokens, entry_index % block_tokens
    parts = words.split_with_sizes([plane.shape[2] for plane in planes], dim=1)
    for plane, part in zip(planes, parts, strict=True):
        plane[slot, offset] = part


def _planes(blocks: Tensor, codec: Codec, block_tokens: int) -> list[Tensor]:
    """Views (S, block_tokens, words) of each plane, in the widest integers that fit.

    Torch indexes element by element, so wide words move up to eight times as fast as bytes.
    """
    word_bytes = math.gcd(8, blocks.storage_offset(), *codec.planes)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word_bytes]
    widths = [plane // word_bytes for plane in codec.planes]
    slots = blocks.view(word)
    parts = slots.split_with_sizes([block_tokens * width for width in widths], dim=1)
    return [
        part.view(len(slots), block_tokens, width)
        for part, width in zip(parts, widths, strict=True)
    ]


def _reinterpret(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (N, B) as (N, B / itemsize) of `dtype`: a view if they are aligned, else a copy."""
    steps = (rows.storage_offset(), rows.stride(0))
    if rows.stride(1) != 1 or any(step % dtype.itemsize for step in steps):
        rows = rows.clone(memory_format=torch.contiguous_format)
    return rows.view(dtype)


def _round_up_to_power_of_two(ratio: Tensor) -> Tensor:
    """Exact 2**ceil(log2(ratio)) of normal fp32 numbers: a mantissa carries into the exponent."""
    return ((ratio.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def _to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    # Nothing to clamp: the scale was rounded up, so |x / scale| <= 448.
    return (x / scale).to(torch.float8_e4m3fn)


def _from_e4m3(codes: Tensor) -> Tensor:
    """uint8 codes -> fp32, by table: torch's own conversion is 15 times slower on CPUs."""
    table = torch.arange(256, dtype=torch.uint8, device=codes.device)
    numbers = table.view(torch.float8_e4m3fn).float()
    return numbers.index_select(0, codes.flatten().int()).view(codes.shape)


def _check_entries(codec: Codec, entries: Tensor) -> None:
    if entries.dim() != 2 or entries.shape[1] != codec.dim or not entries.is_floating_point():
        raise ValueError(
            f"codec {codec.name!r}: entries must be (N, {codec.dim}) floats, "
            f"got {tuple(entries.shape)} {entries.dtype}"
        )


def _check_finite(codec: Codec, numbers: Tensor) -> None:
    # aminmax lets NaN through and is ten times as fast as isfinite on every number.
    if numbers.numel() and not all(bound.isfinite() for bound in numbers.aminmax()):
        raise ValueError(f"codec {codec.name!r}: entries hold numbers it would store as NaN or inf")


def _check_rows(codec: Codec, rows: Tensor, dtype: torch.dtype) -> None:
    if rows.dim() != 2 or rows.shape[1] != codec.entry_bytes or rows.dtype != torch.uint8:
        raise ValueError(
            f"codec {codec.name!r}: rows must be (N, {codec.entry_bytes}) uint8, "
            f"got {tuple(rows.shape)} {rows.dtype}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"codec {codec.name!r}: decodes to floats, not to {dtype}")


def _check_pool(blocks: Tensor, codec: Codec, block_tokens: int, entry_index: Tensor) -> None:
    block_bytes = block_tokens * codec.entry_bytes
    if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.shape[1] != block_bytes:
        raise ValueError(
            f"codec {codec.name!r}: blocks must be (S, {block_bytes}) uint8 for {block_tokens} "
            f"entries each, got {tuple(blocks.shape)} {blocks.dtype}"
        )
    if not blocks.is_contiguous():
        raise ValueError(f"codec {codec.name!r}: blocks must be contiguous")
    if entry_index.dim() != 1 or entry_index.dtype != torch.int64:
        raise ValueError(
            f"entry_index must be (N,) int64, got {tuple(entry_index.shape)} {entry_index.dtype}"
        )
    if len(entry_index):
        low, high = (int(bound) for bound in entry_index.aminmax())
        if low < 0 or high >= len(blocks) * block_tokens:
            raise ValueError(
                f"entry_index must lie in [0, {len(blocks) * block_tokens}), got {low}..{high}"
            )
