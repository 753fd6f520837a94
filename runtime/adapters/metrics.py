"""Prometheus metrics of a runtime (extra `metrics`): `Runtime.stats()` in another form, nothing more.

    from prometheus_client import REGISTRY, start_http_server
    REGISTRY.register(RuntimeCollector(runtime))
    start_http_server(9400)

Whatever is counted is counted in `stats()`; it is read only when a scrape asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any, TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from ..runtime import Runtime

_Counts: TypeAlias = dict[tuple[str, ...], float]
_Who: TypeAlias = tuple[str, str]
_WHO = ("rank", "lane")


class RuntimeCollector(Collector):
    """Metrics of one rank, all labelled with it and its lane; with lanes, ranks are instances.

    qroam_steps_total, qroam_queries_total          attention steps, and queries in them
    qroam_decisions_total{holder, way}              (item, holder) pairs by what was done
    qroam_sent_bytes_total{phase}, qroam_sent_messages_total{phase}, qroam_sent_to_bytes_total{peer}
    qroam_seconds_total{phase}                      time of this rank by phase of a step
    qroam_leases_total{event}                       entries hit, and entries evicted
    qroam_failures_total{kind}                      coverage failures, deadline expiries, requests planned
                                                    again (failover), messages of former incarnations (late)
    qroam_pool_bytes{kind}                          pool (blocks, held or free), lease, held
    qroam_lifetime_seconds{of}, qroam_reuse_gap_seconds{of}     histograms of blocks and leases
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        stats = self._runtime.stats()
        who = (str(stats["rank"]), str(stats["lane"]))
        for name, text in (("steps", "Attention steps."), ("queries", "Queries of all steps.")):
            yield _counter(name, text, (), {(): stats[name]}, who)
        ways: _Counts = {
            (str(holder), way): count
            for holder, chosen in stats["decisions"].items()
            for way, count in chosen.items()
        }
        yield _counter("decisions", "Items by holder and way.", ("holder", "way"), ways, who)
        for name, text, label, key in (
            ("sent_bytes", "Bytes sent, by kind of message.", "phase", "bytes_sent"),
            ("sent_to_bytes", "Bytes sent, by receiver.", "peer", "bytes_to"),
            ("sent_messages", "Messages sent, by kind.", "phase", "messages_sent"),
            ("seconds", "Time spent, by phase of a step.", "phase", "phase_s"),
            ("leases", "Leased entries, by what happened to them.", "event", "leases"),
            ("failures", "Steps that failed, by kind.", "kind", "failures"),
        ):
            counts: _Counts = {(str(kind),): count for kind, count in stats[key].items()}
            yield _counter(name, text, (label,), counts, who)
        gauge = GaugeMetricFamily(
            "qroam_pool_bytes", "Bytes of blocks and leases.", labels=(*_WHO, "kind")
        )
        for kind, key in (
            ("pool", "pool_bytes"),
            ("lease", "lease_bytes"),
            ("held", "block_bytes"),
        ):
            gauge.add_metric((*who, kind), stats[key])
        yield gauge
        for name, text in (
            ("lifetime", "From being stored to being given up."),
            ("reuse_gap", "From one use to the next."),
        ):
            yield _histogram(name, text, stats[name], who)


def _counter(name: str, text: str, labels: tuple[str, ...], counts: _Counts, who: _Who) -> Metric:
    family = CounterMetricFamily(f"qroam_{name}", text, labels=(*_WHO, *labels))
    for values, count in counts.items():
        family.add_metric((*who, *values), count)
    return family


def _histogram(name: str, text: str, by_kind: dict[str, dict[str, Any]], who: _Who) -> Metric:
    family = HistogramMetricFamily(f"qroam_{name}_seconds", text, labels=(*_WHO, "of"))
    for kind, histogram in by_kind.items():
        bounds = [
            "+Inf" if bound == float("inf") else f"{bound:g}" for bound in histogram["bounds_s"]
        ]
        buckets = list(zip(bounds, accumulate(histogram["counts"]), strict=True))
        family.add_metric((*who, kind), buckets=buckets, sum_value=histogram["sum_s"])
    return family
