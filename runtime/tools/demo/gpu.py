"""Steps of DeepSeek-V3.2's size on GPUs: random entries and selections, against fp64, and timed.

Letters: N queries of a rank, K selected entries, H heads, D key columns, C value columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from ....kernels import reference
from ....partition.layout import Layout
from ....partition.presets import named_layout, uniform_model, with_codec
from ...config import RuntimeConfig
from ...errors import CoverageError, PeerError
from ...gpu.backend import GpuBackend
from ...gpu.limits import GPU_MODES, GpuMode
from ...runtime import Runtime, opened_world
from ...stores import entry_codec
from ...transport.base import Transport
from ...transport.gloo import TorchTransport
from ...transport.loopback import LoopbackTransport

CODECS = ("bf16", "fp8_v32")
TOKENS, LAYERS, QUERIES, SELECTED = 32_768, 4, 8, 2048
_STEPS, _BLOCK_TOKENS = 2, 64
_ROUNDS = 50  # of replays that are timed


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeJob:
    """What a rank is given; equal on all but for `rank`."""

    rank: int
    world_size: int
    store: str
    codec: str
    seed: int


def run_large(job: LargeJob, pipe: Connection) -> None:
    """Process entry: as `instance.run_instance`, but that it waits for nothing."""
    torch.set_num_threads(1)
    torch.cuda.set_device(job.rank)
    try:
        pipe.send(("done", _Large(job, pipe).run()))
    except (CoverageError, PeerError, RuntimeError, ValueError) as error:
        pipe.send(("failed", "other", f"{type(error).__name__}: {error}"))


class _Large:
    def __init__(self, job: LargeJob, pipe: Connection) -> None:
        self.job, self.pipe = job, pipe
        self.layout: Layout = with_codec(replace(named_layout("mla-v3.2"), index=None), job.codec)
        self.codec = entry_codec(self.layout)
        self.generator = torch.Generator("cuda").manual_seed(1000 + job.seed + job.rank)

    def run(self) -> dict[str, Any]:
        job, blocks = self.job, TOKENS // _BLOCK_TOKENS
        config = RuntimeConfig(
            model=uniform_model(self.layout, LAYERS),
            max_blocks=blocks,
            block_tokens=_BLOCK_TOKENS,
            private_blocks=0,
            dtype=torch.bfloat16,
            device="cuda",
            max_queries=QUERIES,
            max_units=SELECTED,
        )
        transport = self._transport()
        self.world = opened_world(config, transport, transport.counted())
        with Runtime(self.world, owns_transport=True) as runtime:
            runtime.add_document("corpus", tokens=TOKENS)
            for layer in range(LAYERS):
                runtime.load_document("corpus", layer, self._entries(layer))
            worst, checked = 0.0, 0
            for done, mode in enumerate(GPU_MODES, start=1):
                for step in range(_STEPS):
                    for layer in range(LAYERS):
                        query, chosen = self._drawn()
                        scope = runtime.scope(documents=["corpus"], queries=QUERIES)
                        selection = runtime.selection(chosen, scope)
                        out = runtime.attend(layer, query, selection, mode=mode)
                        for item in (0, QUERIES - 1) if step == 0 else ():
                            error = self._error(layer, query[item], chosen[item], out[item])
                            worst, checked = max(worst, error), checked + 1
                self.pipe.send(("progress", f"V3.2's size, {job.codec}", done, len(GPU_MODES)))
            return {
                "rank": job.rank,
                "error": worst,
                "checked": checked,
                "step_us": {mode: self._step_us(mode) for mode in GPU_MODES},
            }

    def _transport(self) -> Transport:
        job = self.job
        if job.world_size == 1:
            return LoopbackTransport.world(1)[0]
        dist.init_process_group(
            "gloo",
            store=FileStore(job.store, job.world_size),
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=300),
        )
        group = dist.group.WORLD
        assert group is not None
        return TorchTransport(group=group, deadline_s=60.0)

    def _entries(self, layer: int) -> Tensor:
        """(TOKENS, D) bf16 of the whole corpus, the same on every rank."""
        generator = torch.Generator("cuda").manual_seed(self.job.seed + layer)
        return torch.randn(
            TOKENS, self.layout.entry_dim, generator=generator, device="cuda"
        ).bfloat16()

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """Queries (N, H, D) bf16 and distinct entries (N, K) int32, other ones at every rank and step."""
        shape, g = (QUERIES, self.layout.heads, self.layout.key_dim), self.generator
        query = torch.randn(shape, generator=g, device="cuda").bfloat16()
        order = torch.rand(QUERIES, TOKENS, generator=g, device="cuda").argsort(1)
        return query, order[:, :SELECTED].to(torch.int32)

    def _error(self, layer: int, query: Tensor, chosen: Tensor, out: Tensor) -> float:
        """The largest error of an output (H, C) against fp64, of the allowed: twice that of eager torch
        in bf16, plus a rounding. NaN is too much."""
        rows = self.codec.encode(self._entries(layer)[chosen.long()])
        entries, scale = self.codec.decode(rows, torch.bfloat16), self.layout.softmax_scale
        columns = self.layout.value_dim
        exact = reference.attend(
            query[None].double(),
            entries[None].double(),
            torch.ones(1, SELECTED, dtype=torch.bool, device="cuda"),
            value_dim=columns,
            scale=scale,
        )[0][0]
        shares = (query.float() @ entries.float().mT * scale).softmax(-1)
        eager = shares.bfloat16() @ entries[:, :columns]
        rounding = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        error, allowed = (float((found.double() - exact).abs().max()) for found in (out, eager))
        share: float = error / (2 * (allowed + rounding))
        return share if share == share else float("inf")

    def _step_us(self, mode: GpuMode) -> float:
        """Microseconds of a layer-step: replays of all layers in turn, the last queries in each."""
        gpu = self.world.backend
        assert isinstance(gpu, GpuBackend)
        gpu.meet()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for done in range(1 + _ROUNDS):
            if done == 1:
                start.record()
            for layer in range(LAYERS):
                gpu.step_of(QUERIES).replay(layer, mode)
        end.record()
        torch.cuda.synchronize()
        gpu.check_peers()
        return 1e3 * float(start.elapsed_time(end)) / (_ROUNDS * LAYERS)


def large_facts(codec: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all ranks found of one codec: the worst error, and the slowest rank's times."""
    return {
        "codec": codec,
        "instances": len(results),
        "checked": sum(result["checked"] for result in results),
        "error": max(result["error"] for result in results),
        "step_us": {mode: max(result["step_us"][mode] for result in results) for mode in GPU_MODES},
    }


def large_lines(facts: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The report's lines; none without facts."""
    if facts:
        yield (
            f"V3.2's size 128 heads, 512+64 columns, {SELECTED} of {TOKENS:,} entries over "
            f"{facts[0]['instances']} GPUs, {LAYERS} layers, {QUERIES} queries a rank:"
        )
    for each in facts:
        times = ", ".join(f"{mode} {us:.1f}" for mode, us in each["step_us"].items())
        yield (
            f"  {each['codec']:<9} {each['checked']} outputs within {each['error']:.2f} of the allowed "
            f"error (twice eager torch's in bf16, against fp64)"
        )
        yield f"  {'':<9} us of a layer-step, graph replays, slowest GPU: {times}"
