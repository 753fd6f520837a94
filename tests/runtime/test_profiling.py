"""Phases of a step are ranges in the profiler, if asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from observed import CONFIG, attend, prepared

from qroam.runtime import Runtime
from qroam.runtime.observe.profiling import named_range


def test_phases_are_ranges_in_the_profiler_if_asked_for() -> None:
    def names(wanted: bool) -> set[str]:
        with Runtime.open(replace(CONFIG, profile_ranges=wanted)) as runtime:
            prepared(runtime)
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                attend(runtime, 0)
            assert {"plan", "send", "wait", "merge"} <= runtime.stats()["phase_s"].keys()
        return {event.key for event in profile.key_averages() if event.key.startswith("qroam")}

    assert {f"qroam: {phase}" for phase in ("plan", "send", "wait", "merge")} <= names(True)
    assert names(False) == set()


def test_with_cuda_the_ranges_are_nvtx_ranges_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    @contextmanager
    def nvtx(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range", nvtx)
    with named_range("merge"):
        pass
    assert seen == ["qroam: merge"]
