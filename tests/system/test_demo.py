"""A tiny demo, whole and sabotaged, and what becomes of instances that fail."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from qroam.runtime.gpu.limits import GPU_MODES
from qroam.runtime.tools.demo import run as demo
from qroam.runtime.tools.demo.gpu import large_facts, large_lines
from qroam.runtime.tools.demo.run import DemoConfig, DemoReport, run_demo
from qroam.runtime.tools.demo.sabotage import Sabotage


def config(sabotage: Sabotage | None = None) -> DemoConfig:
    return DemoConfig(
        files=4, bytes_per_file=128, instances=2, agents=1, decode_tokens=4, sabotage=sabotage
    )


def run(sabotage: Sabotage | None = None) -> DemoReport:
    return run_demo(config(sabotage), lambda phase, done, total: None)


@pytest.mark.slow
@pytest.mark.processes
def test_a_tiny_demo_is_exact() -> None:
    found = run()
    assert found.ok, found.facts["problems"]
    facts = json.loads(found.to_json())
    assert facts["ok"] is True
    assert (facts["problems"], facts["failures"]) == ([], [])
    assert facts["corpus"] == {"files": 4, "tokens": 512}
    assert facts["tokens_equal"] == facts["tokens_compared"] == 2 * 4
    assert 0 <= facts["max_logit_error"] <= demo.MAX_LOGIT_ERROR
    assert set(facts["replay_error"]) == {"always-route", "always-fetch"}
    assert all(count > 0 for count in facts["bytes"].values())
    assert [len(facts[name]) for name in ("decisions", "memory")] == [2, 2]
    assert found.render().splitlines()[-1] == "result      exact"


@pytest.mark.slow
@pytest.mark.processes
def test_a_dropped_holder_is_found_by_comparing() -> None:
    found = run("drop-holder")
    assert not found.ok
    assert found.facts["failures"] == []
    problems = found.facts["problems"]
    assert any("tokens differ" in p or "a logit is off" in p for p in problems), problems
    assert found.render().splitlines()[-1] == "result      NOT exact"


@pytest.mark.parametrize("first", ["coverage", "other"])
def test_only_a_wrong_coverage_is_a_finding(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other failures of instances are errors: the demo did not run."""
    failures = [demo._Failure(1, "other", "PeerError: gone"), demo._Failure(0, first, "the cause")]
    monkeypatch.setattr(demo, "_instances", lambda jobs, run: nullcontext([]))
    monkeypatch.setattr(demo, "_results", lambda instances, report: ([], failures))
    if first == "other":
        with pytest.raises(RuntimeError, match=r"^instance 1: PeerError: gone$"):
            run()
        return
    found = run()
    assert not found.ok
    assert found.facts["failures"] == ["instance 0: the cause", "instance 1: PeerError: gone"]
    assert len(found.facts["problems"]) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": 0}, "at least"),
        ({"instances": 1, "sabotage": "drop-holder"}, "at least 2 instances, got 1"),
        (
            {"device": "cuda", "instances": 2, "sabotage": "wrong-row"},
            "allowed with device cpu only",
        ),
        ({"device": "cuda", "instances": 99}, "a GPU for each of 99 instances, torch finds"),
    ],
)
def test_invalid_sizes_of_a_demo(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoConfig(**changes)  # type: ignore[arg-type]


def test_what_steps_on_gpus_add_to_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[dict[str, Any]] = [
        {"rank": rank, "error": 0.2 + rank, "checked": 24, "step_us": dict.fromkeys(GPU_MODES, 9.0)}
        for rank in range(2)
    ]
    facts = large_facts("bf16", results)
    assert (facts["error"], facts["checked"], facts["step_us"]["auto"]) == (1.2, 48, 9.0)
    lines = list(large_lines([facts]))
    assert "48 outputs within 1.20 of the allowed error" in lines[1]
    assert list(large_lines([])) == []

    monkeypatch.setattr(demo, "_instances", lambda jobs, run: nullcontext(jobs))
    monkeypatch.setattr(demo, "_results", lambda jobs, report: (results[: len(jobs)], []))
    found = demo._large(config(), lambda phase, done, total: None)
    assert [each["codec"] for each in found] == ["bf16", "fp8_v32"]


@pytest.mark.gpu
@pytest.mark.parametrize("instances", [1, 2])
def test_a_tiny_demo_on_gpus_is_exact(instances: int) -> None:
    if torch.cuda.device_count() < instances:
        pytest.skip(f"needs {instances} CUDA devices")
    given = replace(config(), device="cuda", instances=instances)
    found = run_demo(given, lambda phase, done, total: None)
    assert found.ok, found.facts["problems"]
    assert found.facts["device"] == "cuda"
    assert [each["codec"] for each in found.facts["large"]] == ["bf16", "fp8_v32"]
