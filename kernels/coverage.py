"""Coverage: which entries went into a partial, as a number and a hash that sender and receiver compare.

A merge by log-sum-exp cannot see an entry that is absent, doubled or stale. So of every answered
(query, branch) the holder tells the number of entries that it read and a 32-bit hash of their ids and
generations, and the requester knows both from its plan. `mix.py`, `attend_sm90.py` and `device.cuh` have
the same hash for kernels.

Letters: E entries, P answered pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mix(stored_ids: Tensor, generations: Tensor) -> Tensor:
    """A 32-bit hash of (stored id, generation) per entry, int64 in [0, 2**32)."""
    x = (stored_ids.long() * 0x9E3779B1 + generations.long() * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    x = ((x ^ (x >> 12)) * 0x297A2D39) & 0xFFFFFFFF
    return x ^ (x >> 15)


def coverage(stored_ids: Tensor, generations: Tensor, valid: Tensor) -> Tensor:
    """`covered` of each row, (..., 2) int64: the number of valid entries and their summed `mix`.

    Args: stored_ids, generations, valid: (..., E). The sum is modulo 2**32.
    """
    mixed = torch.where(valid, mix(stored_ids, generations), 0).sum(-1) & 0xFFFFFFFF
    return torch.stack((valid.sum(-1), mixed), dim=-1)


def tagged(covered: Tensor, item: Tensor) -> Tensor:
    """Coverage (P, 2) bound to the item it answers, so that swapped answers differ."""
    tag = mix(item, torch.zeros_like(item))
    return torch.stack((covered[:, 0], (covered[:, 1] + tag) & 0xFFFFFFFF), dim=1)


def to_int32(unsigned: Tensor) -> Tensor:
    """Values in [0, 2**32) as the int32 with the same bits."""
    return ((unsigned + 2**31) % 2**32 - 2**31).to(torch.int32)
