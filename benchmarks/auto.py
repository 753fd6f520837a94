"""Deciding on the device against the better of always-route and always-fetch: queries x entries.

Steps of one layer on two GPUs as in `step.py`, plan included: so many queries a rank, each of which
lists so many entries of the other GPU and none of its own, in lists of one width; bf16, 128 heads.
`auto` decides by the cost model with the constants of the profile "nvlink4".

    python benchmarks/auto.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from corpus import LAYOUT, QUERY, VALUE, Corpus, chosen, map_of, step_of, wire_of
from gpu import Variant, as_good_as_eager
from gpus import Rank, launch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.decide import FETCH, ROUTE, PlanMode
from qroam.runtime.gpu.step import GpuStep
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

QUERIES = (1, 4, 8, 16, 64)
UNITS = (32, 128, 512, 1024, 2048)
MODES: tuple[PlanMode, ...] = ("auto", "always-route", "always-fetch")


def checked(
    calls: Sequence[GpuStep], corpus: Corpus
) -> Callable[[Sequence[tuple[Tensor, Tensor]]], None]:
    """First and last query of the first and last call, against fp64."""

    def check(results: Sequence[tuple[Tensor, Tensor]]) -> None:
        for at in (0, len(calls) - 1):
            step, (out, fault) = calls[at], results[at]
            assert not bool(fault.any()), "coverage was found to differ"
            for item in (0, len(out) - 1):
                listed = step.units[item][step.units[item] >= 0]
                query, entries = step.query[item], corpus.entries[listed.long()]
                valid = torch.ones(1, len(entries), dtype=torch.bool, device=out.device)
                exact, _ = reference.attend(
                    query[None].double(), entries[None].double(), valid, value_dim=VALUE,
                    scale=LAYOUT.softmax_scale,
                )  # fmt: skip
                scores = query.float() @ entries.float().mT * LAYOUT.softmax_scale
                eager = scores.softmax(-1).to(entries.dtype) @ entries[:, :VALUE]
                as_good_as_eager(out[item], eager, exact[0])

    return check


def run(step: GpuStep, mode: PlanMode) -> tuple[Tensor, Tensor]:
    step.run(0, mode)
    return step.out, step.fault


def work(here: Rank) -> None:
    group = dist.group.WORLD
    assert group is not None
    shape = map_of(entry_bytes=2 * QUERY, staged=QUERIES[-1] * UNITS[-1])
    transport = SymmetricMemory(
        [wire_of(queries, UNITS[-1]) for queries in QUERIES], group=group, device=here.device,
        deadline_s=20.0, heap=shape.num_bytes,
    )  # fmt: skip
    corpus = Corpus(here, transport.heap, transport.heaps, shape)
    here.say(f"2 x {here.properties.name}, torch {torch.__version__}")
    worst = 0.0
    for channel, queries in enumerate(QUERIES):
        for units in UNITS:
            case = f"B={queries}, {units} entries"
            if not here.wants(case):
                continue
            torch.manual_seed(here.rank)
            calls = [
                step_of(here, corpus, transport, channel, queries, UNITS[-1])
                for _ in range(min(here.calls(queries * units * QUERY * 2), 8))
            ]
            for step in calls:
                step.units[:, :units] = chosen(queries, units, 1 - here.rank, here.device)
                step.query.normal_()
            torch.cuda.synchronize()
            auto, route, fetch = here.timed(
                [
                    Variant(
                        name=mode, check=checked(calls, corpus),
                        calls=[partial(run, step, mode) for step in calls],
                    )
                    for mode in MODES
                ]
            )  # fmt: skip
            calls[0].make_plan(0, "auto")
            ways = calls[0].plan.way.flatten().tolist()
            better, name = min((route, MODES[1]), (fetch, MODES[2]))
            ratio = auto.median / better.median
            worst = max(worst, ratio)
            here.say(
                f"{case:<20} auto {auto.median:7.1f}  route {route.median:7.1f}  fetch "
                f"{fetch.median:7.1f}  auto / better {ratio:.3f}  routed {ways.count(ROUTE)}, "
                f"fetched {ways.count(FETCH)}"
            )
            here.record("auto", case, auto.median, name, better.median)
    here.say(f"worst auto / better: {worst:.3f}")
    transport.close()


if __name__ == "__main__":
    sys.exit(launch(2, work, __doc__))
