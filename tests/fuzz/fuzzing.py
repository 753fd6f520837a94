"""A seeded, structure-aware fuzzer for whatever reads bytes or trees that somebody else wrote.

A `Target` draws inputs, reads them, and judges what was accepted. Input `number` of a target is a
pure function of (seed, target, number), so every finding is reproduced by naming the three.

    refused    ValueError, or another of the target's `refusals`
    crash      any other exception, running out of memory included
    hang       no result within `PATIENCE_S`
    wrong      accepted, and `check` says that it should not have been, or that it was misread
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from types import FrameType
from typing import Any

import msgpack

PATIENCE_S = 5.0
_KEPT = 5  # findings of a target that are told in full

HOSTILE_INTS = (
    *(0, 1, -1, 2, 7, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**63), 10**400),
)
HOSTILE_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e308, float("inf"), -float("inf"), float("nan"))
HOSTILE_TEXTS = ("", " ", "0", "a" * 70, "é✓\u2028", "\x00", "../x", "nan", "B", "attend")


class Hang(BaseException):
    """An input took longer than `PATIENCE_S`; no parser can catch it by accident."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that reads what others wrote.

    Args:
        draw: an input, valid or not, from the randomness alone.
        read: what is under test; it raises one of `refusals`, or accepts and returns.
        check: (input, what `read` returned); AssertionError unless the acceptance was right.
    """

    name: str
    draw: Callable[[Random], Any]
    read: Callable[[Any], Any]
    check: Callable[[Any, Any], None]
    refusals: tuple[type[Exception], ...] = (ValueError,)


@dataclass(slots=True)
class Findings:
    """Counts by outcome, the first findings in words, and the processor time it took."""

    counts: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def bad(self) -> int:
        return sum(self.counts[kind] for kind in ("crash", "hang", "wrong"))

    def add(self, other: Findings) -> None:
        self.counts += other.counts
        self.said = (self.said + other.said)[:_KEPT]
        self.seconds += other.seconds


def fuzz(target: Target, numbers: range, *, seed: int) -> Findings:
    """Try the inputs of these numbers. Needs the main thread, whose alarm clock it uses."""
    found, started = Findings(), time.process_time()
    with _alarm():
        for number in numbers:
            outcome, why = attempt(target, number, seed=seed)
            found.counts[outcome] += 1
            if why and len(found.said) < _KEPT:
                found.said.append(f"{target.name} seed {seed} number {number}: {outcome}: {why}")
    found.seconds = time.process_time() - started
    return found


def attempt(target: Target, number: int, *, seed: int) -> tuple[str, str]:
    """The outcome of one input, and for a bad one what was the matter and the input."""
    given = target.draw(Random(f"{seed} {target.name} {number}"))
    try:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S)
        try:
            accepted = target.read(given)
        except target.refusals:
            return "refused", ""
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        target.check(given, accepted)
    except Hang:
        return "hang", _shown(given)
    except AssertionError as error:
        return "wrong", f"{str(error)[:300]}; input {_shown(given)}"
    except Exception as error:
        return "crash", f"{type(error).__name__}: {str(error)[:300]}; input {_shown(given)}"
    return "accepted", ""


def _shown(given: object) -> str:
    return given.hex()[:400] if isinstance(given, bytes) else repr(given)[:400]


@contextmanager
def _alarm() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


def mutated_bytes(random: Random, valid: bytes, others: Sequence[bytes]) -> bytes:
    """One to four edits: flips, numbers that are off, cuts, repeats, truncations, other inputs' parts."""
    raw = bytearray(valid)
    for _ in range(random.randint(1, 4)):
        # Most of what is decided lies in front, where a message has its header.
        at = (
            random.randrange(min(len(raw), 256) if random.random() < 0.7 else len(raw))
            if raw
            else 0
        )
        match random.randrange(9):
            case 0 if raw:
                raw[at] ^= 1 << random.randrange(8)
            case 1 if raw:
                raw[at] = random.randrange(256)
            case 2:
                size = random.choice((1, 2, 4, 8))
                value = random.choice(HOSTILE_INTS) % 256**size
                raw[at : at + size] = value.to_bytes(size, random.choice(("little", "big")))
            case 3:
                del raw[at : at + random.choice((1, 1, 2, 4, 16, 64))]
            case 4:
                raw[at:at] = raw[at : at + random.choice((1, 2, 4, 16, 64))]
            case 5:
                raw[at:at] = random.randbytes(random.choice((1, 2, 4, 16)))
            case 6:
                del raw[random.randrange(len(raw) + 1) :]
            case 7:
                other = random.choice(others)
                raw[at:] = other[random.randrange(len(other) + 1) :]
            case _:
                raw += bytes(random.choice((1, 8, 16, 4096)))
    return bytes(raw)


def mutated_tree(random: Random, tree: Any) -> Any:
    """A copy of a tree of dicts, lists and scalars in which one node is something else."""
    inside = isinstance(tree, dict | list) and len(tree) > 0
    if not inside or random.random() < 0.1:
        return hostile(random, tree)
    if isinstance(tree, dict):
        copy: Any = dict(tree)
        name = random.choice(list(tree))
        match random.randrange(8):
            case 0:
                del copy[name]
            case 1:
                copy[random.choice(HOSTILE_TEXTS)] = tree[name]
            case 2:
                copy = dict(sorted(copy.items(), key=lambda _: random.random()))
            case _:
                copy[name] = mutated_tree(random, tree[name])
        return copy
    copy, at = list(tree), random.randrange(len(tree))
    match random.randrange(6):
        case 0:
            del copy[at]
        case 1:
            copy.insert(at, tree[at])
        case 2:
            copy = copy * random.choice((2, 40))
        case _:
            copy[at] = mutated_tree(random, tree[at])
    return copy


def hostile(random: Random, value: Any) -> Any:
    """Something else in place of `value`: near it, of its kind but absurd, or of another kind."""
    if isinstance(value, int) and random.random() < 0.4:
        return value + random.choice((-1, 1, 2, 256))
    if isinstance(value, str) and value and random.random() < 0.4:
        at = random.randrange(len(value))
        return random.choice((value[:at], value[:at] + value, value + "x", value.upper()))
    return random.choice(
        (
            random.choice(HOSTILE_INTS),
            random.choice(HOSTILE_FLOATS),
            random.choice(HOSTILE_TEXTS),
            *(None, True, False, [], {}, [value], {"a": value}, [[value]], b"\xff\x00"),
            nested(random.choice((3, 300))),
        )
    )


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


def packb(tree: Any) -> bytes:
    """msgpack of any mutated tree; what msgpack has no form for becomes nil."""
    return bytes(msgpack.packb(packable(tree)))


def packable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {packable(name): packable(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [packable(value) for value in tree]
    return None if isinstance(tree, int) and not -(2**63) <= tree < 2**64 else tree
