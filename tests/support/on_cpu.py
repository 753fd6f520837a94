"""Kernels in CUDA C++ on a CPU: the real source behind `on_cpu.h`, compiled by the host's compiler."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

COMPILER = shutil.which("g++")
_HEADER = Path(__file__).with_name("on_cpu.h")
_ENTRY = """
extern "C" int run(const StepArgs* step, int grid, int block, int cluster, long shared, unsigned seed) {{
    on_cpu::step = step;
    on_cpu::kernel = [](const void* step) {{ {kernel}(*(const StepArgs*)step); }};
    return on_cpu::run(grid, block, cluster, shared, seed);
}}
"""
_FAILED = {1: "its blocks wait for one another", 2: "it writes behind its shared memory"}


class Launcher:
    """Stands in for `kernels.cuda.launch`; threads take turns in the order that `seed` draws."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.launched: list[str] = []

    def __call__(
        self,
        source: Path,
        kernel: str,
        arguments: ctypes.Structure,
        *,
        grid: int,
        block: int,
        shared_bytes: int,
        device: torch.device,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        assert device.type == "cpu"
        assert grid % cluster == 0
        self.launched.append(kernel)
        status = _compiled(source, kernel)(
            ctypes.byref(arguments), grid, block, cluster, ctypes.c_long(shared_bytes), self.seed
        )
        assert status == 0, f"{kernel}: {_FAILED[status]}"


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="qroam-on-cpu-"))


@functools.cache
def _compiled(source: Path, kernel: str) -> ctypes._NamedFuncPointer:
    assert COMPILER is not None
    name = _folder() / hashlib.sha256(f"{source}: {kernel}".encode()).hexdigest()[:16]
    name.with_suffix(".cpp").write_text(
        f'#include "{_HEADER}"\n#include "{source}"\n{_ENTRY.format(kernel=kernel)}'
    )
    # Without contraction, as on the device.
    command = [COMPILER, "-std=c++17", "-Og", "-shared", "-fPIC", "-ffp-contract=off", "-w"]
    files = [str(name.with_suffix(".cpp")), "-o", str(name.with_suffix(".so"))]
    subprocess.run([*command, *files], check=True, capture_output=True, text=True)
    return ctypes.CDLL(str(name.with_suffix(".so"))).run
