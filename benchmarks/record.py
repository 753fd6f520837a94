"""Result lines: one JSON object per measured case, appended to `benchmarks/results/NAME.jsonl`."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit that is measured: of this checkout, or `QROAM_COMMIT` where there is no git.

    Raises: RuntimeError if the tree has changes, because the numbers would belong to no commit.
    """
    given = os.environ.get("QROAM_COMMIT")
    if given:
        return given
    root = Path(__file__).parent.parent
    changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    if changed:
        raise RuntimeError(f"the tree has changes, commit them first:\n{changed}")
    return _git(root, "rev-parse", "HEAD")


def record(
    name: str,
    *,
    case: str,
    metric: str,
    value: float,
    unit: str,
    baseline: str,
    baseline_value: float,
    device: str,
    measured: str,
) -> dict[str, object]:
    """Append one line and return it. `ratio` > 1 means that qroam is better than the baseline.

    Args: measured: the commit, from `commit`, taken before anything ran.
    """
    line: dict[str, object] = {
        "bench": name,
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "baseline": baseline,
        "baseline_value": baseline_value,
        "ratio": baseline_value / value,
        "device": device,
        "versions": _versions("qroam", "torch", "triton", "flashinfer-python", "nvidia-cuda-nvrtc"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": measured,
        "command": command(sys.argv),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def command(argv: list[str]) -> str:
    """How to run it again from the root of a checkout, wherever this one is."""
    script, root = Path(argv[0]).resolve(), Path(__file__).parent.parent.resolve()
    name = script.relative_to(root) if script.is_relative_to(root) else Path(script.name)
    return shlex.join(["python", name.as_posix(), *argv[1:]])


def cpu() -> str:
    """The processor and how many of its cores this process may use."""
    model = platform.processor() or platform.machine()
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            model = text.split(":", 1)[1].strip()
            break
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def _versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git(root: Path, *arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    return run.stdout.strip()
