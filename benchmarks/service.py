"""Service mode against in-step mode on loopback: the same queries over the same corpus, same plan.

Four ranks, a thread each, 8 queries x 256 units x 16 heads (MLA, 512 + 64 columns, fp32). In step all
ranks attend together; in service each asks when it likes and a thread beside it answers. With one
rank asking, the others idle in step, and only serve in service. Rounds of both modes alternate; the
time of a step is a round's wall time by its steps. A case is timed only after every output of
both modes was found equal to eager attention. Exits with 1 if service takes over 1.3 x the time.

    python benchmarks/service.py [--rounds 9] [--steps 20]
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median

import torch
from record import commit, cpu, record
from torch import Tensor

from qroam.partition.layout import Layout
from qroam.partition.presets import mla, uniform_model
from qroam.runtime import LoopbackTransport, Runtime, RuntimeConfig

RANKS, QUERIES, UNITS, HEADS, TOKENS = 4, 8, 256, 16, 4096
GATE = 1.3


def layout() -> Layout:
    base = mla(
        name="mla 16 heads",
        heads=HEADS,
        latent=512,
        rope=64,
        nope=128,
        value=128,
        softmax_scale=192**-0.5,
        codec="fp32",
        index=None,
        index_codec="fp32",
    )
    return replace(base, projection=None)


class Case:
    """What all ranks share: inputs, the start and end of every round, and the times."""

    def __init__(self, mode: str, asking: int, rounds: int, steps: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.mode, self.asking, self.rounds, self.steps = mode, asking, rounds, steps
        self.entries = torch.randn(TOKENS, 576, generator=g)
        self.query = torch.randn(RANKS, QUERIES, HEADS, 576, generator=g)
        chosen = [torch.randperm(TOKENS, generator=g)[:UNITS] for _ in range(RANKS * QUERIES)]
        self.chosen = torch.stack(chosen).view(RANKS, QUERIES, UNITS).to(torch.int32)
        self.line = threading.Barrier(RANKS)
        self.seconds: dict[str, list[float]] = {"step": [], "service": []}

    def check(self, rank: int, out: Tensor) -> None:
        gathered = self.entries[self.chosen[rank].long()]
        scores = self.query[rank] @ gathered.mT * layout().softmax_scale
        error = float((out - torch.softmax(scores, dim=-1) @ gathered[..., :512]).abs().max())
        if not error <= 1e-5:
            raise RuntimeError(f"rank {rank}: outputs differ by {error:.1e}; nothing was timed")

    def rank(self, end: LoopbackTransport) -> None:
        config = RuntimeConfig(
            model=uniform_model(layout(), 1),
            max_blocks=TOKENS // 64,
            workspace_bytes=8 << 20,
            mode=self.mode,  # type: ignore[arg-type]
            checked=False,
        )
        try:
            with Runtime.open(config, end) as runtime:
                runtime.add_document("corpus", tokens=TOKENS)
                runtime.load_document("corpus", 0, self.entries)
                for number in range(-1, self.rounds):
                    self.round(runtime, "step", timed=number >= 0)
                    with runtime.serve() as service:
                        self.round(runtime, "service", timed=number >= 0)
                        service.wait(60.0)
        except BaseException:
            self.line.abort()
            raise

    def round(self, runtime: Runtime, kind: str, *, timed: bool) -> None:
        """The steps of one round; the first round of each kind is checked, not timed."""
        asks = runtime.rank < self.asking
        scope = runtime.scope(documents=["corpus"], queries=QUERIES)
        selection = runtime.selection(self.chosen[runtime.rank], scope)
        self.line.wait(60.0)
        start = time.perf_counter()
        for _ in range(self.steps):
            if asks:
                out = runtime.attend(0, self.query[runtime.rank], selection)
                if not timed:
                    self.check(runtime.rank, out)
            elif kind == "step":
                runtime.idle_attend(0)
        self.line.wait(60.0)
        if timed and runtime.rank == 0:
            self.seconds[kind].append((time.perf_counter() - start) / self.steps)


def measure(mode: str, asking: int, rounds: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step: in service, in step."""
    case = Case(mode, asking, rounds, steps)
    ends = LoopbackTransport.world(RANKS)
    with ThreadPoolExecutor(RANKS) as threads:
        for future in [threads.submit(case.rank, end) for end in ends]:
            future.result()
    return median(case.seconds["service"]), median(case.seconds["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    measured = commit()
    torch.set_num_threads(1)
    missed = False
    for asking in (RANKS, 1):
        for mode in ("auto", "always-route", "always-fetch"):
            service, step = measure(mode, asking, arguments.rounds, arguments.steps)
            line = record(
                "service",
                case=f"{asking} of {RANKS} ranks ask, {QUERIES} queries x {UNITS} units x "
                f"{HEADS} heads, {mode}",
                metric="step",
                value=service,
                unit="s",
                baseline="in step",
                baseline_value=step,
                device=cpu(),
                measured=measured,
            )
            missed |= service > GATE * step
            print(
                f"{line['case']:<70} service {service * 1e3:6.1f} ms, in step {step * 1e3:6.1f} ms, "
                f"{service / step:.2f} x the time"
            )
    if missed:
        sys.exit(f"service takes over {GATE} x the time of a step")


if __name__ == "__main__":
    main()
