"""Decision lines in the log say what `explain` says, and only if asked for."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from observed import CONFIG, attend, prepared
from ranks import run_loopback

from qroam.runtime import Runtime
from qroam.runtime.observe.decision_log import decision_groups
from qroam.runtime.observe.explain import DecisionLine
from qroam.runtime.transport.base import Transport


def test_decision_lines_say_what_explain_says(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="qroam.decisions")

    def work(end: Transport) -> list[DecisionLine]:
        # Each rank's own choice: rank 1 does not log.
        config = replace(CONFIG, mode="random", log_decisions=end.rank == 0)
        with Runtime.open(config, end) as runtime:
            prepared(runtime)
            attend(runtime, 0)
            return runtime.explain()

    lines, _ = run_loopback(2, work)
    logged = [json.loads(record.getMessage()) for record in caplog.records]
    assert logged
    assert {line["rank"] for line in logged} == {0}
    assert {(line["event"], line["step"]) for line in logged} == {("decision", 1)}
    fabric = "loopback (2 of 15 constants assumed)"
    assert {line["fabric"] for line in logged} == {line.fabric for line in lines} == {fabric}
    pairs, units = Counter[Any](), Counter[Any]()
    for line in lines:
        pairs[line.holder, line.way, line.reason] += 1
        units[line.holder, line.way, line.reason] += line.units
    keys = [(line["holder"], line["way"], line["reason"]) for line in logged]
    assert dict(zip(keys, (line["pairs"] for line in logged), strict=True)) == pairs
    assert dict(zip(keys, (line["units"] for line in logged), strict=True)) == units


def test_the_margin_of_a_group_is_its_smallest() -> None:
    lines = [
        DecisionLine(0, q, 0, 1, 5, "FETCH", "WIRE", 0.5 - q / 10, 9.0, 7.0, "mine (measured)")
        for q in range(3)
    ]
    (group,) = decision_groups(lines, rank=2, step=4)
    assert (group["pairs"], group["units"], group["margin"]) == (3, 15, 0.3)
    assert group["fabric"] == "mine (measured)"


def test_nothing_is_logged_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Runtime.open(CONFIG) as runtime:
        prepared(runtime)
        attend(runtime, 0)
    assert not [record for record in caplog.records if record.name.startswith("qroam")]
