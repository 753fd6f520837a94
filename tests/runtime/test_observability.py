"""What can be seen from outside: counters, metrics, decision lines and ranges, against what happened."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ranks import run_loopback

from qroam.partition.presets import named_layout, uniform_model
from qroam.partition.residence import Histogram, Places, Residence
from qroam.runtime import CoverageError, PeerError, Runtime, RuntimeConfig
from qroam.runtime.adapters.metrics import RuntimeCollector
from qroam.runtime.cpu import answer as holder
from qroam.runtime.cpu import step
from qroam.runtime.observe.decision_log import decision_groups
from qroam.runtime.observe.explain import DecisionLine
from qroam.runtime.observe.profiling import named_range
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Message
from qroam.runtime.world import World

TOKENS = 300
CONFIG = RuntimeConfig(
    model=uniform_model(named_layout("mla-tiny"), 1),
    max_blocks=24,
    block_tokens=16,
    lease_entries=48,
    mode="always-fetch",
    deadline_s=5.0,
)


def prepared(runtime: Runtime) -> None:
    g = torch.Generator().manual_seed(1)
    runtime.add_document("d", tokens=TOKENS)
    entries = torch.randn(TOKENS, 80, generator=g)
    runtime.load_document("d", 0, entries, torch.randn(TOKENS, 32, generator=g))


def attend(runtime: Runtime, first: int, count: int = 64) -> None:
    """Three queries over `count` entries of the document, from the `first` on."""
    g = torch.Generator().manual_seed(2)
    ids = torch.arange(first, first + count, dtype=torch.int32).repeat(3, 1)
    scope = runtime.scope(documents=["d"], queries=3)
    runtime.attend(0, torch.randn(3, 4, 80, generator=g), runtime.selection(ids, scope))


def samples(runtime: Runtime) -> dict[tuple[str, str], float]:
    """What a scrape gives: (name, labels but rank and lane) to value; those are always the same."""
    registry = CollectorRegistry()
    registry.register(RuntimeCollector(runtime))
    text = generate_latest(registry).decode()
    found = [s for family in text_string_to_metric_families(text) for s in family.samples]
    stats = runtime.stats()
    who = {"rank": str(stats["rank"]), "lane": str(stats["lane"])}
    assert all(who.items() <= sample.labels.items() for sample in found)
    return {
        (s.name, ",".join(f"{k}={v}" for k, v in sorted(s.labels.items()) if k not in who)): s.value
        for s in found
    }


def test_metrics_are_the_stats_in_another_form() -> None:
    def work(end: Transport) -> tuple[dict[str, Any], dict[tuple[str, str], float]]:
        with Runtime.open(CONFIG, end) as runtime:
            prepared(runtime)
            for first in (0, 0, 100, 200, 0):
                attend(runtime, first)
            return runtime.stats(), samples(runtime)

    for stats, seen in run_loopback(2, work):
        assert seen["qroam_steps_total", ""] == stats["steps"] == 5
        assert seen["qroam_queries_total", ""] == stats["queries"] == 15
        for asked, ways in stats["decisions"].items():
            for way, count in ways.items():
                assert seen["qroam_decisions_total", f"holder={asked},way={way}"] == count
        for kind, count in stats["bytes_sent"].items():
            assert seen["qroam_sent_bytes_total", f"phase={kind}"] == count > 0
        (peer,) = stats["bytes_to"]
        assert seen["qroam_sent_to_bytes_total", f"peer={peer}"] == stats["bytes_to"][peer]
        assert stats["bytes_to"][peer] == sum(stats["bytes_sent"].values())
        assert stats["leases"]["hit"] > 0
        assert stats["leases"]["evicted"] > 0
        for event, count in stats["leases"].items():
            assert seen["qroam_leases_total", f"event={event}"] == count
        for phase, seconds in stats["phase_s"].items():
            assert seen["qroam_seconds_total", f"phase={phase}"] == pytest.approx(seconds)
        assert seen["qroam_failures_total", "kind=coverage"] == 0
        assert seen["qroam_failures_total", "kind=deadline"] == 0
        assert seen["qroam_pool_bytes", "kind=pool"] == stats["pool_bytes"]
        for name in ("lifetime", "reuse_gap"):
            for kind in ("block", "lease"):
                histogram = stats[name][kind]
                total = sum(histogram["counts"])
                assert seen[f"qroam_{name}_seconds_count", f"of={kind}"] == total
                assert seen[f"qroam_{name}_seconds_bucket", f"le=+Inf,of={kind}"] == total
                first = seen[f"qroam_{name}_seconds_bucket", f"le=0.001,of={kind}"]
                assert first == histogram["counts"][0]
        assert sum(stats["lifetime"]["lease"]["counts"]) == stats["leases"]["evicted"]
        assert sum(stats["reuse_gap"]["lease"]["counts"]) > 0
        assert sum(stats["reuse_gap"]["block"]["counts"]) > 0


def test_metrics_say_the_lane_and_count_by_instance() -> None:
    def work(end: Transport) -> tuple[int, int, dict[tuple[str, str], float]]:
        heads = (2, 2) if end.rank % 2 == 0 else (0, 2)  # lanes are numbered by their heads
        with Runtime.open(CONFIG, end, heads=heads) as runtime:
            runtime.idle_attend(0)
            return runtime.stats()["lane"], runtime.rank, samples(runtime)

    found = run_loopback(6, work)
    assert [(lane, rank) for lane, rank, _ in found] == [
        (1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)
    ]  # fmt: skip
    for _, rank, seen in found:
        sent = {key[1] for key in seen if key[0] == "qroam_sent_to_bytes_total"}
        assert sent == {f"peer={peer}" for peer in range(3) if peer != rank}


def test_a_released_request_ends_the_life_of_its_blocks() -> None:
    with Runtime.open(CONFIG) as runtime:
        request = runtime.request()
        runtime.append(request, 40)
        assert sum(runtime.stats()["lifetime"]["block"]["counts"]) == 0
        runtime.release(request)
        assert sum(runtime.stats()["lifetime"]["block"]["counts"]) == 3


def test_lifetime_and_reuse_gap_by_the_callers_clock() -> None:
    residence = Residence()
    places = Places(4, residence)
    places.take(torch.tensor([0, 2]), 100.0)
    places.use(torch.tensor([0]), 101.0)  # the first use has no gap
    places.use(torch.tensor([0, 2]), 101.5)
    places.leave(torch.tensor([0, 1]), 160.0)  # place 1 was never taken
    places.take(torch.tensor([0]), 161.0)
    places.use(torch.tensor([0]), 200.0)  # somebody else by now: no gap to the one before
    gap, life = residence.reuse_gap.plain(), residence.lifetime.plain()
    assert gap["sum_s"] == 0.5
    assert sum(gap["counts"]) == 1
    assert life["sum_s"] == 60.0
    assert dict(zip(life["bounds_s"], life["counts"], strict=True))[100.0] == 1


def test_a_bound_counts_what_is_equal_to_it() -> None:
    histogram = Histogram((1.0, 2.0, float("inf")))
    histogram.add(torch.tensor([0.0, 1.0, 1.5, 2.0, 9.0], dtype=torch.float64))
    assert histogram.plain()["counts"] == [2, 2, 1]


NO_FAILURES = {"coverage": 0, "deadline": 0, "failover": 0, "late": 0}


def test_coverage_failures_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    right = holder.answer_attend

    def wrong(world: World, message: Message) -> Any:
        answer = right(world, message)
        return {n: rows * 0 if n.endswith("mark") else rows for n, rows in answer.items()}

    monkeypatch.setattr(step, "answer_attend", wrong)

    def work(end: Transport) -> dict[str, int]:
        with Runtime.open(CONFIG, end) as runtime:
            prepared(runtime)
            with pytest.raises(CoverageError):
                attend(runtime, 0)
            failures: dict[str, int] = runtime.stats()["failures"]
            return failures

    assert run_loopback(2, work) == [NO_FAILURES | {"coverage": 1}] * 2


def test_deadline_expiries_are_counted() -> None:
    def work(end: Transport) -> dict[str, int]:
        with Runtime.open(replace(CONFIG, deadline_s=1.0), end) as runtime:
            if end.rank == 0:  # rank 1 never comes
                with pytest.raises(PeerError, match="no answer"):
                    runtime.idle_attend(0)
            failures: dict[str, int] = runtime.stats()["failures"]
            return failures

    ends = LoopbackTransport.world(2, deadline_s=1.0)
    assert run_loopback(2, work, transports=ends)[0] == NO_FAILURES | {"deadline": 1}


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
