"""Named ranges around the phases of a step, for torch's profiler and, with CUDA, for NVTX tools."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def named_range(phase: str) -> Iterator[None]:
    name = f"qroam: {phase}"
    with torch.profiler.record_function(name):
        if not torch.cuda.is_available():
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield
