"""A runtime beside an engine that uses torch.distributed itself."""

from __future__ import annotations

import multiprocessing as mp
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig


def engine(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(store, 2), rank=rank, world_size=2)
    config = RuntimeConfig(
        model=uniform_model(named_layout("mla-tiny"), 1), max_blocks=4, deadline_s=20.0
    )
    received = torch.zeros(3)
    with Runtime.open(config) as runtime:
        runtime.add_document("a", tokens=256)
        generator = torch.Generator().manual_seed(0)
        entries = torch.randn(256, 80, generator=generator)
        runtime.load_document("a", 0, entries, torch.randn(256, 32, generator=generator))
        query = torch.randn(1, 4, 32, generator=generator)
        chosen = runtime.select(0, query, torch.ones(1, 4), documents=["a"])
        if rank == 0:
            dist.send(torch.tensor([1.0, 2.0, 3.0]), 1)
        else:
            dist.recv(received, 0)
        out = runtime.attend(0, torch.randn(1, 4, 80, generator=generator), chosen)
    dist.barrier()  # the engine's group is unharmed by ours and by its end
    pipe.send((rank, received.tolist(), out.tolist()))


@pytest.mark.processes
def test_the_engines_own_messages_and_group_are_left_alone(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    results = []
    started = []
    for rank in range(2):
        ours, theirs = context.Pipe()
        arguments = (rank, str(tmp_path / "store"), theirs)
        process = context.Process(target=engine, args=arguments, daemon=True)
        process.start()
        started.append((process, ours))
    for process, pipe in started:
        assert pipe.poll(90), "an engine hung"
        results.append(pipe.recv())
        process.join(30)
        assert process.exitcode == 0
    assert results[1][1] == [1.0, 2.0, 3.0]
    assert results[0][2] == results[1][2]  # same query, same corpus, either side
