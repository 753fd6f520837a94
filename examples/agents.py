"""Many sub-agents over one codebase: they join, read a few files each, decode, and leave.

    python examples/agents.py --package typer --steps 200
    python examples/agents.py --layers 1 --steps 10000        # a soak: resident memory must stay flat

The text of an installed package lies sharded over the ranks, each file a document. At every step each
rank lets agents in (a request over some of the files, with a prompt), gives every agent there one
token of the model of `embed_in_engine.py` (seeded weights: its text is noise), and lets out those
that are done. Of the first agents to leave, every token is compared with one process. Prints what was
decided and sent, and memory over time; exits 1 if a token differs, a step was not covered, or, from
1,000 steps on, resident memory grew by more than 2 % after the first fifth.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from embed_in_engine import LAYOUT, Model, Plain, Sharded, as_tokens
from torch import Tensor

from qroam.partition import uniform_model
from qroam.runtime import Request, Runtime, RuntimeConfig

B = 64
MAX_GROWTH = 0.02
SOAK_STEPS = 1000  # with fewer, memory is printed and not judged
SAMPLES = 100


@dataclass(slots=True)
class Agent:
    """One sub-agent: the files it reads, its prompt, and what it has decoded so far."""

    request: Request
    files: list[str]
    prompt: list[int]
    budget: int
    tokens: list[int] = field(default_factory=list)
    fed: int = 0

    @property
    def next_token(self) -> int:
        """Of the prompt while there is one, then the last that was decoded."""
        return self.prompt[self.fed] if self.fed < len(self.prompt) else self.tokens[-1]

    def take(self, decoded: int) -> None:
        self.fed += 1
        if self.fed >= len(self.prompt):
            self.tokens.append(decoded)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.budget


@dataclass(slots=True)
class Report:
    """What one rank did; bytes resident, sampled `SAMPLES` times."""

    rank: int
    agents: int = 0
    most_at_once: int = 0
    tokens: int = 0
    checked: int = 0
    differing: int = 0
    seconds: float = 0.0
    resident: list[int] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Of resident memory, from a fifth of the steps on: the most above the first sample."""
        later = self.resident[len(self.resident) // 5 :]
        return max(later) / later[0] - 1


def codebase(package: str, files: int, file_bytes: int) -> dict[str, Tensor]:
    """The beginnings of a package's first source files, by name.

    Raises: ValueError if it is not installed or has no sources.
    """
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    root = Path(next(iter(places))) if places else Path()
    sources = sorted(root.rglob("*.py")) if places else []
    texts = {str(path.relative_to(root)): path.read_bytes()[:file_bytes] for path in sources}
    full = {name: text for name, text in texts.items() if text}
    if not full:
        raise ValueError(f"{package!r} is not an installed package with sources")
    return {name: torch.tensor(list(full[name])) for name in list(full)[:files]}


class Instance:
    """One rank: an engine with a few seats, and agents who come and go."""

    def __init__(self, runtime: Runtime, model: Model, args: argparse.Namespace) -> None:
        self.runtime, self.model, self.args = runtime, model, args
        self.engine = Sharded(runtime, model)
        self.random = Random(f"{args.seed} {runtime.rank}")
        self.agents: list[Agent] = []
        self.report = Report(runtime.rank)
        self.plain: dict[str, Plain] = {}

    def load(self, files: dict[str, Tensor]) -> None:
        """Prefill every file by itself, file f on rank f modulo the world, all ranks in step."""
        runtime, end = self.runtime, 0
        starts = {}
        for name, text in files.items():
            starts[name] = end
            runtime.add_document(name, tokens=len(text), position=end)
            end += len(text)
        for first in range(0, len(files), runtime.world_size):
            names = list(files)[first : first + runtime.world_size]
            if runtime.rank < len(names):
                name = names[runtime.rank]
                writer = runtime.request(into=name)
                self.engine.forward(self.model, files[name][None], [writer])
                runtime.release(writer)
            else:
                self.engine.idle(self.args.layers)
        if self.args.check:
            for name, text in files.items():
                self.plain[name] = Plain(self.model)
                self.plain[name].forward(text, starts[name])

    def step(self, names: list[str]) -> None:
        """Agents join; each that is there is given a token; those that are done leave."""
        while len(self.agents) < self.args.agents and self.random.random() < 0.3:
            self.agents.append(self._joined(names))
        self.report.most_at_once = max(self.report.most_at_once, len(self.agents))
        if not self.agents:
            self.engine.idle(self.args.layers)
            return
        tokens = torch.tensor([[agent.next_token] for agent in self.agents])
        logits = self.engine.forward(self.model, tokens, [agent.request for agent in self.agents])
        for agent, decoded in zip(self.agents, logits.argmax(-1).tolist(), strict=True):
            agent.take(decoded)
        self.report.tokens += len(self.agents)
        for agent in [agent for agent in self.agents if agent.is_done]:
            self._left(agent)

    def _joined(self, names: list[str]) -> Agent:
        files = sorted(self.random.sample(names, min(len(names), self.random.randint(1, 4))))
        files.sort(key=names.index)
        self.report.agents += 1
        return Agent(
            request=self.runtime.request(files),
            files=files,
            prompt=as_tokens(f"{self.report.agents}: {files[0]}")[:12].tolist(),
            budget=self.random.randint(4, 40),
        )

    def _left(self, agent: Agent) -> None:
        if self.report.checked < self.args.check:
            self.report.checked += 1
            self.report.differing += int(agent.tokens != self._alone(agent))
        self.runtime.release(agent.request)
        self.agents.remove(agent)

    def _alone(self, agent: Agent) -> list[int]:
        """What the agent should have decoded, by one process that has everything."""
        plain = Plain(self.model)
        for name in agent.files:
            plain = plain.attached(self.plain[name])
        position = agent.request.position - agent.request.length
        tokens: list[int] = []
        for at in range(agent.request.length):
            token = agent.prompt[at] if at < len(agent.prompt) else tokens[-1]
            logits = plain.forward(torch.tensor([token]), position + at)
            if at >= len(agent.prompt) - 1:
                tokens.append(int(logits.argmax()))
        return tokens


def run_rank(rank: int, store: str, args: argparse.Namespace) -> Report:
    torch.set_num_threads(1)
    if args.log_decisions:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.ranks > 1:
        where = f"file://{store}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=args.ranks)
    files = codebase(args.package, args.files, args.file_bytes)
    config = RuntimeConfig(
        model=uniform_model(LAYOUT, args.layers),
        max_blocks=sum(-(-len(text) // B) for text in files.values()),
        block_tokens=B,
        private_blocks=args.agents,
        request_blocks=1,
        lease_entries=args.leases,
        dtype=torch.float64,
        mode=args.mode,
        deadline_s=60.0,
        log_decisions=args.log_decisions,
    )
    with Runtime.open(config) as runtime, torch.no_grad():
        instance = Instance(runtime, Model(args.layers, args.seed), args)
        instance.load(files)
        started, every = time.perf_counter(), max(args.steps // SAMPLES, 1)
        for step in range(args.steps):
            instance.step(list(files))
            if step % every == every - 1:
                instance.report.resident.append(resident_bytes())
        instance.report.seconds = time.perf_counter() - started
        instance.report.stats = runtime.stats()
    if args.ranks > 1:
        dist.destroy_process_group()
    return instance.report


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def show(report: Report, steps: int) -> None:
    stats = report.stats
    ways = {
        way: sum(counts[way] for counts in stats["decisions"].values())
        for way in ("local", "route_a", "route_b", "fetch")
    }
    resident = [f"{report.resident[at * len(report.resident) // 5] / 1e6:.1f}" for at in range(5)]
    print(
        f"rank {report.rank}: {report.agents} agents, at most {report.most_at_once} at once, "
        f"{report.tokens} tokens in {steps} steps, {1e3 * report.seconds / steps:.1f} ms a step"
    )
    print(f"  tokens     {report.checked - report.differing} of {report.checked} agents as alone")
    print("  decisions  " + ", ".join(f"{way} {count}" for way, count in ways.items()))
    print("  bytes      " + ", ".join(f"{k} {n:,}" for k, n in stats["bytes_sent"].items()))
    print("  leases     " + ", ".join(f"{k} {n:,}" for k, n in stats["leases"].items()))
    print("  failures   " + ", ".join(f"{k} {n}" for k, n in stats["failures"].items()))
    print(
        f"  resident   {', '.join(resident)}, {report.resident[-1] / 1e6:.1f} MB; "
        f"{100 * report.growth:+.2f} % at most after the first fifth"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Sub-agents who come and go over one codebase.")
    whole = partial(parser.add_argument, type=int)
    parser.add_argument("--package", default="typer", help="whose sources are the corpus")
    whole("--ranks", default=2)
    whole("--agents", default=4, help="at once, at each rank")
    whole("--steps", default=200)
    whole("--files", default=8)
    whole("--file-bytes", default=512)
    whole("--layers", default=2)
    whole("--leases", default=256, help="fetched entries that each layer keeps")
    whole("--check", default=3, help="agents of each rank compared with one process")
    parser.add_argument("--mode", default="auto", help="or always-route, always-fetch, random")
    parser.add_argument("--log-decisions", action="store_true", help="JSON lines on stderr")
    whole("--seed", default=0)
    args = parser.parse_args()
    try:
        codebase(args.package, args.files, args.file_bytes)
    except ValueError as error:
        parser.error(str(error))
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.ranks, mp_context=context) as ranks,
    ):
        futures = [
            ranks.submit(run_rank, rank, f"{folder}/store", args) for rank in range(args.ranks)
        ]
        reports = [future.result() for future in futures]
    problems = []
    for report in reports:
        show(report, args.steps)
        if report.differing or report.stats["failures"]["coverage"]:
            problems.append(f"rank {report.rank}: a token differs, or a step was not covered")
        if args.steps >= SOAK_STEPS and report.growth > MAX_GROWTH:
            problems.append(f"rank {report.rank}: resident memory grew by {report.growth:.1%}")
    print(*(problems or ["all well"]), sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
