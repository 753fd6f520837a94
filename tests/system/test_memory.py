"""Peak memory of a full pool at work, measured in a process of its own."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_loopback

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.tools.memory import peak_bytes, reset_peak
from qroam.runtime.transport.base import Transport

LAYERS, DOCUMENTS, B = 4, 2, 64
QUERIES, HEADS, TOP_K = 32, 16, 256
WORKSPACE = 16 << 20
ENTRY_DIM, INDEX_DIM = 576, 128


def config(blocks: int, leases: int) -> RuntimeConfig:
    """V3.2's stored bytes, fp8 and index keys, with fewer heads."""
    v32 = named_layout("mla-v3.2")
    assert v32.index is not None
    layout = replace(
        v32,
        heads=HEADS,
        branches=(replace(v32.branches[0], heads=HEADS),),
        projection=None,
        index=replace(v32.index, heads=HEADS),
    )
    return RuntimeConfig(
        model=uniform_model(layout, LAYERS),
        max_blocks=blocks,
        block_tokens=B,
        private_blocks=1,
        lease_entries=leases,
        mode="always-fetch",
        workspace_bytes=WORKSPACE,
        deadline_s=120,
    )


def work(world: int, config: RuntimeConfig, entries: torch.Tensor, keys: torch.Tensor) -> list[int]:
    """Fill the pools with two documents and attend over them; pool and lease bytes of each rank."""

    def worker(transport: Transport) -> int:
        g = torch.Generator().manual_seed(transport.rank)
        with Runtime.open(config, transport) as runtime:
            names = [str(number) for number in range(DOCUMENTS)]
            for name in names:
                runtime.add_document(name, tokens=len(entries))
                for layer in range(LAYERS):
                    runtime.load_document(name, layer, entries, keys)
            for _ in range(2):
                for layer in range(LAYERS):
                    selection = runtime.select(
                        layer,
                        torch.randn(QUERIES, HEADS, INDEX_DIM, generator=g),
                        torch.rand(QUERIES, HEADS, generator=g),
                        documents=names,
                        top_k=TOP_K,
                    )
                    query = torch.randn(QUERIES, HEADS, ENTRY_DIM, generator=g)
                    runtime.attend(layer, query, selection)
            stats = runtime.stats()
            return int(stats["pool_bytes"] + stats["lease_bytes"])

    return run_loopback(world, worker, deadline_s=120)


def measure(world: int) -> dict[str, int]:
    """Bytes of pools and leases, and the peak beyond what was resident before they were made."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    tokens = 512 * B  # 1,024 blocks of two documents are 207 MB at four layers
    entries = torch.randn(tokens, ENTRY_DIM, generator=g)
    keys = torch.randn(tokens, INDEX_DIM, generator=g)
    work(world, config(8, 16), entries[: 4 * B], keys[: 4 * B])
    gc.collect()
    before = reset_peak()
    pools = work(world, config(2 * tokens // B, 11_000 // world), entries, keys)
    return {"pools": sum(pools), "beyond": peak_bytes() - before}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("world", [1, 2])
def test_a_full_pool_at_work_stays_within_its_budget(world: int) -> None:
    done = subprocess.run(
        [sys.executable, __file__, str(world)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pools"] > 220e6
    assert found["beyond"] <= 1.3 * (found["pools"] + world * WORKSPACE), found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]))))
