"""Rotary position embedding: T tokens, D rotary columns in D/2 pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import Pairing, Rope


def rope_tables(
    positions: Tensor, dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, dim / 2) of `dtype`, for integer positions (T,).

    Angles are computed in fp32, as models are trained and as transformers does it (same bits), or
    in fp64 if that is the dtype asked for.
    """
    if dim <= 0 or dim % 2:
        raise ValueError(f"rope dim must be positive and even, got {dim}")
    angle = torch.float64 if dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, dim, 2, dtype=angle, device=positions.device) / dim
    angles = positions.to(angle)[:, None] * (1.0 / theta**exponents)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, pairing: Pairing) -> Tensor:
    """Rotate every pair of columns of `x` by its token's angle.

    Args:
        x: (T, ..., D), all columns rotary.
        cos, sin: (T, D / 2).
        pairing: "half" rotates columns (i, i + D/2) together, "interleaved" (2i, 2i + 1).
    Returns:
        (T, ..., D), every column where it was. `deinterleave` of an interleaved result is what
        transformers' `apply_rotary_pos_emb_interleave` returns; scores do not see the difference
        as long as queries and keys agree.
    """
    if cos.shape != (x.shape[0], x.shape[-1] // 2) or cos.shape != sin.shape or x.shape[-1] % 2:
        raise ValueError(
            f"x {tuple(x.shape)} needs cos and sin of (T, D / 2), "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    middle = [1] * (x.dim() - 2)
    cos, sin = (table.view(len(x), *middle, x.shape[-1] // 2) for table in (cos, sin))
    match pairing:
        case "half":
            first, second = x.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        case "interleaved":
            first, second = x[..., 0::2], x[..., 1::2]
            pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
            return pairs.flatten(-2)
        case _:
            raise ValueError(f"rope pairing must be interleaved or half, got {pairing!r}")


def inverse_frequencies(rope: Rope) -> Tensor:
    """Radians per position of each pair, (D / 2,) fp64; YaRN's if the rope is scaled by it."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim
    plain = 1.0 / rope.theta**exponents
    if rope.yarn is None:
        return plain
    low, high = (
        rope.dim
        * math.log(rope.yarn.original_positions / (2 * math.pi * turns))
        / (2 * math.log(rope.theta))
        for turns in (rope.yarn.beta_fast, rope.yarn.beta_slow)
    )
    first, last = max(math.floor(low), 0), min(math.ceil(high), rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float64) - first) / (last - first or 1e-3)
    slowed = ramp.clamp(0, 1)
    return plain / rope.yarn.factor * slowed + plain * (1 - slowed)


def rotate(x: Tensor, by: Tensor, rope: Rope) -> Tensor:
    """Rotate `x` (T, ..., D), all columns rotary, by (T,) positions, forwards or back.

    At unit magnitude: what YaRN multiplied into x stays in it, once. Angles are fp64 whatever the
    dtype, so that a shift adds no error that grows with it.
    """
    angles = by.double()[:, None] * inverse_frequencies(rope)
    return apply_rope(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype), pairing=rope.pairing)


def deinterleave(x: Tensor) -> Tensor:
    """(..., D) with the even columns first, then the odd ones: interleaved pairs become halves."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
