"""The examples run as written, at a small size, and notice what they are there to notice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(example: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"examples/{example}", *options],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.processes
def test_an_engine_of_ones_own_decodes_what_one_process_does() -> None:
    done = run("embed_in_engine.py", "--tokens", "6", "--corpus", "300", "--mode", "random")
    assert done.returncode == 0, done.stdout + done.stderr
    *ranks, verdict = done.stdout.splitlines()
    assert verdict == "equal to one process"
    tokens = [json.loads(line.partition(": ")[2]) for line in ranks]
    assert [len(row) for row in tokens] == [6, 6]


@pytest.mark.slow
@pytest.mark.processes
def test_agents_come_and_go() -> None:
    sizes = ("--steps", "60", "--files", "4", "--file-bytes", "100", "--layers", "1")
    done = run("agents.py", *sizes, "--check", "2", "--log-decisions")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all well"
    assert done.stdout.count("2 of 2 agents as alone") == 2
    assert done.stdout.count("failures   coverage 0, failover 0, deadline 0, late 0") == 2
    logged = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert {line["rank"] for line in logged} == {0, 1}
    assert {line["event"] for line in logged} == {"decision"}


def test_a_package_that_is_not_there_is_named() -> None:
    done = run("agents.py", "--package", "no_such_package", "--steps", "1", "--ranks", "1")
    assert done.returncode == 2
    assert "error: 'no_such_package' is not an installed package with sources" in done.stderr
