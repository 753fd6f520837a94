"""The demo: a codebase sharded over instances, decoded by their sub-agents, equal to one model.

The parent starts the instances, computes the unsharded reference meanwhile, and compares. On GPUs each
instance has one for its cache and its attention, and steps of V3.2's size follow (`gpu.py`).
"""

from __future__ import annotations

import json
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save_file

from ....partition.placement import Placement
from ...adapters.hf import model_layout
from ...config import RuntimeConfig
from ...cost.predicate import Mode
from ...gpu.limits import Device
from .gpu import CODECS, LargeJob, large_facts, large_lines, run_large
from .instance import REPLAYED, Job, corpus_chunks, run_instance
from .model import (
    CHUNK_TOKENS,
    PROMPT_TOKENS,
    Reference,
    build_model,
    load_corpus,
    prompts,
    run_reference,
)
from .sabotage import Sabotage

MAX_LOGIT_ERROR = 1e-4
MAX_REPLAY_ERROR = 1e-4
MAX_SUBSTITUTED = 0.01
MAX_PREDICTED = 1.02  # auto, of the cheaper of always-route and always-fetch
_BLOCK_TOKENS = 64
_PATIENCE_S = 600.0
_MEMORY = ("pool_bytes", "block_bytes", "lease_bytes", "peak_bytes")

J = TypeVar("J")
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Sizes of the demo. Raises: ValueError for a size below 1, a sabotage with fewer than two
    instances or with device cuda, or more instances on GPUs than there are GPUs."""

    corpus: Path | None = None
    files: int = 16
    bytes_per_file: int = 1024
    instances: int = 4
    agents: int = 2
    decode_tokens: int = 32
    layers: int = 2
    seed: int = 0
    mode: Mode = "auto"
    sabotage: Sabotage | None = None
    log_decisions: bool = False
    device: Device = "cpu"

    def __post_init__(self) -> None:
        for name in ("files", "bytes_per_file", "instances", "agents", "decode_tokens", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sabotage and self.device == "cuda":
            raise ValueError("sabotage changes messages between CPUs: allowed with device cpu only")
        if self.sabotage and self.instances < 2:
            raise ValueError(f"sabotage needs at least 2 instances, got {self.instances}")
        if self.device == "cuda" and self.instances > torch.cuda.device_count():
            raise ValueError(
                f"device cuda needs a GPU for each of {self.instances} instances, torch finds "
                f"{torch.cuda.device_count()}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What was found; `ok` if every check passed."""

    ok: bool
    facts: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps({"ok": self.ok, **self.facts}, indent=2)

    def render(self) -> str:
        return "\n".join(_lines(self.ok, self.facts))


class _Failure(NamedTuple):
    """`kind`: "coverage" if the instance found an answer's coverage to be wrong, else "other"."""

    rank: int
    kind: str
    why: str

    def __str__(self) -> str:
        return f"instance {self.rank}: {self.why}"


def default_instances(device: Device) -> int:
    """The default number of instances: 4 on CPUs; on GPUs one per GPU, at most 2."""
    return 4 if device == "cpu" else max(min(torch.cuda.device_count(), 2), 1)


def run_demo(config: DemoConfig, report: Report) -> DemoReport:
    """Run it all; 65 to 95 seconds on two cores, most of them the reference's.

    Raises: RuntimeError if an instance failed and none found an answer's coverage to be wrong.
    """
    started = time.perf_counter()
    documents = load_corpus(config.corpus, config.files, config.bytes_per_file)
    tokens = sum(len(document) for document in documents.values())
    blocks = sum(-(-len(document) // _BLOCK_TOKENS) for document in documents.values())
    agents = config.instances * config.agents
    asked = prompts(documents, agents)
    max_tokens = tokens + PROMPT_TOKENS + config.decode_tokens
    model = build_model(config.layers, config.seed, max_tokens, config.device)
    private = -(-(PROMPT_TOKENS + config.decode_tokens) // _BLOCK_TOKENS)
    run = CHUNK_TOKENS // _BLOCK_TOKENS
    rounds = -(-blocks // (run * config.instances))
    runtime = RuntimeConfig(
        model=model_layout(model.config),
        max_blocks=blocks,
        block_tokens=_BLOCK_TOKENS,
        corpus_slots=min(rounds * run, blocks),
        private_blocks=config.agents * private,
        request_blocks=private,
        placement=Placement(policy="block-cyclic", run=run),
        lease_entries=1024,
        workspace_bytes=16 << 20,
        mode=config.mode,
        seed=config.seed,
        log_decisions=config.log_decisions,
    )
    if config.device == "cuda":
        runtime = replace(
            runtime,
            device="cuda",
            lease_entries=0,
            max_queries=max(CHUNK_TOKENS, config.agents * PROMPT_TOKENS),
            max_units=model.config.index_topk,
        )
    with tempfile.TemporaryDirectory(prefix="qroam-demo-") as folder:
        reference_path = str(Path(folder) / "reference.safetensors")
        jobs = [
            Job(
                rank=rank,
                world_size=config.instances,
                store=str(Path(folder) / "store"),
                reference=reference_path,
                runtime=runtime,
                layers=config.layers,
                seed=config.seed,
                max_tokens=max_tokens,
                documents=documents,
                prompts=asked,
                decode_tokens=config.decode_tokens,
                sabotage=config.sabotage,
            )
            for rank in range(config.instances)
        ]
        with _instances(jobs, run_instance) as instances:
            chunks = [chunk.tokens for chunk in corpus_chunks(documents)]
            reference = run_reference(model, chunks, asked, config.decode_tokens, report)
            save_file(
                {"keys": reference.ties.keys, "chosen": reference.ties.chosen}, reference_path
            )
            reference_s = time.perf_counter() - started
            results, failures = _results(instances, report)
    if failures and all(failure.kind != "coverage" for failure in failures):
        raise RuntimeError(str(failures[0]))
    reported = [str(failure) for failure in sorted(failures)]
    large = _large(config, report) if config.device == "cuda" and not failures else []
    return _judged(
        config, tokens, len(documents), reference, results, reported, large, reference_s, started
    )


def _large(config: DemoConfig, report: Report) -> list[dict[str, Any]]:
    """Steps of V3.2's size on the GPUs, codec by codec.

    Raises: RuntimeError if an instance failed.
    """
    facts = []
    for codec in CODECS:
        with tempfile.TemporaryDirectory(prefix="qroam-demo-") as folder:
            jobs = [
                LargeJob(
                    rank=rank,
                    world_size=config.instances,
                    store=str(Path(folder) / "store"),
                    codec=codec,
                    seed=config.seed,
                )
                for rank in range(config.instances)
            ]
            with _instances(jobs, run_large) as instances:
                results, failures = _results(instances, report)
        if failures:
            raise RuntimeError(f"steps of V3.2's size, {codec}: {failures[0]}")
        facts.append(large_facts(codec, results))
    return facts


@contextmanager
def _instances(
    jobs: Sequence[J], run: Callable[[J, Connection], None]
) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """The instance processes, ended when the block is left."""
    context = mp.get_context("spawn")
    started: list[tuple[BaseProcess, Connection]] = []
    try:
        for job in jobs:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=run, args=(job, theirs), daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        yield started
    finally:
        for process, _ in started:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()


def _results(
    instances: list[tuple[BaseProcess, Connection]], report: Report
) -> tuple[list[dict[str, Any]], list[_Failure]]:
    """Let the instances start, follow them; returns results in rank order, failures as they came."""
    pipes = {pipe: rank for rank, (_, pipe) in enumerate(instances)}
    results: dict[int, dict[str, Any]] = {}
    failures: list[_Failure] = []
    furthest: dict[str, int] = {}
    while pipes:
        ready = wait(list(pipes), timeout=_PATIENCE_S)
        if not ready:
            silence = f"silent for {_PATIENCE_S:g} s"
            failures += [_Failure(rank, "other", silence) for rank in pipes.values()]
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes[pipe]
            try:
                message = pipe.recv()
            except EOFError:
                process = instances[rank][0]
                process.join(5.0)  # else it may have no exit code yet
                failures.append(_Failure(rank, "other", f"ended with exit code {process.exitcode}"))
                del pipes[pipe]
                continue
            match message:
                case ("ready",):
                    pipe.send("go")
                case ("progress", phase, done, total):
                    if done > furthest.get(phase, 0):
                        furthest[phase] = done
                        report(phase, done, total)
                case ("done", result):
                    results[rank] = result
                    del pipes[pipe]
                case ("failed", kind, why):
                    failures.append(_Failure(rank, kind, why))
                    del pipes[pipe]
    return [results[rank] for rank in sorted(results)], failures


def _judged(
    config: DemoConfig,
    tokens: int,
    files: int,
    reference: Reference,
    results: list[dict[str, Any]],
    failures: list[str],
    large: list[dict[str, Any]],
    reference_s: float,
    started: float,
) -> DemoReport:
    facts: dict[str, Any] = {
        "corpus": {"files": files, "tokens": tokens},
        "instances": config.instances,
        "agents": config.instances * config.agents,
        "layers": config.layers,
        "mode": config.mode,
        "device": config.device,
        "sabotage": config.sabotage,
        "failures": failures,
        "seconds": {"reference": reference_s},
    }
    problems = [f"an instance failed: {failure}" for failure in failures]
    if not failures:
        equal, compared, error = _compared(reference, results)
        rows = sum(result["rows"] for result in results)
        substituted = sum(result["substituted"] for result in results)
        facts |= {
            "tokens_equal": equal,
            "tokens_compared": compared,
            "max_logit_error": error,
            "selection_rows": rows,
            "near_ties_substituted": substituted,
            "decisions": [result["decisions"] for result in results],
            "bytes": _bytes(results),
            "predicted_s": _predicted(results),
            "replay_error": {
                mode: max(result["replays"][mode]["error"] for result in results)
                for mode in REPLAYED
            },
            "memory": [{name: result[name] for name in _MEMORY} for result in results],
        }
        facts["seconds"] |= _slowest([result["phase_s"] for result in results])
        facts["step_seconds"] = _slowest([result["step_phase_s"] for result in results])
        if equal < compared:
            problems.append(f"{compared - equal} of {compared} tokens differ")
        if not error <= MAX_LOGIT_ERROR:
            problems.append(f"a logit is off by {error:.2e}, allowed is {MAX_LOGIT_ERROR:g}")
        for mode, worst in facts["replay_error"].items():
            if not worst <= MAX_REPLAY_ERROR:
                problems.append(f"replayed with {mode}, an output differs by {worst:.1e}")
        cheaper = min(facts["predicted_s"][mode] for mode in REPLAYED)
        if config.mode == "auto" and facts["predicted_s"]["decoded"] > MAX_PREDICTED * cheaper:
            problems.append(
                "auto is predicted to be slower than the cheaper fixed mode by over 2 %"
            )
        if substituted > MAX_SUBSTITUTED * rows:
            problems.append(f"{substituted} of {rows} selections differ in near-ties, over 1 %")
    if large:
        facts["large"] = large
        problems += [
            f"a step of V3.2's size in {each['codec']} has {each['error']:.2f} of the allowed error"
            for each in large
            if not each["error"] <= 1
        ]
    facts["seconds"]["all"] = time.perf_counter() - started
    facts["problems"] = problems
    return DemoReport(ok=not problems, facts=facts)


def _compared(reference: Reference, results: list[dict[str, Any]]) -> tuple[int, int, float]:
    """(equal tokens, compared tokens, largest logit error up to each agent's first difference)."""
    equal, compared, worst = 0, 0, 0.0
    for result in results:
        for seat, agent in enumerate(result["agents"]):
            same = torch.from_numpy(result["tokens"][seat]) == reference.tokens[agent]
            alike = int(same.long().cumprod(0).sum())
            error = (torch.from_numpy(result["logits"][seat]) - reference.logits[agent]).abs()
            worst = max(worst, float(error[: alike + 1].nan_to_num(torch.inf).max()))
            equal += int(same.sum())
            compared += len(same)
    return equal, compared, worst


def _bytes(results: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes that the attention exchanges of the decode sent, all instances, by mode."""

    def attention(counted: dict[str, int]) -> int:
        return counted.get("attend", 0) + counted.get("attend-answer", 0)

    modes = {"decoded": sum(attention(result["bytes"]) for result in results)}
    for mode in REPLAYED:
        modes[mode] = sum(attention(result["replays"][mode]["bytes"]) for result in results)
    modes["selection"] = sum(
        result["bytes"].get("select", 0) + result["bytes"].get("select-answer", 0)
        for result in results
    )
    return modes


def _predicted(results: list[dict[str, Any]]) -> dict[str, float]:
    """Predicted seconds of the decode's attention steps at the slowest instance, by mode."""
    modes = {"decoded": max(result["predicted_s"] for result in results)}
    for mode in REPLAYED:
        modes[mode] = max(result["replays"][mode]["predicted_s"] for result in results)
    return modes


def _slowest(phases: list[dict[str, float]]) -> dict[str, float]:
    return {phase: max(times.get(phase, 0.0) for times in phases) for phase in phases[0]}


def _lines(ok: bool, facts: dict[str, Any]) -> Iterator[str]:
    corpus = facts["corpus"]
    yield (
        f"corpus      {corpus['files']} files, {corpus['tokens']:,} byte tokens over "
        f"{facts['instances']} instances; {facts['agents']} sub-agents"
    )
    yield (
        f"model       DeepSeek-V3.2 architecture, {facts['layers']} layers, seeded weights: "
        "its text is noise, its arithmetic is real"
    )
    if facts["device"] == "cuda":
        yield (
            f"devices     cache and attention on {facts['instances']} GPUs, one an instance; model, "
            "indexer and selection on the CPU"
        )
    if "tokens_equal" in facts:
        yield (
            f"tokens      {facts['tokens_equal']} of {facts['tokens_compared']} equal to "
            f"transformers' unsharded eager decode; max logit error {facts['max_logit_error']:.1e}"
        )
        yield (
            f"near-ties   {facts['near_ties_substituted']} of {facts['selection_rows']:,} selections "
            "taken from the reference (k-th and next score closer than 1e-5)"
        )
        yield "decisions   per (query, holder), prefill and decode; a row per asking instance:"
        for rank, holders in enumerate(facts["decisions"]):
            cells = [_ways(holders[holder]) for holder in sorted(holders)]
            yield f"  from {rank}    " + " | ".join(cells)
        counted = "in the transport" if facts["device"] == "cpu" else "by the plans"
        yield f"bytes       sent by the decode's attention steps, counted {counted}:"
        for mode, count in facts["bytes"].items():
            name = f"{facts['mode']} (as decoded)" if mode == "decoded" else mode
            yield f"  {name:<20} {count:>12,}"
        yield "predicted   milliseconds of those steps by the cost model, slowest instance:"
        for mode, seconds in facts["predicted_s"].items():
            name = f"{facts['mode']} (as decoded)" if mode == "decoded" else mode
            yield f"  {name:<20} {seconds * 1e3:>12.1f}"
        for rank, memory in enumerate(facts["memory"]):
            yield (
                f"memory {rank}    pool {memory['pool_bytes'] / 1e6:.2f} MB for "
                f"{memory['block_bytes'] / 1e6:.2f} MB of encoded blocks, leases "
                f"{memory['lease_bytes'] / 1e6:.2f} MB, "
                f"peak {memory['peak_bytes'] / 1e6:.1f} MB beyond the loaded model"
            )
        steps = ", ".join(f"{name} {took:.1f}" for name, took in facts["step_seconds"].items())
        yield f"in steps    seconds of the slowest instance: {steps}"
    yield from large_lines(facts.get("large", []))
    yield "seconds     " + ", ".join(
        f"{name} {took:.1f}" for name, took in facts["seconds"].items()
    )
    for problem in facts["problems"]:
        yield f"FAILED      {problem}"
    yield "result      " + ("exact" if ok else "NOT exact")


def _ways(counts: dict[str, int]) -> str:
    names = {"local": "local", "route_a": "route", "route_b": "route B", "fetch": "fetch"}
    return ", ".join(f"{names[way]} {count}" for way, count in counts.items() if count) or "none"
