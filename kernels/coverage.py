"""Coverage in plain torch: which entries went into a partial, as an entry count and a hash.

After a merge an absent, doubled or stale holder can no longer be seen. So every partial comes with
`covered` (2,) int32: the number of its entries, and the sum of their hashes modulo 2**32. Who asked
knows both from its plan, and compares them.

This file is the definition for all of them. Triton's copy of the hash is `mix.py`, Gluon's is in
`attend_sm90.py`, CUDA's in `plan.cu`. Everything here is int32, as in messages and in kernels: hashes
and sums are the int32 of the same 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(stored_ids: Tensor, generations: Tensor) -> Tensor:
    """A 32-bit hash of each (stored id, generation): int32, of the shape that both broadcast to."""
    x = (stored_ids.long() * 0x9E3779B1 + generations.long() * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return to_int32(x ^ (x >> 15))


def coverage(stored_ids: Tensor, generations: Tensor, valid: Tensor) -> Tensor:
    """`covered` of each row, (..., 2) int32: the number of valid entries and the sum of their `mix`.

    Args: stored_ids, generations, valid: (..., E).
    """
    mixed = torch.where(valid, mix(stored_ids, generations), 0)
    return to_int32(torch.stack((valid.sum(-1), mixed.sum(-1)), dim=-1))


def tagged(covered: Tensor, item: Tensor) -> Tensor:
    """Coverage (P, 2) int32 bound to the item (P,) that it answers, so that swapped answers differ."""
    tag = mix(item, torch.zeros_like(item))
    return torch.stack((covered[:, 0], to_int32(covered[:, 1].long() + tag)), dim=1)


def differs(found: Tensor, expected: Tensor) -> Tensor:
    """Whether coverage (..., 2), or an entry's hashes (..., n), are not as expected: (...,) bool."""
    return (found != expected).any(-1)


def to_int32(numbers: Tensor) -> Tensor:
    """The int32 of the low 32 bits of each int64: sums and hashes modulo 2**32."""
    return ((numbers + 2**31) % 2**32 - 2**31).to(torch.int32)
