"""All benchmarks of GPUs, one after another: those of one GPU, then those of two.

Each runs in a process of its own and appends to `results/` as it does alone. With what two H200 take it
is over in less than 8 minutes.

    python benchmarks/all_gpu.py [--quick]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

ONE = ("attend", "plan", "merge", "gather", "codec")
TWO = ("latency", "exchange", "fetch", "step", "auto")


def main() -> int:
    names = (*ONE, *TWO) if torch.cuda.device_count() > 1 else ONE
    started, failed = time.perf_counter(), []
    for name in names:
        print(f"== {name}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(f"{name}.py")), *sys.argv[1:]]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"== {name}: over at {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    if names == ONE:
        print(f"not run, for want of a second GPU: {', '.join(TWO)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
