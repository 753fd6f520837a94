"""CUDA C++ that does not compile says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from qroam.kernels.nvrtc import compiled


def test_a_cuda_kernel_that_does_not_compile_says_why(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("template <int T> __global__ void wrong(int* at) { *at = nothing; }")
    with pytest.raises(RuntimeError, match=r'wrong.cu, wrong<1>: .*identifier "nothing"'):
        compiled(wrong, "wrong<1>")
