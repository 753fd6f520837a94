"""Times on several GPUs of one host: a process each, graphs replayed in step, results checked first.

As in `gpu.py`: k back-to-back calls with inputs of their own in one graph, its time over k, the
variants of a case in turns, as much memory as four L2 caches read before every replay. What
the ranks take is the slowest one's median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from gpu import Graph, Timing, Variant, shown, timing_of
from record import commit, record

_ROUNDS, _REPLAYS = 6, 12
_MAX_CALLS = 128


class Options(NamedTuple):
    quick: bool
    pattern: str
    measured: str  # the commit, empty where nothing is recorded


def launch(world_size: int, work: Callable[[Rank], None], description: str | None) -> int:
    """Run `work` on every rank; the exit status."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few replays, records nothing")
    parser.add_argument("--cases", default="", help="a regular expression that cases contain")
    given = parser.parse_args()
    options = Options(given.quick, given.cases, "" if given.quick else commit())
    if torch.cuda.device_count() < world_size:
        print(f"needs {world_size} GPUs, found {torch.cuda.device_count()}")
        return 1
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_main, args=(r, world_size, store, work, options, sys.argv))
            for r in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        running = list(ranks)
        while running and not any(rank.exitcode for rank in ranks):
            wait([rank.sentinel for rank in running])
            running = [rank for rank in running if rank.exitcode is None]
        for rank in running:  # one failed: the others would wait for it
            rank.kill()
            rank.join()
    return max(abs(rank.exitcode or 0) for rank in ranks)


def _main(
    rank: int,
    world_size: int,
    store: str,
    work: Callable[[Rank], None],
    options: Options,
    argv: list[str],
) -> None:
    sys.argv = argv  # the result lines say how they were made
    os.environ |= {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    work(Rank(rank, world_size, options))
    dist.destroy_process_group()


class Rank:
    """This process's part of a benchmark; rank 0 prints and records."""

    def __init__(self, rank: int, world_size: int, options: Options) -> None:
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cuda", rank)
        self.properties = torch.cuda.get_device_properties(self.device)
        self._options = options
        words = self.properties.L2_cache_size  # four caches of 4-byte words
        self._other = torch.ones(words, dtype=torch.int32, device=self.device)

    def wants(self, case: str) -> bool:
        return re.search(self._options.pattern, case) is not None

    def calls(self, num_bytes: float) -> int:
        """How many calls that touch so many bytes make up a graph; four L2 caches, or 128 calls."""
        if self._options.quick:
            return 8
        return min(max(round(4 * self.properties.L2_cache_size / num_bytes + 0.5), 8), _MAX_CALLS)

    def timed(self, variants: Sequence[Variant]) -> list[Timing]:
        """Of each variant the slowest rank's timing, after its results were checked."""
        graphs = []
        for variant in variants:
            graph = Graph(variant)
            graph.poison()
            torch.cuda.synchronize()
            dist.barrier()
            graph.replay()
            torch.cuda.synchronize()
            variant.check(graph.results)
            graphs.append(graph)
        rounds = 2 if self._options.quick else _ROUNDS
        pairs: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in graphs]
        for _ in range(rounds):
            for graph, measured in zip(graphs, pairs, strict=True):
                dist.barrier()
                graph.replay()
                for _ in range(_REPLAYS):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    self._other.sum()
                    start.record()
                    graph.replay()
                    end.record()
                    measured.append((start, end))
                torch.cuda.synchronize()
        own = [
            timing_of([1e3 * start.elapsed_time(end) / graph.calls for start, end in measured])
            for graph, measured in zip(graphs, pairs, strict=True)
        ]
        everyone: list[list[Timing]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(everyone, own)
        return [max(of_ranks) for of_ranks in zip(*everyone, strict=True)]

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def report(
        self, bench: str, case: str, ours: tuple[str, Timing], baselines: dict[str, Timing]
    ) -> None:
        """Print and record our variant against each of the others."""
        name, own = ours
        self.say(f"{case:<28} {name:<58} {shown(own)}")
        for baseline, timing in baselines.items():
            ratio = timing.median / own.median
            self.say(f"{'':<28} {baseline:<58} {shown(timing)}  ratio {ratio:.2f}")
            self.record(bench, f"{case}, {name}", own.median, baseline, timing.median)

    def record(
        self, bench: str, case: str, value: float, baseline: str, baseline_value: float
    ) -> None:
        if self.rank == 0 and self._options.measured:
            record(
                bench,
                case=case,
                metric="time",
                value=value,
                unit="us",
                baseline=baseline,
                baseline_value=baseline_value,
                device=f"{self.world_size} x {self.properties.name}",
                measured=self._options.measured,
            )
