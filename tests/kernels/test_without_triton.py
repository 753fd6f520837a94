"""What must be importable where Triton is not installed: definitions, limits and pure arithmetic."""

from __future__ import annotations

import subprocess
import sys

import pytest
from effort import slow_between

MODULES = (
    "qroam.kernels.coverage",
    "qroam.kernels.reference",
    "qroam.kernels.limits",
    "qroam.kernels.checks",
    "qroam.kernels.pool_layout",
    "qroam.kernels.exchange.layout",
    "qroam.kernels.exchange.types",
    "qroam.partition",
    "qroam.indexer",
)


@pytest.mark.parametrize("module", slow_between(4, MODULES))
def test_importable_without_triton(module: str, tmp_path: object) -> None:
    program = (
        "import sys\n"
        "sys.modules['triton'] = sys.modules['cuda'] = None\n"
        f"import {module}\n"
        "print(sorted(n for n in sys.modules if n.startswith('triton.')))\n"
    )
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=str(tmp_path))
    assert done.stdout == "[]\n"
