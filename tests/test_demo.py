"""A tiny demo, whole and sabotaged, and what becomes of instances that fail."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from qroam.runtime.tools import demo
from qroam.runtime.tools.demo import DemoConfig, DemoReport, run_demo
from qroam.runtime.tools.sabotage import Sabotage


def config(sabotage: Sabotage | None = None) -> DemoConfig:
    return DemoConfig(
        files=4, bytes_per_file=128, instances=2, agents=1, decode_tokens=4, sabotage=sabotage
    )


def run(sabotage: Sabotage | None = None) -> DemoReport:
    return run_demo(config(sabotage), lambda phase, done, total: None)


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
    monkeypatch.setattr(demo, "_instances", lambda jobs: nullcontext([]))
    monkeypatch.setattr(demo, "_results", lambda instances, report: ([], failures))
    if first == "other":
        with pytest.raises(RuntimeError, match=r"^instance 1: PeerError: gone$"):
            run()
        return
    found = run()
    assert not found.ok
    assert found.facts["failures"] == ["instance 0: the cause", "instance 1: PeerError: gone"]
    assert len(found.facts["problems"]) == 2


@pytest.mark.parametrize("changes", [{"files": 0}, {"instances": 1, "sabotage": "drop-holder"}])
def test_a_demo_that_cannot_be(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least"):
        DemoConfig(**changes)  # type: ignore[arg-type]
