"""All benchmarks of GPUs: those of one GPU, side by side where there are two, then those of two.

Each runs in a process of its own and appends to `results/` as it does alone. Compiling would take most
of their time one after another, so those of two GPUs run once before, quickly and all at once; what that
measures is not recorded.

    python benchmarks/all_gpu.py [--quick]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ONE = (("attend",), ("plan", "merge", "gather", "codec"))  # of either GPU; they take about as long
TWO = ("latency", "exchange", "fetch", "step", "auto")


def run(names: Sequence[str], gpu: int | None = None) -> list[str]:
    """Run them one after another, on one GPU or all; print what each printed, and tell which failed."""
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    failed = []
    for name in names:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *sys.argv[1:]],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        took = time.perf_counter() - started
        print(f"== {name}: {took:.0f} s, exit {done.returncode}\n{done.stdout}", flush=True)
        failed += [name] if done.returncode else []
    return failed


def compile_first(names: Sequence[str]) -> None:
    """What fails here says so when its turn comes."""
    started = time.perf_counter()
    running = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--quick"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for name in names
    ]  # fmt: skip
    for child in running:
        child.wait()
    print(f"== compiled for two GPUs: {time.perf_counter() - started:.0f} s", flush=True)


def main() -> int:
    started, two = time.perf_counter(), torch.cuda.device_count() > 1
    if two:
        compile_first(TWO)
        with ThreadPoolExecutor() as pool:
            failed = [name for half in pool.map(run, ONE, range(2)) for name in half]
        failed += run(TWO)
    else:
        failed = run([name for names in ONE for name in names])
        print(f"not run, for want of a second GPU: {', '.join(TWO)}")
    print(f"all: {time.perf_counter() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
