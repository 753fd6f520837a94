"""The memory order of the exchange in the code that runs: PTX of every role, compiled for sm_90.

A release orders the stores of the thread that issues it, so a barrier must stand between a CTA's
stores and the count that speaks for them; what another GPU reads is released and acquired at system
scope; and nothing is loaded before what says that it is there. Kernels without one of these must be
found out, so each rule is also checked on a copy of the kernels that breaks it.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_copies import Changes, environment_of

pytest.importorskip("triton")

import triton
import triton.language as tl

from qroam.kernels.exchange.signals import publish

BF16, F32, I64 = torch.bfloat16, torch.float32, torch.int64
ROLES = ("send", "accept", "answer", "receive")
# Of each launch the roles, on how many CTAs, and whether the answers come in parts.
LAUNCHES: dict[str, tuple[tuple[str, ...], int | None, bool]] = {
    **{role: ((role,), None, False) for role in ROLES},
    "answer_receive": (("answer", "receive"), None, False),
    "_".join(ROLES): (ROLES, None, False),
    "few_send_accept": (("send", "accept"), 16, False),
    "few_answer_parts": (("answer",), 16, True),
    "answer_parts_receive": (("answer", "receive"), None, True),
}
_PROBE = "store_and_publish"
_COUNT = re.compile(r"atom\.global\.gpu\.acq_rel\.add\.u32")
_RELEASE = re.compile(r"atom\.global\.sys\.release\.exch\.b64")
_ACQUIRE = re.compile(r"ld\.global\.sys\.acquire\.b64")
_BARRIER = re.compile(r"bar\.sync")
_STORE = re.compile(r"st\.global|st\.volatile|red\.global")
_LOAD = re.compile(r"ld\.global\.(?!sys)")
_WAIT = re.compile(r"griddepcontrol\.wait")
_LET = re.compile(r"griddepcontrol\.launch_dependents")
_MEMORY = re.compile(r"(ld|st|atom|red)\.(?!param|shared)")


@triton.jit
def _store_and_publish(to_ptr, counter_ptr, signal_ptr, word):
    at = tl.arange(0, 1024)
    tl.store(to_ptr + at, at)
    publish(counter_ptr, 4, signal_ptr, word)


def compile_roles(folder: str, *chosen: str) -> None:
    """In the child: PTX of the chosen launches, or all, and of the probe; one file each."""
    from hopper import StandIn, on_gpu, pretend_hopper

    from qroam.kernels.attend import AttendWorkspace
    from qroam.kernels.exchange.launch import exchange
    from qroam.kernels.exchange.layout import Wire
    from qroam.kernels.exchange.types import Accepted, Ends, Merge, Partials, Routes

    wire = Wire(
        world_size=2, rows=8, heads=128, query_words=36864, answer_words=32768, units=2048
    )  # fmt: skip
    launches = [name for name in LAUNCHES if not chosen or name in chosen]
    names = iter([*launches, _PROBE])

    def keep(made: Any) -> None:
        (Path(folder) / next(names)).write_text(made.asm["ptx"])

    pretend_hopper(keep)
    with StandIn():
        ends = Ends(
            wire, 0, 1, on_gpu(wire.words), on_gpu(2, dtype=I64), on_gpu(1, dtype=I64),
            on_gpu(4 * wire.chunks + 1), on_gpu(1), on_gpu(1, dtype=I64), None, 10**9, None,
        )  # fmt: skip
        routes = Routes(on_gpu(16), on_gpu(16), on_gpu(8 * 2048), on_gpu(2), on_gpu(8, 2, 2))
        out, lse = on_gpu(8, 128, 512, dtype=BF16), on_gpu(8, 128, dtype=F32)
        role: dict[str, Any] = {
            "send": on_gpu(8, 128, 576, dtype=BF16),
            "accept": Accepted(on_gpu(8, 2048), on_gpu(8), on_gpu(8), on_gpu(1)),
            "answer": Partials(out, lse, on_gpu(8, 2)),
            "receive": Merge(out[None], lse[None], out, lse, on_gpu(8)),
        }
        parts = AttendWorkspace(
            on_gpu(66, 2, 128, 512, dtype=BF16), on_gpu(66, 2, 128, dtype=F32), on_gpu(66, 2, 2),
            on_gpu(10),
        )  # fmt: skip
        for launch in launches:
            roles, ctas, in_parts = LAUNCHES[launch]
            given = {name: role[name] for name in roles}
            if in_parts:
                given["answer"] = role["answer"]._replace(parts=parts)
            if in_parts and "receive" in given:
                given["receive"] = role["receive"]._replace(parts=parts, lacking=on_gpu(8))
            exchange(ends, routes, ctas=ctas, **given)
        _store_and_publish[(4,)](
            on_gpu(1024), on_gpu(1), on_gpu(1, dtype=I64), 1 << 40, num_warps=4
        )


def compiled(folder: Path, changes: Changes, *chosen: str) -> dict[str, str]:
    """PTX by launch, of the kernels with these changes."""
    out = folder / "ptx"
    out.mkdir()
    child = subprocess.run(
        [sys.executable, __file__, str(out), *chosen],
        env=environment_of(folder, changes) | {"TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return {path.name: path.read_text() for path in out.iterdir()}


def breaches(ptx: str) -> list[str]:
    """What breaks the rules, in the order of the text."""
    found, stored, acquired, counted = [], False, False, False
    waited = _WAIT.search(ptx)
    begun = ptx[: waited.start()] if waited else ptx
    if waited and (_MEMORY.search(begun) or _LET.search(begun)):
        found.append("begins before the kernel ahead has ended")
    for line in ptx.splitlines():
        if _BARRIER.search(line):
            stored = acquired = False
        elif _COUNT.search(line):
            counted = True
            if stored:
                found.append("counts before a barrier")
        elif _RELEASE.search(line):
            if not counted:
                found.append("releases before it counts")
            counted = False
        elif _ACQUIRE.search(line):
            acquired = True
        elif _STORE.search(line):
            stored = True
        elif _LOAD.search(line) and acquired:
            found.append("loads between an acquire and its barrier")
    if ".nc." in ptx or "cp.async" in ptx:
        found.append("loads by a path that is not coherent")
    return found


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return compiled(tmp_path_factory.mktemp("shipped"), {})


@pytest.mark.slow
def test_publishing_alone(shipped: dict[str, str]) -> None:
    assert breaches(shipped[_PROBE]) == []


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES)
def test_order_of_what_is_shipped(launch: str, shipped: dict[str, str]) -> None:
    ptx, (roles, _, in_parts) = shipped[launch], LAUNCHES[launch]
    assert breaches(ptx) == []
    assert len(_WAIT.findall(ptx)) == len(_LET.findall(ptx)) == 1
    senders = {"send", "answer"} & set(roles)
    # Who answers in a launch of its own reads what an earlier one has waited for.
    waiters = {"accept", "receive"} & set(roles)
    assert len(_RELEASE.findall(ptx)) == len(senders)
    assert bool(_ACQUIRE.findall(ptx)) == bool(waiters)
    # What goes to another GPU goes in 16 bytes a thread, four times at once where it is only copied.
    wide = len(re.findall(r"st\.global\.v4\.b32", ptx))
    assert wide >= (1 if in_parts else 4 * len(senders))


BROKEN: dict[str, tuple[Changes, str]] = {
    "no barrier before the count": (
        {"exchange/signals.py": [("    tl.debug_barrier()\n", "")]},
        "counts before a barrier",
    ),
    "release at the scope of one GPU": (
        {"exchange/signals.py": [('word, sem="release", scope="sys"', 'word, sem="release", scope="gpu"')]},
        "no release",
    ),
    "count without order": (
        {"exchange/signals.py": [('sem="acq_rel", scope="gpu"', 'sem="relaxed", scope="gpu"')]},
        "releases before it counts",
    ),
    "another kernel let begin before the wait": (
        {"exchange/launch.py": [
            ("    wait(EARLY)\n    if ACCEPTS == 0:\n        let_next_begin(EARLY)",
             "    let_next_begin(EARLY)\n    wait(EARLY)")
        ]},
        "begins before the kernel ahead has ended",
    ),
    "a load before the wait": (
        {"exchange/launch.py": [
            ("    wait(EARLY)\n    if ACCEPTS == 0:\n        let_next_begin(EARLY)\n", ""),
            ("tl.load(epoch_ptr) + 1\n",
             "tl.load(epoch_ptr) + 1\n    wait(EARLY)\n    let_next_begin(EARLY)\n"),
        ]},
        "begins before the kernel ahead has ended",
    ),
    "waits that do not acquire": (
        {"exchange/signals.py": [
            ('    word = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys")\n    nobody',
             '    word = tl.atomic_add(signal_ptr, 0, sem="relaxed", scope="sys")\n    nobody'),
            ('        word = tl.atomic_add(signal_ptr, 0, sem="acquire", scope="sys")\n        if',
             '        word = tl.atomic_add(signal_ptr, 0, sem="relaxed", scope="sys")\n        if'),
        ]},
        "no acquire",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_order_is_found(name: str, tmp_path: Path) -> None:
    changes, says = BROKEN[name]
    of = compiled(tmp_path, changes, "answer_parts_receive")  # as it ends a step
    ptx = of["answer_parts_receive"]
    found = breaches(ptx) + breaches(of[_PROBE])
    found += [] if _RELEASE.search(ptx) else ["no release"]
    found += [] if _ACQUIRE.search(ptx) else ["no acquire"]
    assert says in found


if __name__ == "__main__":
    compile_roles(*sys.argv[1:])
