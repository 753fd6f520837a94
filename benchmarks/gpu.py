"""Times on one GPU: replays of CUDA graphs, qroam's only after their results were checked.

A variant is k back-to-back calls, every one with inputs and outputs of its own, in one graph; its
time is the graph's over k. The inputs of a replay together are at least four times as large as the
L2 cache wherever k calls can be, and before every timed replay as much memory is read besides, so
nothing is found in the cache that a call did not bring there. The variants of a case take turns in
rounds; the median of all replays counts, the 10th and 90th percentiles tell the spread.

Bandwidth and matrix rate are measured in the same run; from them and the bytes and operations that
a case cannot avoid comes its floor.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from record import commit, record
from torch import Tensor

DEVICE = torch.device("cuda")
_MAX_CALLS = 128
_FEWEST_CALLS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to compute a case.

    calls: return what they write, tensors or tuples of them, and nothing else: it is poisoned
    before the checked replay. check: gets these results, raises AssertionError. host_us: planning
    on the host that is not in the time.
    """

    name: str
    calls: Sequence[Callable[[], Any]]
    check: Callable[[Sequence[Any]], None]
    host_us: float = 0.0


class Timing(NamedTuple):
    """Microseconds of one call: median, 10th and 90th percentile over the replays."""

    median: float
    low: float
    high: float


class Bench:
    """One benchmark: its command line, the ceilings of this device, a table and the result lines."""

    def __init__(self, name: str, description: str | None) -> None:
        parser = argparse.ArgumentParser(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--quick", action="store_true", help="few replays, records nothing")
        parser.add_argument("--cases", default="", help="a regular expression that cases contain")
        options = parser.parse_args()
        self.name, self.status = name, 0
        self._quick, self._pattern = options.quick, options.cases
        self._measured = "" if self._quick else commit()
        properties = torch.cuda.get_device_properties(DEVICE)
        self.device = properties.name
        self._l2_bytes = properties.L2_cache_size
        self._other = torch.ones(4 * self._l2_bytes // 4, dtype=torch.int32, device=DEVICE)
        self._started = time.perf_counter()
        self.copy_rate, self.matmul_rate, self.node_us = self._ceilings()
        print(
            f"{self.device}, torch {torch.__version__}: copy {self.copy_rate / 1e12:.2f} TB/s, "
            f"bf16 matmul {self.matmul_rate / 1e12:.0f} TFLOP/s, a kernel in a graph at least "
            f"{self.node_us:.2f} us",
            flush=True,
        )

    def wants(self, case: str) -> bool:
        return re.search(self._pattern, case) is not None

    def rotations(self, num_bytes: float) -> int:
        """How many calls with inputs of so many bytes make up a graph."""
        return min(max(round(4 * self._l2_bytes / num_bytes + 0.5), _FEWEST_CALLS), _MAX_CALLS)

    def case(
        self,
        case: str,
        ours: Variant,
        baselines: Sequence[Variant] = (),
        *,
        num_bytes: float,
        flops: float = 0.0,
    ) -> None:
        """Check, time, print and record one case.

        Args: num_bytes, flops: what one call has to move through memory and to compute.
        """
        own_graph = self._checked(case, ours)
        if own_graph is None:
            return
        right = [own_graph]
        for variant in baselines:
            try:
                graph = self._checked(case, variant)
            except RuntimeError as error:  # a library's refusal: it must not end the whole run
                reason = str(error).splitlines()[0]
                print(f"{case:<42} {variant.name:<40} not compared: {reason}", flush=True)
                continue
            right += [graph] if graph is not None else []
        own, *others = self._timings(right)
        floor_us = 1e6 * max(num_bytes / self.copy_rate, flops / self.matmul_rate)
        floor = (
            f"floor: {num_bytes / 1e6:.2f} MB at {self.copy_rate / 1e12:.2f} TB/s, {flops / 1e9:.2f} "
            f"GFLOP at {self.matmul_rate / 1e12:.0f} TFLOP/s, both measured in this run"
        )
        print(
            f"{case:<42} {ours.name:<40} {shown(own)}  {floor_us / own.median:6.1%} of the floor, "
            f"{num_bytes / own.median / 1e6:.2f} TB/s, {flops / own.median / 1e6:.0f} TFLOP/s",
            flush=True,
        )
        self._record(case, "time", own.median, floor, floor_us)
        for graph, timing in zip(right[1:], others, strict=True):
            variant = graph.variant
            host = f", host planning {variant.host_us:.0f} us" if variant.host_us else ""
            ratio = timing.median / own.median
            print(f"{'':<42} {variant.name:<40} {shown(timing)}  ratio {ratio:.2f}{host}")
            self._record(case, "time", own.median, variant.name, timing.median)
            self._record(case, "time, 90th percentile", own.high, variant.name, timing.high)
            if variant.host_us:
                planned = timing.median + variant.host_us
                self._record(case, "time with host planning", own.median, variant.name, planned)

    def close(self) -> int:
        """Print how long it all took; the exit status, 1 if a result was wrong."""
        print(f"{self.name}: {time.perf_counter() - self._started:.0f} s", flush=True)
        return self.status

    def _checked(self, case: str, variant: Variant) -> Graph | None:
        graph = Graph(variant)
        graph.poison()
        graph.replay()
        torch.cuda.synchronize()
        try:
            variant.check(graph.results)
        except AssertionError as error:
            self.status = 1
            print(f"{case:<42} {variant.name:<40} WRONG, not timed: {error}", flush=True)
            return None
        return graph

    def _timings(self, graphs: Sequence[Graph]) -> list[Timing]:
        rounds, replays = (2, 5) if self._quick else (6, 12)
        until = time.perf_counter() + (0.02 if self._quick else 0.1)
        while time.perf_counter() < until:
            for graph in graphs:
                graph.replay()
            torch.cuda.synchronize()
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
        for _ in range(rounds):
            for graph, measured in zip(graphs, pairs, strict=True):
                graph.replay()
                for _ in range(replays):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    self._other.sum()
                    start.record()
                    graph.replay()
                    end.record()
                    measured.append((start, end))
            torch.cuda.synchronize()
        return [
            timing_of([1e3 * start.elapsed_time(end) / graph.calls for start, end in measured])
            for graph, measured in zip(graphs, pairs, strict=True)
        ]

    def _ceilings(self) -> tuple[float, float, float]:
        """Bytes read and written a second, bf16 operations a second, us of a kernel in a graph."""
        size, side = 1 << 30, 8192
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        words, result = source.view(torch.int32), target.view(torch.int32)
        a, b = (torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        c = torch.empty_like(a)
        one = torch.zeros(1, device=DEVICE)
        graphs = [
            Graph(Variant(name=name, calls=[call] * calls, check=lambda results: None))
            for name, calls, call in (
                ("copy", 4, lambda: target.copy_(source)),
                ("elementwise copy", 4, lambda: torch.neg(words, out=result)),
                ("matmul", 4, lambda: torch.mm(a, b, out=c)),
                ("node", 64, lambda: one.add_(1.0)),
            )
        ]
        copy, elementwise, matmul, node = self._timings(graphs)
        copy = min(copy, elementwise)  # the driver's copy is not everywhere the faster one
        return 2e6 * size / copy.median, 2e6 * side**3 / matmul.median, node.median

    def _record(
        self, case: str, metric: str, value: float, baseline: str, baseline_value: float
    ) -> None:
        if self._measured:
            record(
                self.name,
                case=case,
                metric=metric,
                value=value,
                unit="us",
                baseline=baseline,
                baseline_value=baseline_value,
                device=self.device,
                measured=self._measured,
            )


class Graph:
    """A variant's calls, warmed up and captured, and what they returned."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.calls = variant, len(variant.calls)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for call in variant.calls:
                call()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.results = [call() for call in variant.calls]

    def poison(self) -> None:
        """Fill the results, so that what a replay does not write shows up."""
        for tensor in _tensors(self.results):
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    def replay(self) -> None:
        self._graph.replay()


def host_us(plan: Callable[[], object], *, times: int = 11) -> float:
    """Median microseconds of a host function that ends with the device idle."""
    taken = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        plan()
        torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - start))
    return sorted(taken)[times // 2]


def copy_of(num_bytes: float, *, calls: int) -> Variant:
    """Torch's copy that reads and writes so many bytes together, what any kernel can hope for."""

    def call() -> Callable[[], object]:
        source = torch.randint(0, 255, (round(num_bytes / 2),), dtype=torch.uint8, device=DEVICE)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Variant(
        name="a copy of as many bytes",
        calls=[call() for _ in range(calls)],
        check=lambda results: None,
    )


def as_good_as_eager(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of eager torch in the same dtype, plus a rounding.

    Raises: AssertionError with both errors; NaN anywhere is one.
    """

    def worst(found: Tensor) -> float:
        return float((found.double() - exact).abs().max())

    rounding = torch.finfo(eager.dtype).eps * float(exact.abs().max())
    error, allowed = worst(actual), 2 * (worst(eager) + rounding)
    assert error <= allowed, f"error {error:.2e}, allowed are {allowed:.2e}"


def _tensors(results: object) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, (tuple, list)):
        for result in results:
            yield from _tensors(result)


def timing_of(microseconds: list[float]) -> Timing:
    ordered = sorted(microseconds)
    last = len(ordered) - 1
    return Timing(*(ordered[round(last * share)] for share in (0.5, 0.1, 0.9)))


def shown(timing: Timing) -> str:
    return f"{timing.median:8.2f} us [{timing.low:.2f}, {timing.high:.2f}]"
