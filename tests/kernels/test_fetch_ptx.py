"""How the fetch reads other ranks' memory, in the code that runs: its PTX, compiled for sm_90.

Rows go in words of 16 bytes, all of a tile on their way before the first of them is stored, and by no
path that could bring what a cache has kept. A copy that loses the 16 bytes must be found out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_copies import Changes, environment_of

pytest.importorskip("triton")

SIZES = (656, 1152, 2304)
_LOAD = re.compile(r"ld\.global\.v4\.b32")
_STORE = re.compile(r"st\.global\.v4\.b32")


def compile_sizes(folder: str) -> None:
    """In the child: PTX of a fetch of entries of each size; one file each."""
    from hopper import StandIn, fetch, pretend_hopper

    sizes = iter(SIZES)

    def keep(made: Any) -> None:
        (Path(folder) / str(next(sizes))).write_text(made.asm["ptx"])

    pretend_hopper(keep)
    for size in SIZES:
        with StandIn():
            fetch(entry_bytes=size)


def compiled(folder: Path, changes: Changes) -> dict[int, str]:
    """PTX by size of an entry, of the kernels with these changes."""
    out = folder / "ptx"
    out.mkdir()
    child = subprocess.run(
        [sys.executable, __file__, str(out)],
        env=environment_of(folder, changes) | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return {size: (out / str(size)).read_text() for size in SIZES}


def breaches(ptx: str) -> list[str]:
    """What breaks the rules."""
    loads, stores = ([m.start() for m in which.finditer(ptx)] for which in (_LOAD, _STORE))
    found = []
    if len(loads) < 16 or len(stores) < 16:
        found.append("rows in words of less than 16 bytes")
    elif max(loads) > min(stores):
        found.append("stores before all loads of a tile")
    if ".nc" in ptx or "cp.async" in ptx:
        found.append("loads by a path that is not coherent")
    return found


@pytest.mark.slow
def test_what_is_shipped(tmp_path: Path) -> None:
    for ptx in compiled(tmp_path, {}).values():
        assert breaches(ptx) == []
        assert "bar.sync" not in ptx  # a program is one warp: nobody waits for another


@pytest.mark.slow
def test_a_lost_alignment_is_found(tmp_path: Path) -> None:
    said = "tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)"
    too_early = "tl.multiple_of(address, 16).to(tl.pointer_type(tl.int32))"
    for ptx in compiled(tmp_path, {"fetch.py": [(said, too_early)]}).values():
        assert "rows in words of less than 16 bytes" in breaches(ptx)


if __name__ == "__main__":
    compile_sizes(*sys.argv[1:])
