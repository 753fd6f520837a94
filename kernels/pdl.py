"""Kernels that are launched while the one before them on the stream ends (programmatic dependent launch).

From sm_90 on a kernel may call `let_next_begin`: once all its CTAs have called it or ended, the next
kernel is given free SMs, if it was launched with the options of `early`. That kernel first calls `wait`,
which returns when everything before it has ended and can be read; only then it may let the next one
begin, so that no kernel runs ahead of more than one. A launch without those options waits as usual.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def early(device: torch.device) -> dict[str, Any]:
    """Options of a launch whose kernel has a constant EARLY and begins with `wait`."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": able} | ({"launch_pdl": True} if able else {})


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernels before this one have ended and what they wrote is there."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """This kernel has the SMs that it needs; the next one may hold the others until this one ends."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
