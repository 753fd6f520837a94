"""Every reader of others' bytes, as a target of the fuzzer, and how each acceptance is judged.

A wire message, an abort and a profile have one encoding or one reading: what was accepted is written
out again and must be what was given. What a holder does for a message is compared with a plain-Python
reading of that message; what a requester does with an answer, with the answer of an honest peer.
"""

from __future__ import annotations

import math
import struct
import tomllib
from functools import cache, partial
from importlib.resources import files
from random import Random
from typing import Any

import msgpack
import torch
from fuzz_manifest import MANIFEST
from fuzz_world import (
    PLAYS,
    Heard,
    Served,
    Subject,
    ask,
    check_asked,
    check_served,
    mutated_message,
    recorded,
    rows_held,
    serve,
)
from fuzzing import Target, hostile, mutated_bytes, mutated_tree, packb
from torch import Tensor

from qroam.partition.directory import (
    Directory,
    empty_directory,
    with_document,
    with_pin,
    with_quota,
    without_document,
)
from qroam.partition.directory_codec import directory_columns, directory_of
from qroam.partition.placement import PLACEMENT_POLICIES, Placement, place_at
from qroam.partition.presets import named_layout, uniform_model
from qroam.partition.repair import repaired
from qroam.runtime import CoverageError, PeerError, RuntimeConfig, load_profile
from qroam.runtime.cost.predicate import MODES
from qroam.runtime.cost.profile import PROFILE_NAMES, FabricProfile, parse_profile
from qroam.runtime.transport.gloo import abort_body, read_abort
from qroam.runtime.transport.handshake import introduction, received
from qroam.runtime.transport.messages import MAGIC, Header, Message, decode, encode

HEADER = Header(kind="attend", incarnation=7, channel=0, epoch=3, tables=99, layer=2, unit_tokens=4)


def as_bytes(buffer: Tensor) -> bytes:
    return buffer.numpy().tobytes()


def as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.zeros(0).byte()


# Wire messages ------------------------------------------------------------------------------------

_ROWS = torch.arange(48, dtype=torch.float32)
MESSAGES = [
    as_bytes(encode(header, columns))
    for header, columns in (
        (HEADER, {}),
        (HEADER, {"fetch": torch.arange(7, dtype=torch.int32)}),
        (
            Header(kind="select", incarnation=2**31 - 1, channel=1, epoch=2**31, tables=2**32 - 1),
            {"index.query": _ROWS.view(2, 4, 6), "index.weights": _ROWS[:8].view(2, 4)},
        ),
        (
            Header(kind="attend-answer", incarnation=1, channel=0, epoch=1, tables=0),
            {
                "A.out": _ROWS.view(3, 2, 8).bfloat16(),
                "A.lse": _ROWS[:6].double().view(3, 2),
                "A.covered": torch.arange(6, dtype=torch.int32).view(3, 2),
                "fetch.rows": torch.arange(35, dtype=torch.uint8).view(5, 7),
                "x": torch.arange(3),
            },
        ),
    )
]


def draw_message(random: Random) -> bytes:
    """A message with edited bytes, with an edited header, or with a header that lies about its rows."""
    raw = random.choice(MESSAGES)
    if random.random() < 0.5:
        return mutated_bytes(random, raw, MESSAGES)
    length = struct.unpack_from("<I", raw, 4)[0]
    head, body = msgpack.unpackb(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(random.randint(1, 2)):
        head = mutated_tree(random, head)
    if random.random() < 0.1:
        body = body[: random.randrange(len(body) + 1)] + bytes(random.choice((0, 16, 64)))
    packed = packb(head)
    return struct.pack("<II", MAGIC + random.choice((0,) * 9 + (1,)), len(packed)) + packed + body


def check_message(raw: bytes, message: Message) -> None:
    """Every bit of the buffer is in the message, where `encode` would have put it."""
    assert as_bytes(encode(message.header, message.columns)) == raw, "has another encoding too"


WIRE = Target(
    name="wire message",
    draw=draw_message,
    read=lambda raw: decode(as_tensor(raw)),
    check=check_message,
)


# Aborts, and what ranks say of themselves when they open --------------------------------------------

WORLD = 4
ABORTS = [
    abort_body((1,), "no answer within 5 s"),
    abort_body((0, 3), "raised ValueError: é"),
    abort_body((2,), "x" * 5000),
]


def draw_abort(random: Random) -> bytes:
    raw = random.choice(ABORTS)
    if random.random() < 0.5:
        return mutated_bytes(random, raw, ABORTS)
    return packb(mutated_tree(random, msgpack.unpackb(raw)))


def check_abort(raw: bytes, said: tuple[tuple[int, ...], str]) -> None:
    assert said[0], "nobody is blamed"
    assert set(said[0]) <= set(range(WORLD)), "a rank outside the world is blamed"
    assert abort_body(*said) == raw, "has another encoding too"


ABORT = Target(
    name="abort",
    draw=draw_abort,
    read=partial(read_abort, world_size=WORLD),
    check=check_abort,
)


def _config(**changes: Any) -> RuntimeConfig:
    model = uniform_model(named_layout("mla-tiny"), 2)
    return RuntimeConfig(model=model, **{"max_blocks": 64, **changes})


INTRODUCTION = introduction(1, WORLD, _config().described()).encode()


def draw_introduction(random: Random) -> Message:
    raw = mutated_bytes(random, INTRODUCTION, [INTRODUCTION, MESSAGES[0]])
    if random.random() < 0.3:
        raw = introduction(random.choice((0, 1, 3, 4, -1, 2**40)), WORLD, ["seed=0"]).encode()
    columns = {random.choice(("config",) * 9 + ("text",)): as_tensor(raw)}
    if random.random() < 0.2 and len(raw) % 8 == 0 and raw:
        columns = {"config": as_tensor(raw).view(random.choice((torch.int32, torch.float64)))}
    return Message(HEADER, columns)


@cache
def subjects() -> list[Subject]:
    return [Subject(number) for number in range(len(PLAYS))]


def check_introduction(message: Message, config: str) -> None:
    raw = as_bytes(message.columns["config"])
    assert f"rank=1\n{config}".encode() == raw, "is read as something else, or of another rank"


OPENING = Target(
    name="introduction",
    draw=draw_introduction,
    read=lambda message: received(subjects()[0].world.transport, message, rank=1),
    check=check_introduction,
)

# Profiles and configurations ------------------------------------------------------------------------

PROFILES = [
    (files("qroam.runtime.cost") / "profiles" / f"{name}.toml").read_bytes()
    for name in PROFILE_NAMES
]
_SNIPPETS = (
    *("[" * 3000, "{a=" * 1500, "a." * 3000 + "a=1", "[[path]]", "path.probe_us=1", "[path.x]"),
    *("1e999", "-0.0", "nan", "9" * 400, "9" * 9000, "0x" + "f" * 300, "1979-05-27", "07:32:00"),
    *("\r\n", '"\\uD800"', "'" * 3, '"' * 3, "\ufeff", "\x00"),
)


def draw_profile(random: Random) -> bytes:
    """Edited bytes, edited values, or something hostile in a place where TOML means something."""
    raw = random.choice(PROFILES)
    kind = random.random()
    if kind < 0.4:
        return mutated_bytes(random, raw, PROFILES)
    lines = raw.decode().splitlines()
    at = random.choice([number for number, line in enumerate(lines) if "=" in line])
    name, _, value = lines[at].partition("=")
    if kind < 0.55:
        lines[at] = f"{name}= {random.choice(_SNIPPETS)}"
    elif kind < 0.65:
        lines[at] = random.choice(_SNIPPETS)
    elif kind < 0.75:
        lines.insert(at, random.choice(lines))
    else:
        scale = random.choice((0.0, 0.5, 2.0, 10.0, -1.0, 1e6, 1e-12, 1e300))
        new = random.choice((f"{scale}", f"{int(scale * 7) % 10**9}", "true", '"x"', "[]", value))
        lines[at] = f"{name}= {new}"
    return "\n".join(lines).encode()


def check_profile(raw: bytes, profile: FabricProfile) -> None:
    """The profile, turned back into TOML's keys and units, is what TOML says; no key is left over."""
    path = {name: getattr(profile.path, name) for name in profile.path.__slots__}
    pull = [
        {"granule_bytes": granule, "gb_per_s": rate / 1e9}
        for granule, rate in path.pop("pull_bytes_per_s")
    ]
    device = {name: getattr(profile.device, name) for name in profile.device.__slots__}
    rebuilt = {
        "name": profile.name,
        "description": profile.description,
        "path": {**_in_toml(path), "pull_gb_per_s": pull},
        "device": _in_toml(device),
        "sources": dict(profile.sources),
    }
    assert _alike(rebuilt, tomllib.loads(raw.decode())), f"reads as {rebuilt}"
    for value in (*path.values(), *device.values()):
        assert 0 <= value <= 1e18, f"{value} is not believable"


def _in_toml(numbers: dict[str, float]) -> dict[str, float]:
    units = (
        ("_bytes_per_s", "_gb_per_s", 1e9),
        ("_per_s", "_tera_per_s", 1e12),
        ("_s", "_us", 1e-6),
    )
    toml = {}
    for name, value in numbers.items():
        suffix, spelt, scale = next(unit for unit in units if name.endswith(unit[0]))
        toml[name.removesuffix(suffix) + spelt] = value / scale
    return toml


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        same = isinstance(other, dict) and one.keys() == other.keys()
        return same and all(_alike(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, str) or isinstance(other, bool | str):
        return type(one) is type(other) and bool(one == other)
    return math.isclose(one, float(other), rel_tol=1e-12, abs_tol=1e-300)


PROFILE = Target(
    name="profile",
    draw=draw_profile,
    read=partial(parse_profile, where="fuzz.toml"),
    check=check_profile,
)

CONFIG: dict[str, Any] = {
    "max_blocks": 64,
    "block_tokens": 16,
    "corpus_slots": None,
    "private_blocks": 3,
    "request_blocks": 2,
    "placement": ("block-cyclic", 1, 2),
    "index_placement": "replicated",
    "lease_entries": 5,
    "mode": "auto",
    "seed": 3,
    "reuse": 2.0,
    "fabric": load_profile("nvlink4"),
    "dtype": torch.bfloat16,
    "deadline_s": 3.0,
    "workspace_bytes": 1 << 20,
    "checked": True,
}


def draw_config(random: Random) -> dict[str, Any]:
    changes = dict(CONFIG)
    good: dict[str, tuple[Any, ...]] = {
        "mode": MODES,
        "dtype": (torch.float64,),
        "checked": (False,),
    }
    for _ in range(random.randint(1, 2)):
        name = random.choice(list(changes))
        value = changes[name]
        if name == "placement" and isinstance(value, tuple) and random.random() < 0.8:
            at = random.randrange(3)
            changes[name] = (*value[:at], hostile(random, value[at]), *value[at + 1 :])
        else:
            changes[name] = random.choice([*good.get(name, ()), *(hostile(random, value),) * 3])
    return changes


def read_config(given: dict[str, Any]) -> RuntimeConfig:
    placement = given["placement"]
    if isinstance(placement, tuple):
        policy, run, copies = placement
        placement = Placement(policy=policy, run=run, copies=copies)
    return _config(**{**given, "placement": placement})


def check_config(given: dict[str, Any], config: RuntimeConfig) -> None:
    """Every field has the type and the range that its documentation promises."""
    whole = {"max_blocks": 1, "block_tokens": 1, "request_blocks": 1, "workspace_bytes": 1}
    whole |= {"private_blocks": 0, "lease_entries": 0, "seed": -(2**63)}
    for name, least in whole.items():
        assert type(given[name]) is int, name
        assert given[name] >= least, name
    slots = given["corpus_slots"]
    assert slots is None or (type(slots) is int and slots >= 1)
    assert type(given["checked"]) is bool
    assert type(given["reuse"]) in (int, float)
    assert 1 <= given["reuse"] < math.inf
    assert 0 < given["deadline_s"] <= 86400
    assert given["mode"] in MODES
    assert given["index_placement"] in ("with-blocks", "replicated")
    assert given["dtype"] in (torch.float64, torch.float32, torch.bfloat16)
    policy, run, copies = given["placement"]
    assert policy in PLACEMENT_POLICIES
    assert min(run, copies) >= 1
    keys = given["max_blocks"] + max(given["private_blocks"], 1) * given["request_blocks"]
    assert keys * given["block_tokens"] < 2**31
    same = all(given[name] == CONFIG[name] for name in CONFIG if name != "deadline_s")
    assert (config.fingerprint(2) == read_config(CONFIG).fingerprint(2)) == same, "fingerprint"


SETTINGS = Target(name="config", draw=draw_config, read=read_config, check=check_config)

# Tables for a rank that joins -----------------------------------------------------------------------

TABLES_CAPACITY = 20
BLANK = empty_directory(max_blocks=12, block_tokens=4, num_branches=2, copies=2, world_size=WORLD)


def _directory() -> Directory:
    """Four documents, two of which share a beginning, and one of which is gone."""
    directory = BLANK
    shared = tuple(bytes([number]) * 32 for number in range(3))
    contents = {"a": shared[:2], "b": (), "c": shared, "d": ()}
    for name, tokens in {"a": 9, "b": 3, "c": 13, "d": 8}.items():
        fresh = -(-tokens // 4) - len(directory.prefix(contents[name]))
        ranks = place_at(1, fresh, num_branches=2, copies=2, world_size=WORLD)
        directory = with_document(
            directory,
            name,
            tokens=tokens,
            position=len(name),
            ranks=ranks,
            capacity=TABLES_CAPACITY,
            hashes=contents[name],
            group="g" if tokens > 8 else "",
        )
    return with_quota(with_pin(without_document(directory, "b"), "c", True), "g", 9)


def draw_tables(random: Random) -> dict[str, Tensor]:
    columns = {name: rows.clone() for name, rows in directory_columns(_directory()).items()}
    for _ in range(random.choice((1, 1, 2))):
        name = random.choice(list(columns))
        rows = columns[name]
        if name == "documents" and random.random() < 0.9:
            raw = as_bytes(rows)
            try:
                raw = packb(mutated_tree(random, msgpack.unpackb(raw)))
            except (ValueError, msgpack.UnpackException):  # it was edited before
                raw = mutated_bytes(random, raw, [raw])
            columns[name] = as_tensor(raw)
        elif random.random() < 0.8 and rows.numel():
            value = random.choice((-2, -1, 0, 1, 2, 3, 4, 11, 19, 20, 2**31 - 1, -(2**31)))
            at = random.randrange(rows.numel())
            rows.view(-1)[at] = value % 256 if name == "documents" else value
        else:
            columns[name] = random.choice((rows[:-1], rows.double(), rows[None], rows[:0]))
    if random.random() < 0.1:
        del columns[random.choice(list(columns))]
    return columns


def check_tables(columns: dict[str, Tensor], directory: Directory) -> None:
    """It says what was sent, and is what deltas could have made: it can be changed further."""
    for name, rows in directory_columns(directory).items():
        sent = columns.get(name, rows[:0])
        assert torch.equal(rows, sent), f"{name} have another encoding too"
    held = [block for document in directory.documents.values() for block in document.blocks]
    assert directory.references.tolist() == [held.count(block) for block in range(12)]
    assert all((count > 0) == (block in held) for block, count in enumerate(directory.tokens))
    assert int(directory.used.sum()) == int((directory.owners >= 0).sum())
    for name in list(directory.documents):
        directory = without_document(with_pin(directory, name, False), name)
    assert not bool((directory.owners >= 0).any()), "somebody's copy stays for ever"
    assert directory.used.tolist() == [0] * WORLD
    repaired(directory, [1, 0], world_size=2, capacity=TABLES_CAPACITY, index_capacity=12)


JOINING = Target(
    name="tables",
    draw=draw_tables,
    read=partial(directory_of, like=BLANK, world_size=WORLD, capacity=TABLES_CAPACITY),
    check=check_tables,
)

# What a holder does for a message, and a requester with an answer -----------------------------------


@cache
def heard_of(number: int) -> list[Heard]:
    return recorded(number)


@cache
def held_before(number: int) -> Served:
    world = subjects()[number].world
    return Served({}, rows_held(world, False), rows_held(world, True))


def draw_visit(random: Random) -> tuple[int, Message]:
    number = random.randrange(len(PLAYS))
    questions = [step.messages[0] for step in heard_of(number)]
    return number, mutated_message(random, random.choice(questions), questions)


def check_visit(given: tuple[int, Message], served: Served) -> None:
    number, message = given
    check_served(subjects()[number], held_before(number), message, served)


HOLDER = Target(
    name="holder",
    draw=draw_visit,
    read=lambda given: serve(subjects()[given[0]], given[1]),
    check=check_visit,
)


def draw_answers(random: Random) -> tuple[Heard, list[Message]]:
    """What rank 1 honestly said in a step, with a change, most often in the answer."""
    every = heard_of(random.randrange(len(PLAYS)))
    step = random.choice(every)
    script, at = list(step.messages), random.choice((0, 1, 1, 1))
    script[at] = mutated_message(random, script[at], [other.messages[at] for other in every])
    return step, script


REQUESTER = Target(
    name="requester",
    draw=draw_answers,
    read=lambda given: ask(subjects()[given[0].play], given[0], given[1]),
    check=lambda given, outcome: check_asked(given[0], given[1], outcome),
    refusals=(PeerError, CoverageError),
)

# (target, its share of a run)
TARGETS = (
    (WIRE, 0.5),
    (JOINING, 0.02),
    (ABORT, 0.1),
    (OPENING, 0.1),
    (MANIFEST, 0.1),
    (PROFILE, 0.05),
    (SETTINGS, 0.08),
    (HOLDER, 0.035),
    (REQUESTER, 0.015),
)
