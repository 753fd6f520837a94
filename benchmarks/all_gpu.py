"""All benchmarks of GPUs: those of one GPU, side by side where there are two, then those of two.

Each runs in a process of its own and appends to `results/` as it does alone. Compiling would take most
of their time one after another, so those of two GPUs run once before, quickly and all at once; what that
measures is not recorded.

    python benchmarks/all_gpu.py [--quick]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from record import commit

ONE = (("attend",), ("plan", "merge", "gather", "codec"))  # of either GPU; they take about as long
TWO = ("latency", "exchange", "fetch", "step", "auto")
COMPILING_S = 150.0


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
    """Run all of them quickly at once. One that does not end in time here compiles at its turn."""
    print(f"== compiling: {', '.join(names)}", flush=True)
    started = time.perf_counter()
    running = {
        name: subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(f"{name}.py")), "--quick"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
        for name in names
    }  # fmt: skip
    try:
        for name, child in running.items():
            left = COMPILING_S - (time.perf_counter() - started)
            try:
                child.wait(timeout=max(left, 0))
            except subprocess.TimeoutExpired:
                continue
            took = time.perf_counter() - started
            print(f"== {name}: compiled after {took:.0f} s, exit {child.returncode}", flush=True)
    finally:
        for name, child in running.items():
            if child.poll() is None:
                print(f"== {name}: stopped compiling after {COMPILING_S:.0f} s", flush=True)
                os.killpg(child.pid, signal.SIGKILL)  # with its ranks
                child.wait()


def main() -> int:
    started, two = time.perf_counter(), torch.cuda.device_count() > 1
    quick = "--quick" in sys.argv
    if not quick:
        commit()  # refuses a tree with changes before anything runs
    if two:
        if not quick:
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
