"""The hash of coverage for the kernels that cover entries; `coverage.mix` (coverage.py) defines it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix_of(ids, generations):
    """uint32 of each (stored id, generation)."""
    x = ids.to(tl.uint32) * 0x9E3779B1 + generations.to(tl.uint32) * 0x85EBCA77 + 0x165667B1
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)
