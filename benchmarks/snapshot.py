"""Snapshot and restore against a plain safetensors save and load of the same bytes, in one run.

A corpus of MLA entries (512 + 64 columns, bf16, blocks of 64 tokens) in a world of one rank.
`snapshot` ends when everything is hashed, written, synced and committed; `restore` when every block
was read, compared with its hash and stored in the pool. The baselines hold the same bytes as one
tensor a layer: `safetensors.torch.save_file`, with and without a sync of the file afterwards, and
`load_file`, copied out of the mapped file. torch has one thread; hashing has its own. Each figure is
the median of its rounds, after one that is not counted; baseline and qroam take turns in going first,
and the disk is left to finish what it has before either. All tensors stay where they are: memory that
the system gave away meanwhile is expensive to get back, and files alone take any anew. Nothing is
recorded unless what was restored is bitwise what was saved. Exits with 1 if snapshot or restore has
less than half the throughput of the synced save.

    python benchmarks/snapshot.py [--mib 1024] [--layers 8] [--rounds 7] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from record import commit, cpu, record
from safetensors.torch import load_file, save_file
from torch import Tensor

from qroam.partition.presets import mla, uniform_model
from qroam.runtime import LoopbackTransport, Runtime, RuntimeConfig

COLUMNS, BLOCK_TOKENS = 576, 64
GATE = 0.5  # of the throughput of a plain save that is as durable


def config(layers: int, blocks: int) -> RuntimeConfig:
    layout = mla(
        name="mla", heads=16, latent=512, rope=64, nope=128, value=128, softmax_scale=192**-0.5,
        codec="bf16", index=None, index_codec="fp32",
    )  # fmt: skip
    return RuntimeConfig(
        model=uniform_model(replace(layout, projection=None), layers),
        max_blocks=blocks,
        private_blocks=1,
        dtype=torch.bfloat16,
    )


def opened(config: RuntimeConfig) -> Runtime:
    return Runtime.open(config, LoopbackTransport.world(1)[0])


class Clock:
    """Seconds of each thing, once a round."""

    def __init__(self) -> None:
        self.taken: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.taken[name].append(time.perf_counter() - start)


def plain(clock: Clock, corpus: dict[str, Tensor], pool: dict[str, Tensor], path: Path) -> None:
    """Save and load without qroam."""
    os.sync()
    with clock.of("save and sync"):
        with clock.of("save"):
            save_file(corpus, path)
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    with clock.of("load"):
        for name, tensor in load_file(path).items():
            pool[name].copy_(tensor)
    path.unlink()


def ours(
    clock: Clock, runtime: Runtime, other: Runtime, corpus: dict[str, Tensor], path: Path
) -> None:
    """Snapshot one runtime and restore into another. Raises: RuntimeError if the bytes differ."""
    for storage in other._world.stores.entries._storage:
        storage.zero_()
    os.sync()
    with clock.of("snapshot"):
        runtime.snapshot(path)
    with clock.of("snapshot of nothing new"):
        runtime.snapshot(path)
    with clock.of("restore"):
        other.restore(path)
    for layer, tensor in enumerate(corpus.values()):
        rows = other._world.stores.entries.rows(layer, torch.arange(len(tensor)))
        if not torch.equal(rows.view(torch.bfloat16), tensor):
            raise RuntimeError(f"layer {layer} was not restored bitwise; nothing is recorded")
    other.remove_document("corpus")
    shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    measured = commit()
    torch.set_num_threads(1)
    blocks = (arguments.mib << 20) // (arguments.layers * BLOCK_TOKENS * COLUMNS * 2)
    tokens = blocks * BLOCK_TOKENS
    torch.manual_seed(0)
    corpus = {
        f"layer.{layer}": torch.randn(tokens, COLUMNS, dtype=torch.bfloat16)
        for layer in range(arguments.layers)
    }
    pool = {name: torch.zeros_like(tensor) for name, tensor in corpus.items()}
    num_bytes = sum(tensor.nbytes for tensor in corpus.values())
    clock = Clock()
    facts = config(arguments.layers, blocks)
    runtime, other = opened(facts), opened(facts)
    runtime.add_document("corpus", tokens=tokens)
    for layer, tensor in enumerate(corpus.values()):
        runtime.load_document("corpus", layer, tensor)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for number in range(arguments.rounds + 1):
            turns: list[Callable[[], None]] = [
                lambda: plain(clock, corpus, pool, Path(folder) / "plain.safetensors"),
                lambda: ours(clock, runtime, other, corpus, Path(folder) / "snapshot"),
            ]
            for turn in turns[:: 1 if number % 2 else -1]:
                turn()
            if number == 0:
                clock.taken.clear()
    seconds = {name: median(taken) for name, taken in clock.taken.items()}
    size = f"{num_bytes / 2**20:.0f} MiB, {arguments.layers} layers, {blocks} blocks"
    print(f"{size}; MiB/s: { ({n: round(num_bytes / 2**20 / s) for n, s in seconds.items()}) }")
    missed = []
    for case, baseline in (
        ("snapshot", "save and sync"),
        ("restore", "save and sync"),
        ("snapshot", "save"),
        ("restore", "save"),
        ("restore", "load"),
    ):
        line = record(
            "snapshot",
            case=f"{case}, {size}",
            metric=case,
            value=seconds[case],
            unit="s",
            baseline=f"safetensors {baseline}",
            baseline_value=seconds[baseline],
            device=cpu(),
            measured=measured,
        )
        print(f"{case:<10} {seconds[case]:6.2f} s   {baseline:<14} {seconds[baseline]:6.2f} s   "
              f"ratio {line['ratio']:.2f}")  # fmt: skip
        if baseline == "save and sync" and seconds[baseline] < GATE * seconds[case]:
            missed.append(case)
    if missed:
        sys.exit(f"{' and '.join(missed)}: below {GATE} x the throughput of a save that is synced")


if __name__ == "__main__":
    main()
