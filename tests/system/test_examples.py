"""The examples run as written, at a small size, and notice what they are there to notice.

`test_multi_node.py` runs the one for several nodes, `test_readme.py` and `test_central.py` the dense check.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PUBLIC = re.compile(r"qroam\.(partition|runtime|runtime\.adapters\.\w+)")


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


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it_and_uses_public_names_alone(example: Path) -> None:
    tree = ast.parse(example.read_text())
    shown = ast.get_docstring(tree) or ""
    assert re.search(
        rf"^ {{4,}}(python|torchrun) [^`]*examples/{example.name}", shown, re.MULTILINE
    )
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {
        module
        for node in imported
        for module in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
        )
        if module.split(".")[0] == "qroam"
    }
    assert modules
    assert {module for module in modules if not PUBLIC.fullmatch(module)} == set()


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    for example in EXAMPLES:
        assert f"]({example.name})" in listed, example.name
        assert f" examples/{example.name}" in listed, example.name
