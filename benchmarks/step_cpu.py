"""One attention step on CPUs: 1, 2 and 4 ranks against one-process eager attention.

64 queries x 512 units x 16 heads over a corpus of MLA entries (512 + 64 columns, fp32), the queries
dealt evenly to the ranks, one thread a process. The baseline gathers the same selection from one
tensor and attends eagerly in one process. A case is timed only after its outputs were found equal.

    python benchmarks/step_cpu.py [--steps 20]
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from record import commit, cpu, record
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from qroam.partition.layout import Layout
from qroam.partition.presets import mla, uniform_model
from qroam.runtime import Runtime, RuntimeConfig

QUERIES, UNITS, HEADS, TOKENS = 64, 512, 16, 16384


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


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Entries (T, 576), queries (Q, H, 576), selected entries (Q, K), equal in every process."""
    torch.manual_seed(0)
    entries = torch.randn(TOKENS, 576)
    query = torch.randn(QUERIES, HEADS, 576)
    chosen = torch.stack([torch.randperm(TOKENS)[:UNITS] for _ in range(QUERIES)]).to(torch.int32)
    return entries, query, chosen


def eager(entries: Tensor, query: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """The baseline: (Q, H, 512)."""
    gathered = entries[chosen.long()]
    return torch.softmax(query @ gathered.mT * scale, dim=-1) @ gathered[..., :512]


def rank_main(rank: int, world: int, store: str, steps: int, mode: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", store=FileStore(store, world), rank=rank, world_size=world)
    entries, query, chosen = inputs()
    mine = slice(rank * QUERIES // world, (rank + 1) * QUERIES // world)
    config = RuntimeConfig(
        model=uniform_model(layout(), 1),
        max_blocks=TOKENS // 64,
        workspace_bytes=8 << 20,
        mode=mode,  # type: ignore[arg-type]
        checked=False,
    )
    with Runtime.open(config) as runtime:
        runtime.add_document("corpus", tokens=TOKENS)
        runtime.load_document("corpus", 0, entries)
        scope = runtime.scope(documents=["corpus"], queries=QUERIES // world)
        selection = runtime.selection(chosen[mine], scope)
        out = runtime.attend(0, query[mine], selection)
        error = float(
            (out - eager(entries, query[mine], chosen[mine], layout().softmax_scale)).abs().max()
        )
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            runtime.attend(0, query[mine], selection)
            times.append(time.perf_counter() - start)
    pipe.send((error, median(times)))


def measure(world: int, steps: int, mode: str) -> float:
    """Seconds of a step: the slowest rank's median, after every rank's output was found equal."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, str(Path(folder) / "store"), steps, mode, theirs)
            process = context.Process(target=rank_main, args=arguments, daemon=True)
            process.start()
            started.append((process, ours))
        results = [pipe.recv() for _, pipe in started]
        for process, _ in started:
            process.join()
    worst = max(error for error, _ in results)
    if not worst <= 1e-5:
        raise RuntimeError(
            f"{world} ranks, {mode}: outputs differ by {worst:.1e}; nothing was timed"
        )
    return max(float(seconds) for _, seconds in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    measured = commit()
    torch.set_num_threads(1)
    entries, query, chosen = inputs()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        eager(entries, query, chosen, layout().softmax_scale)
        times.append(time.perf_counter() - start)
    baseline = median(times)
    print(f"one-process eager attention, one thread: {baseline * 1e3:.1f} ms")
    for world, mode in (
        (1, "auto"),
        (2, "auto"),
        (4, "auto"),
        (4, "always-route"),
        (4, "always-fetch"),
    ):
        seconds = measure(world, steps, mode)
        line = record(
            "step_cpu",
            case=f"{world} ranks, {QUERIES} queries x {UNITS} units x {HEADS} heads, {mode}",
            metric="step",
            value=seconds,
            unit="s",
            baseline="one-process eager attention, one thread",
            baseline_value=baseline,
            device=cpu(),
            measured=measured,
        )
        print(f"{line['case']:<60} {seconds * 1e3:8.1f} ms   ratio {line['ratio']:.2f}")


if __name__ == "__main__":
    main()
