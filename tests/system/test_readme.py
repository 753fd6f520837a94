"""What the README tells people to type works as written; documents are short, and name what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from qroam.runtime.tools.cli import main
from qroam.runtime.tools.demo.sabotage import Sabotage

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
COMMANDS = [
    line.split("#")[0].strip()
    for line in README.splitlines()
    if re.match(r" {4}(make|qroam|python) ", line)
]


def commands(program: str) -> list[list[str]]:
    """The arguments of every indented command line that starts with `program`."""
    return [args for name, *args in map(shlex.split, COMMANDS) if name == program]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 100
    assert len((ROOT / "docs" / "map.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_fit_a_screen(document: Path) -> None:
    lines = document.read_text().splitlines()
    assert [line for line in lines if len(line) > 120] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    here = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in targets:
        known = target.startswith("https:") or target.removeprefix("#") in here
        assert known or (document.parent / target).exists(), target


def test_the_sample_runs_as_written(tmp_path: Path) -> None:
    (sample,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", sample], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([1, 4, 64])\n"


def test_the_sample_uses_public_names_alone() -> None:
    modules = set(re.findall(r"^from (qroam[\w.]*) import", README, re.MULTILINE))
    assert modules == {"qroam.partition", "qroam.runtime"}


def test_qroam_commands_run(capsys: pytest.CaptureFixture[str]) -> None:
    given = commands("qroam")
    assert {"explain", "doctor"} <= {args[0] for args in given}
    for args in given:
        assert main(args) == 0, (args, capsys.readouterr().err)
        assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.processes
def test_the_examples_run() -> None:
    given = commands("python")
    assert {args[0] for args in given} == {"examples/dense_check.py", "examples/embed_in_engine.py"}
    for args in given:
        done = subprocess.run(
            [sys.executable, *args], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (args, done.stderr)


def test_extras_are_those_of_the_package() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    section = README.partition("## Install")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == extras.keys()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {args[0] for args in commands("make")} | set(re.findall(r"`make ([\w-]+)`", README))
    assert {"demo", "test", "test-all"} <= named <= targets


def test_every_sabotage_is_named() -> None:
    assert all(f"`{fault}`" in README or f" {fault}`" in README for fault in get_args(Sabotage))


def test_documents_name_files_that_exist() -> None:
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    paths = [f"/{path}" for path in tracked]
    for document in DOCUMENTS:
        named = re.findall(r"`([\w./-]+\.(?:py|cu|cuh|h|md|toml))`", document.read_text())
        unknown = {
            name
            for name in named
            if "NAME" not in name and not any(path.endswith(f"/{name}") for path in paths)
        }
        assert unknown == set(), document.name
