"""A short run of the fuzzer over every reader, and that it finds what is planted."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import fuzz_manifest
import fuzz_targets
import fuzzing
import msgpack
import pytest
from effort import examples
from fuzzing import Target, fuzz

from qroam.partition.snapshot import format
from qroam.runtime import world, writes
from qroam.runtime.cost import profile
from qroam.runtime.cpu import answer
from qroam.runtime.transport import messages

QUICK = {
    fuzz_targets.WIRE: 4000,
    fuzz_targets.ABORT: 2000,
    fuzz_targets.OPENING: 1000,
    fuzz_manifest.MANIFEST: 2000,
    fuzz_targets.PROFILE: 600,
    fuzz_targets.SETTINGS: 1000,
    fuzz_targets.JOINING: 1500,
    fuzz_targets.HOLDER: 700,
    fuzz_targets.REQUESTER: 150,
}


def test_every_target_is_run() -> None:
    assert set(QUICK) == {target for target, _ in fuzz_targets.TARGETS}
    assert sum(share for _, share in fuzz_targets.TARGETS) == pytest.approx(1.0)


@pytest.mark.parametrize("target", QUICK, ids=lambda target: str(target.name))
def test_nothing_crashes_hangs_or_is_misread(target: Target) -> None:
    inputs = examples(QUICK[target], quick=QUICK[target] // 4)
    found = fuzz(target, range(inputs), seed=0)
    assert found.bad == 0, "\n".join(found.said)
    # A fuzzer whose inputs are all refused, or all accepted, looks at little.
    assert min(found.counts["refused"], found.counts["accepted"]) >= 0.05 * inputs


def test_an_input_is_a_function_of_seed_target_and_number() -> None:
    def draws(seed: int) -> list[Any]:
        return [fuzz_targets.draw_message(Random(f"{seed} wire {n}")) for n in range(20)]

    assert draws(3) == draws(3) != draws(4)


def loops(_: object) -> None:
    while True:
        time.sleep(0.01)


def raises(_: object) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(("read", "outcome"), [(loops, "hang"), (raises, "crash")])
def test_a_reader_that_loops_or_raises_is_found(
    read: Callable[[object], None], outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fuzzing, "PATIENCE_S", 0.05)
    target = Target(name="bad", draw=Random.random, read=read, check=lambda _given, _value: None)
    assert fuzz(target, range(2), seed=0).counts == {outcome: 2}


def believed(*_args: object, **_kwargs: object) -> None:
    """In place of a check: everything is fine."""


def as_it_comes(raw: bytes) -> Any:
    return msgpack.unpackb(raw, strict_map_key=False)


def as_it_is(name: str) -> bool:
    return "-entries-" in name or "-index-" in name


# Each check that is taken away must be missed.
PLANTED: dict[str, tuple[Target, int, Any, str, object]] = {
    "header fields": (fuzz_targets.WIRE, 1000, messages, "_unpack", as_it_comes),
    "ids in range": (fuzz_targets.HOLDER, 500, answer, "check_ids", believed),
    "pushed rows": (fuzz_targets.HOLDER, 500, writes.Writes, "_check_rows", believed),
    "unknown columns": (fuzz_targets.REQUESTER, 150, world, "check_columns", believed),
    "blocks in files": (fuzz_manifest.MANIFEST, 1000, format, "check_located", believed),
    "names of files": (fuzz_manifest.MANIFEST, 1000, format, "is_file_name", as_it_is),
    "believable numbers": (fuzz_targets.PROFILE, 300, profile._Unit, "check", believed),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_missing_check_is_found(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, inputs, where, name, instead = PLANTED[planted]
    target.draw(Random(0))  # what is recorded once, is recorded whole
    monkeypatch.setattr(where, name, instead)
    assert fuzz(target, range(inputs), seed=0).bad > 0
