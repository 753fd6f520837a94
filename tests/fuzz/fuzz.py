"""Fuzz every reader of others' bytes: `make fuzz`, or with a finding's words to see it again.

    python tests/fuzz/fuzz.py --inputs 1000000
    python tests/fuzz/fuzz.py --seed 0 --target holder --number 4711

Exits with 1 if an input crashed or hung a reader, or was accepted wrongly. Which inputs are tried
depends on the seed alone, not on the number of jobs.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from fuzz_targets import TARGETS
from fuzzing import Findings, attempt, fuzz

CHUNK = 500
ROOM_BYTES = 3 << 30  # beyond what a process has when it starts: a huge count must not be believed
STUCK_S = 300.0  # of a chunk; a single input is stopped earlier, unless native code does not return
OUTCOMES = ("refused", "accepted", "crash", "hang", "wrong")


def prepare_process() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # empty tensors come filled with NaN
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def run_chunk(name: str, numbers: range, seed: int) -> Findings:
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
    try:
        return fuzz(BY_NAME[name], numbers, seed=seed)
    finally:
        faulthandler.cancel_dump_traceback_later()


BY_NAME = {target.name: target for target, _ in TARGETS}


def chunks(inputs: int, only: str | None) -> Iterator[tuple[str, range]]:
    """The numbers to try of every target, the slow targets first so that no job ends alone."""
    for target, share in reversed(TARGETS):
        count = inputs if only else round(inputs * share)
        if only in (None, target.name):
            for start in range(0, count, CHUNK):
                yield target.name, range(start, min(start + CHUNK, count))


def run(inputs: int, *, seed: int, only: str | None, jobs: int) -> dict[str, Findings]:
    found = {name: Findings() for name in BY_NAME if only in (None, name)}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_process) as pool:
        futures = {
            pool.submit(run_chunk, name, numbers, seed): (name, numbers)
            for name, numbers in chunks(inputs, only)
        }
        for future in as_completed(futures):
            name, numbers = futures[future]
            try:
                found[name].add(future.result())
            except BrokenProcessPool:
                found[name].counts["hang"] += 1
                found[name].said.append(f"{name} seed {seed}: a process died or stuck in {numbers}")
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fuzz every reader of others' bytes.")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--target", choices=BY_NAME)
    parser.add_argument("--number", type=int, help="try this one input of --target")
    args = parser.parse_args()
    if args.number is not None and args.target is None:
        parser.error("--number needs --target")
    return args


def main() -> int:
    args = parse_args()
    if args.number is not None:
        prepare_process()
        outcome, why = attempt(BY_NAME[args.target], args.number, seed=args.seed)
        print(outcome, why)
        return int(outcome not in ("refused", "accepted"))
    started = time.perf_counter()
    found = run(args.inputs, seed=args.seed, only=args.target, jobs=args.jobs)
    seconds = time.perf_counter() - started
    print(f"{'target':<16}", *(f"{outcome:>10}" for outcome in OUTCOMES), f"{'us each':>10}")
    total = Findings()
    for name, findings in found.items():
        total.add(findings)
        each = findings.seconds / max(findings.counts.total(), 1) * 1e6
        print(f"{name:<16}", *(f"{findings.counts[o]:>10,}" for o in OUTCOMES), f"{each:>10.0f}")
    tried = total.counts.total()
    print(f"{'all':<16}", *(f"{total.counts[outcome]:>10,}" for outcome in OUTCOMES))
    print(
        f"{tried:,} inputs in {seconds:.0f} s, {tried / seconds:,.0f} a second; "
        f"{total.seconds:.0f} s of {args.jobs} processors, seed {args.seed}"
    )
    for findings in found.values():
        print(*findings.said, sep="\n", end="\n" if findings.said else "")
    return int(total.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
