"""Copies of the kernels with a text changed: mutants that tests must catch, and added delays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from qroam.kernels import checks

Changes = Mapping[str, Sequence[tuple[str, str]]]  # by file, (text, what stands for it)


def environment_of(folder: Path, changes: Changes) -> dict[str, str]:
    """For a child process in which `qroam.kernels` is a copy in `folder` with these changes."""
    copy = folder / "qroam" / "kernels"
    shutil.copytree(
        Path(checks.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, replacements in changes.items():
        text = (copy / name).read_text()
        for old, new in replacements:
            if text.count(old) != 1:
                raise ValueError(f"{name} has {old!r} {text.count(old)} times, once is needed")
            text = text.replace(old, new)
        (copy / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
