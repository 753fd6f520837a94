"""One instance of the demo: a process, a rank, a model; its part of the prefill, its own sub-agents."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from ...adapters.hf import Chunk, HFEngine
from ...config import RuntimeConfig
from ...cost.predicate import Mode
from ...errors import CoverageError, PeerError
from ...runtime import Runtime
from ...scope import Request, Selection
from ..memory import peak_bytes, reset_peak
from .model import CHUNK_TOKENS, build_model
from .near_ties import NearTies, TieReview
from .sabotage import Sabotage, SabotagedTransport

REPLAYED: tuple[Mode, ...] = ("always-route", "always-fetch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What an instance is given; equal on all but for `rank`."""

    rank: int
    world_size: int
    store: str
    reference: str
    runtime: RuntimeConfig
    layers: int
    seed: int
    max_tokens: int
    documents: Mapping[str, Tensor]
    prompts: Tensor
    decode_tokens: int
    sabotage: Sabotage | None


class Recorded(NamedTuple):
    """An attention step, to be replayed in other modes."""

    layer: int
    query: Tensor
    selection: Selection
    out: Tensor


def run_instance(job: Job, pipe: Connection) -> None:
    """Process entry. Reports ("progress", phase, done, total), then ("done", result) or
    ("failed", kind, why), where kind is "coverage" if an answer's coverage was wrong, else "other"."""
    torch.set_num_threads(1)
    if job.runtime.device == "cuda":
        torch.cuda.set_device(job.rank)
    if job.runtime.log_decisions:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        pipe.send(("done", _Instance(job, pipe).run()))
    except (CoverageError, PeerError, RuntimeError, ValueError) as error:
        kind = "coverage" if isinstance(error, CoverageError) else "other"
        pipe.send(("failed", kind, f"{type(error).__name__}: {error}"))


class _Instance:
    def __init__(self, job: Job, pipe: Connection) -> None:
        self.job = job
        self.pipe = pipe
        self.records: list[Recorded] = []
        self.sequence_of: dict[int, int] = {}
        self.mine = range(job.rank, len(job.prompts), job.world_size)

    def run(self) -> dict[str, Any]:
        job = self.job
        model = build_model(job.layers, job.seed, job.max_tokens, job.runtime.device)
        self.pipe.send(("ready",))
        self.pipe.recv()  # the reference is written
        review = TieReview(NearTies(**load_file(job.reference)), self.sequence_of)
        dist.init_process_group(
            "gloo",
            store=FileStore(job.store, job.world_size),
            rank=job.rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=300),
        )
        group = dist.group.WORLD
        assert group is not None
        transport = SabotagedTransport(
            group=group, deadline_s=job.runtime.deadline_s, sabotage=job.sabotage
        )
        before = reset_peak()
        with Runtime.open(job.runtime, transport) as runtime:
            self.runtime, self.predicted_s = runtime, 0.0
            engine = HFEngine(model, runtime, review=review)
            phases = {"prefill": self._timed(self._prefill, engine)}
            transport.armed = True
            runtime.drop_leases()
            decode_from = runtime.stats()
            phases["decode"] = self._timed(self._decode, engine)
            stats = runtime.stats()
            peak = peak_bytes() - before
            replays = {mode: self._replay(mode) for mode in REPLAYED}
            return {
                "rank": job.rank,
                "agents": list(self.mine),
                "tokens": self.tokens.numpy(),  # not a tensor: its memory would end with this process
                "logits": self.logits.numpy(),
                "rows": review.rows,
                "substituted": review.substituted,
                "decisions": stats["decisions"],
                "bytes": _bytes_since(decode_from, stats),
                "predicted_s": self.predicted_s,
                "replays": replays,
                "phase_s": phases,
                "step_phase_s": stats["phase_s"],
                "pool_bytes": stats["pool_bytes"],
                "block_bytes": stats["block_bytes"],
                "lease_bytes": stats["lease_bytes"],
                "peak_bytes": peak,
            }

    def _timed(self, work: Callable[[HFEngine], None], engine: HFEngine) -> float:
        start = time.perf_counter()
        work(engine)
        return time.perf_counter() - start

    def _prefill(self, engine: HFEngine) -> None:
        position = 0
        for name, tokens in self.job.documents.items():
            engine.runtime.add_document(name, tokens=len(tokens), position=position)
            position += len(tokens)
        chunks = corpus_chunks(self.job.documents)
        total = len(chunks)
        engine.prefill(chunks, lambda done: self.pipe.send(("progress", "prefill", done, total)))

    def _decode(self, engine: HFEngine) -> None:
        """Greedy, all of this instance's sub-agents as one batch; every attention step is recorded."""
        job, runtime = self.job, self.runtime
        requests = [runtime.request(list(job.documents)) for _ in self.mine]
        self.sequence_of.update(
            {id(request): agent for request, agent in zip(requests, self.mine, strict=True)}
        )
        engine.observe = self._record
        cache = engine.cache()
        current = job.prompts[list(self.mine)]
        tokens, logits = [], []
        for step in range(job.decode_tokens):
            out = engine.forward(current, requests, cache)
            assert out is not None
            current = out.argmax(-1, keepdim=True)
            tokens.append(current[:, 0])
            logits.append(out)
            self.pipe.send(("progress", "decode", step + 1, job.decode_tokens))
        self.tokens, self.logits = torch.stack(tokens, 1), torch.stack(logits, 1)
        self._check_cache(engine, cache, requests)

    def _check_cache(self, engine: HFEngine, cache: Any, requests: list[Request]) -> None:
        private = self.job.prompts.shape[1] + self.job.decode_tokens - 1
        for layer in range(engine.num_layers):
            if cache.private_tokens(layer) != private or {r.length for r in requests} != {private}:
                raise ValueError(
                    f"the cache of layer {layer} holds {cache.private_tokens(layer)} tokens a request, "
                    f"{private} are private"
                )

    def _record(self, layer: int, query: Tensor, selection: Selection, out: Tensor) -> None:
        self.records.append(Recorded(layer, query, selection, out))
        self.predicted_s += self.runtime.predicted_s()

    def _replay(self, mode: Mode) -> dict[str, Any]:
        """The recorded steps again in a fixed mode: bytes as counted, times as predicted, outputs."""
        runtime = self.runtime
        runtime.drop_leases()
        before = runtime.stats()
        worst, predicted_s = 0.0, 0.0
        for layer, query, selection, out in self.records:
            again = runtime.attend(layer, query, selection, mode=mode)
            worst = max(worst, float((again - out).abs().nan_to_num(torch.inf).max()))
            predicted_s += runtime.predicted_s()
        counted = _bytes_since(before, runtime.stats())
        return {"bytes": counted, "predicted_s": predicted_s, "error": worst}


def corpus_chunks(documents: Mapping[str, Tensor]) -> list[Chunk]:
    """The corpus as one causal sequence: a chunk sees all documents before its own."""
    names = list(documents)
    return [
        Chunk(name, c * CHUNK_TOKENS, tokens, tuple(names[:d]))
        for d, name in enumerate(names)
        for c, tokens in enumerate(documents[name].split(CHUNK_TOKENS))
    ]


def _bytes_since(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    counted = Counter(after["bytes_sent"])
    counted.subtract(before["bytes_sent"])
    return {kind: count for kind, count in counted.items() if count}
