"""Prometheus metrics are the counters of `stats` in another form."""

from __future__ import annotations

from typing import Any

import pytest
from observed import CONFIG, attend, prepared
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ranks import run_loopback

from qroam.runtime import Runtime
from qroam.runtime.adapters.metrics import RuntimeCollector
from qroam.runtime.transport.base import Transport


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
