"""What the README tells people to type works as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from qroam.runtime.tools.cli import main
from qroam.runtime.tools.sabotage import Sabotage

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for line in README.splitlines()
    if re.match(r" {4}(make|qroam|python) ", line)
]


def commands(program: str) -> list[list[str]]:
    """The arguments of every indented command line that starts with `program`."""
    return [args for name, *args in map(shlex.split, COMMANDS) if name == program]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 90


def test_the_sample_runs_as_written(tmp_path: Path) -> None:
    (sample,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", sample], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch.Size([2, 4, 64])")


def test_qroam_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = commands("qroam")
    assert {"explain", "doctor"} <= {args[0] for args in given}
    for args in given:
        assert main(args) == 0, (args, capsys.readouterr().err)
        assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.processes
def test_the_example_runs() -> None:
    (args,) = commands("python")
    assert args[0] == "examples/dense_check.py"
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {args[0] for args in commands("make")}
    assert {"demo", "test"} <= named <= targets


def test_every_sabotage_is_named() -> None:
    assert all(f"`{fault}`" in README or f" {fault}`" in README for fault in get_args(Sabotage))
