"""A small world whose ranks were recorded while they worked, and a rank alone that serves or asks.

Rank 0 is under test. What rank 1 sent it is mutated; `Truth` is a plain-Python reading of what rank 0
stores, by which its answers are judged. Letters: G branches, B tokens of a block, U of a unit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any, NamedTuple

import dense
import torch
from fuzzing import HOSTILE_FLOATS, HOSTILE_INTS, HOSTILE_TEXTS
from ranks import run_loopback
from torch import Tensor

from qroam.kernels.coverage import coverage, mix, tagged
from qroam.partition.layout import Layout
from qroam.partition.presets import mlra, named_layout, uniform_model
from qroam.runtime import CoverageError, PeerError, Runtime, RuntimeConfig
from qroam.runtime.cost.predicate import Mode
from qroam.runtime.cpu.answer import answer_attend, answer_select
from qroam.runtime.runtime import opened_world
from qroam.runtime.scope import Selection
from qroam.runtime.transport.base import Purpose, Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header, Message, encode
from qroam.runtime.world import World

B = 8
LOADED, WRITTEN = 60, 20  # tokens of the document that is there, and of those that are pushed
PUSHED = {0: "a", 1: "b", 7: "c"}  # the steps in which rank 1 writes a document
_TRUSTED = 1e3  # queries up to here are compared by value, larger ones overflow fp32


class Asked(NamedTuple):
    """One step of a rank: an index query or a query, with a selection and a mode, over a document
    that is attached `offset` positions from its own.
    """

    layer_step: str
    unit_tokens: int
    mode: Mode
    query: Tensor
    weights: Tensor
    ids: Tensor
    offset: int


class Play(NamedTuple):
    """A layout, and the steps that both ranks take with it, each with its own queries."""

    layout: Layout
    config: RuntimeConfig
    steps: tuple[Asked, ...]


def play(layout: Layout) -> Play:
    config = RuntimeConfig(
        model=uniform_model(layout, 1),
        max_blocks=20,
        block_tokens=B,
        private_blocks=1,
        request_blocks=1,
        lease_entries=0 if layout.index else 64,
        deadline_s=5.0,
    )
    g = torch.Generator().manual_seed(7)
    steps = []
    kinds = [("attend", unit, mode, 0) for mode in _MODES for unit in (1, 4)]
    if layout.index is not None:
        kinds += [("select", 1, "auto", 0), ("select", 4, "auto", 0), ("select", 4, "auto", 37)]
    kinds += [("attend", 4, "random", 37), ("attend", 1, "always-route", 37)]
    for name, unit, mode, offset in kinds:
        heads = layout.index.heads if layout.index and name == "select" else layout.heads
        dim = layout.query_dim if layout.projection else layout.key_dim
        dim = layout.index.head_dim if layout.index and name == "select" else dim
        query = torch.randn(3, heads, dim, generator=g)
        ids = torch.rand(3, LOADED // unit, generator=g).argsort(1)[:, :6].to(torch.int32)
        steps.append(Asked(name, unit, mode, query, torch.rand(3, heads, generator=g), ids, offset))
    return Play(layout, config, tuple(steps))


_MODES: tuple[Mode, ...] = ("always-route", "always-fetch", "random")
PLAYS = (play(named_layout("mla-tiny")), play(mlra(2, heads=2, codec="fp32")))


def contents(layout: Layout, tokens: int) -> tuple[Tensor, Tensor | None]:
    """The entries (tokens, G, D) and index keys of a document."""
    g = torch.Generator().manual_seed(tokens)
    entries = torch.randn(tokens, layout.num_branches, layout.entry_dim, generator=g)
    if layout.index is None:
        return entries, None
    return entries, torch.randn(tokens, layout.index.head_dim, generator=g)


def prepare(runtime: Runtime, layout: Layout) -> None:
    """A document that is loaded, some that are declared, and the layer's weights."""
    g = torch.Generator().manual_seed(1)
    heads = (layout.num_branches, layout.branch_heads)
    assert layout.projection is not None
    w_uk = torch.randn(*heads, layout.projection.nope_dim, layout.absorbed_dim, generator=g)
    w_uv = torch.randn(*heads, layout.value_dim, layout.projection.out_dim, generator=g)
    runtime.load_weights(0, w_uk / 8, w_uv / 8)
    runtime.add_document("there", tokens=LOADED)
    for name in PUSHED.values():
        runtime.add_document(name, tokens=WRITTEN)
    runtime.load_document("there", 0, *contents(layout, LOADED))


def take(runtime: Runtime, step: Asked) -> Tensor:
    """Take part in a step; returns the selected ids, or the output."""
    scope = runtime.scope(documents=[("there", step.offset)], queries=len(step.query))
    runtime.avoid(
        [1 - runtime.rank] if step.offset else []
    )  # asked all the same: nobody else has it
    if step.layer_step == "select":
        return runtime.select(
            0, step.query, step.weights, scope=scope, top_k=5, unit_tokens=step.unit_tokens
        ).ids
    chosen = Selection(step.ids, step.unit_tokens, scope)
    return runtime.attend(0, step.query, chosen, mode=step.mode)


class Heard(NamedTuple):
    """What rank 1 sent to rank 0 in a step: its question, its answer if any; and what came of it."""

    play: int
    step: int
    epoch: int
    messages: tuple[Message, ...]
    outcome: Tensor


class _Recording(LoopbackTransport):
    def __init__(self, **sizes: Any) -> None:
        super().__init__(**sizes)
        self.sent: list[Message] = []

    def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
        self.sent.append(Message(header, {n: rows.clone() for n, rows in shares[0].items()}))
        super().post_shares(header, shares)


def recorded(number: int) -> list[Heard]:
    """All that rank 1 sent in a play, in which its steps also carry what it wrote."""
    ends = _Recording.world(2, deadline_s=5.0)
    layout, config, steps = PLAYS[number]
    entries, keys = contents(layout, WRITTEN)

    def work(end: Transport) -> list[tuple[int, int, Tensor]]:
        assert isinstance(end, _Recording)
        done = []
        with Runtime.open(config, end) as runtime:
            prepare(runtime, layout)
            for at, step in enumerate(steps):
                if end.rank == 1 and at in PUSHED:
                    writer = runtime.request(into=PUSHED[at])
                    runtime.write(0, runtime.append(writer, WRITTEN), entries, keys)
                before = len(end.sent)
                outcome = take(runtime, step if end.rank == 0 else _other(step))
                done.append((before, runtime._world.progress.epoch, outcome))
        return done

    first, _ = run_loopback(2, work, transports=ends)
    assert isinstance(ends[1], _Recording)
    sent, heard = ends[1].sent, []
    for at, (before, epoch, outcome) in enumerate(first):
        after = first[at + 1][0] if at + 1 < len(first) else len(sent)
        heard.append(Heard(number, at, epoch, tuple(sent[before:after]), outcome))
    return heard


def _other(step: Asked) -> Asked:
    """The same step with rank 1's own queries."""
    return step._replace(query=step.query.flip(0), ids=step.ids.flip(1)[:2].contiguous())._replace(
        query=step.query.flip(0)[:2], weights=step.weights[:2]
    )


class Scripted(LoopbackTransport):
    """Rank 0 of two, whose peer says what the script says."""

    def __init__(self, deadline_s: float) -> None:
        super().__init__(rank=0, world_size=2, deadline_s=deadline_s)
        self.script: list[Tensor] = []

    def rewind(self, script: list[Tensor]) -> None:
        self.script, self._failure = script, None

    def _send(self, peer: int, buffer: Tensor, purpose: Purpose = Purpose.STEP) -> None:
        pass

    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None:
        pass

    def _receive_all(self) -> dict[int, Tensor]:
        return {1: self.script.pop(0)}


class Subject:
    """Rank 0 after `prepare`, and what it can read, in plain tables."""

    def __init__(self, number: int) -> None:
        self.layout, config, self.steps = PLAYS[number]
        self.transport = Scripted(config.deadline_s)
        self.world = opened_world(config, self.transport, self.transport.counted())
        self.runtime = Runtime(self.world, owns_transport=False)
        prepare(self.runtime, self.layout)
        self.corpus = config.max_blocks * B

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """What is written, leased or counted inside is forgotten."""
        world = self.world
        stores = (world.stores.entries, world.stores.index)
        fills = [store.fill.clone() for store in stores]
        try:
            yield
        finally:
            for store, fill in zip(stores, fills, strict=True):
                store.fill.copy_(fill)
            self.runtime.drop_leases()


class Served(NamedTuple):
    """A holder's answer, and the encoded rows of every stored id afterwards, None where not held."""

    answer: Mapping[str, Tensor]
    entries: list[Tensor | None]
    index_keys: list[Tensor | None]


def rows_held(world: World, of_index: bool) -> list[Tensor | None]:
    store = world.stores.index if of_index else world.stores.entries
    if store.codecs[0] is None:
        return []
    branches = 1 if of_index else world.config.num_branches
    at, here = store.resolve(0, torch.arange(world.config.max_blocks * B * branches))
    rows = store.rows(0, at)
    return [rows[n] if ok else None for n, ok in enumerate(here.tolist())]


def serve(subject: Subject, message: Message) -> Served:
    """What rank 0 does for a message: the path from `settle` to the answer."""
    world = subject.world
    with subject.unchanged():
        world.check_columns(message)
        world.writes.apply(message)
        answer = {"select": answer_select, "attend": answer_attend}[message.header.kind](
            world, message
        )
        return Served(answer, rows_held(world, False), rows_held(world, True))


def check_served(subject: Subject, before: Served, message: Message, served: Served) -> None:
    """The plain reading: what was pushed is there and nothing else changed; answers are right."""
    columns, answer = message.columns, served.answer
    branches = subject.layout.num_branches
    expected: set[str] = set()
    for name, old, new in (
        ("push", before.entries, served.entries),
        ("push_index", before.index_keys, served.index_keys),
    ):
        ids = columns[f"{name}.ids"].tolist() if f"{name}.ids" in columns else []
        rows = dict(zip(ids, columns.get(f"{name}.rows", torch.empty(0)), strict=True))
        assert len(rows) == len(ids), f"{name}: ids repeat"
        assert all(old[at] is None for at in ids), f"{name}: overwrites"
        assert all(_numbers(row).isfinite().all() for row in rows.values()), f"{name}: NaN"
        tokens = subject.world.directory.tokens.tolist()
        blocks = [at // B if name == "push_index" else at // (B * branches) for at in ids]
        ends = [tokens[block] for block in blocks]
        assert all(at % B < end for at, end in zip(ids, ends, strict=True)), f"{name}: no document"
        for at, (was, now) in enumerate(zip(old, new, strict=True)):
            want = rows.get(at, was)
            same = now is None if want is None else now is not None and torch.equal(now, want)
            assert same, f"{name}: the row of id {at} is not what was there or pushed"
    if message.header.kind == "select":
        if any(name.startswith("index.") for name in columns):
            _check_select(subject, served, message)
            expected = {"score", "id", "seen"}
    else:
        for form in ("A", "B"):
            if any(name.startswith(f"{form}.") for name in columns):
                _check_routed(subject, served, message, form)
                expected |= {f"{form}.out", f"{form}.lse", f"{form}.covered"}
        if "fetch" in columns:
            _check_fetched(subject, served, message)
            expected |= {"fetch.rows", "fetch.mark"}
    assert set(answer) == expected, f"answered {sorted(answer)}"


def _numbers(row: Tensor | None) -> Tensor:
    assert row is not None
    return row.clone().view(torch.float32).double()


def _check_routed(subject: Subject, served: Served, message: Message, form: str) -> None:
    columns, unit_tokens = message.columns, message.header.unit_tokens
    layout, branches = subject.layout, subject.layout.num_branches
    item, count = columns[f"{form}.item"].tolist(), columns[f"{form}.count"].tolist()
    units, query = columns[f"{form}.units"].tolist(), columns[f"{form}.query"].double()
    hidden = columns.get(f"{form}.hidden", torch.zeros(len(item), 2)).tolist()
    assert len(item) == len(count) == len(query)
    assert sum(count) == len(units)
    weights = subject.world.weights[0]
    assert weights is not None
    offsets = columns.get(f"{form}.offsets", torch.zeros(len(units), dtype=torch.int32))
    assert len(offsets) == len(units)
    lists = zip(torch.tensor(units).split(count), offsets.split(count), strict=True)
    for pair, (listed, moved) in enumerate(lists):
        ids, shifts = [], []
        for unit, offset in zip(listed.tolist(), moved.tolist(), strict=True):
            assert 0 <= unit < len(served.entries), f"unit {unit} is no id of the corpus"
            assert unit % unit_tokens == 0, f"unit {unit} is not where a unit begins"
            assert unit // B % branches == item[pair] % branches, "another branch's unit"
            for at in range(unit, unit + unit_tokens):
                entry = at // (B * branches) * B + at % B
                if (
                    served.entries[at] is not None
                    and not hidden[pair][0] <= entry < hidden[pair][1]
                ):
                    ids.append(at)
                    shifts.append(offset)
        covered = coverage(
            torch.tensor([ids]), torch.zeros(1, len(ids)), torch.ones(1, len(ids)).bool()
        )
        want = tagged(covered, torch.tensor([item[pair]]))[0]
        assert torch.equal(served.answer[f"{form}.covered"][pair], want), "coverage"
        if float(query[pair].abs().max()) > _TRUSTED:
            continue
        rows, branch = query[pair], item[pair] % branches
        if form == "B":
            w_uk = weights.w_uk[branch].double()
            nope = rows[:, : w_uk.shape[1]]
            rows = torch.cat((torch.einsum("hn,hnc->hc", nope, w_uk), rows[:, w_uk.shape[1] :]), 1)
        out = torch.zeros(len(rows), layout.value_dim, dtype=torch.float64)
        lse = torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        if ids:
            entries = torch.stack([_numbers(served.entries[at]) for at in ids])
            keys = entries[:, -layout.key_dim :]
            for offset in set(shifts) - {0}:
                there = (torch.tensor(shifts) == offset)[:, None]
                keys = torch.where(there, dense.moved_keys(keys, offset, layout.rope), keys)
            scores = rows @ keys.T * layout.softmax_scale
            out, lse = scores.softmax(1) @ entries[:, : layout.value_dim], scores.logsumexp(1)
        if form == "B":
            out = torch.einsum("hc,hcv->hv", out, weights.w_uv[branch].double())
        got_out, got_lse = served.answer[f"{form}.out"][pair], served.answer[f"{form}.lse"][pair]
        limit = 1e-4 * max(1.0, float(query[pair].abs().max()))
        assert torch.allclose(got_out.double(), out, rtol=1e-3, atol=limit), "output"
        assert torch.allclose(got_lse.double(), lse, rtol=1e-4, atol=limit), "lse"


def _check_fetched(subject: Subject, served: Served, message: Message) -> None:
    units, unit_tokens = message.columns["fetch"].tolist(), message.header.unit_tokens
    assert len(set(units)) == len(units), "units repeat"
    rows, mark = served.answer["fetch.rows"], served.answer["fetch.mark"]
    assert len(rows) == len(mark) == len(units) * unit_tokens
    for at, unit in enumerate(units):
        assert 0 <= unit < len(served.entries), f"unit {unit} is no id of the corpus"
        assert unit % unit_tokens == 0, f"unit {unit} is not where a unit begins"
        for offset in range(unit_tokens):
            held, place = served.entries[unit + offset], at * unit_tokens + offset
            if held is None:
                assert int(mark[place]) == 0, "an absent row is marked as there"
            else:
                assert torch.equal(rows[place], held), "another row"
                one = torch.tensor([unit + offset])
                assert int(mark[place]) == int(mix(one, one * 0))


def _check_select(subject: Subject, served: Served, message: Message) -> None:
    columns, header = message.columns, message.header
    query, weights = columns["index.query"].double(), columns["index.weights"].double()
    askable = columns.get("index.askable")
    mine = askable is None or int(askable[subject.world.rank]) > 0  # there is one copy of each
    here = [at for at, row in enumerate(served.index_keys) if row is not None and mine]
    rows = [_numbers(served.index_keys[at])[None] for at in here]
    keys = torch.cat([torch.zeros(0, query.shape[2], dtype=torch.float64), *rows])
    offsets = columns.get("index.offsets", torch.zeros(len(query), 1)).tolist()
    found = served.answer["id"].view(len(query), -1) if len(query) else torch.empty(0, 0)
    for at, runs in enumerate(columns["index.runs"].tolist()):
        assert all(start >= 0 and count >= 0 for start, count in runs), "a negative run"
        seen = [n for n, e in enumerate(here) if any(s <= e < s + c for s, c in runs)]
        assert int(served.answer["seen"][at]) == len(seen), "entries scored"
        assert len(set(offsets[at])) <= 1, "these plays attach one document"
        moved = dense.moved_index_keys(keys, int(offsets[at][0]), subject.layout) if seen else keys
        scores = weights[at] @ (query[at] @ moved.T).relu()
        best: dict[int, float] = {}
        for n in seen:
            unit = here[n] // header.unit_tokens
            best[unit] = max(best.get(unit, -torch.inf), float(scores[n]))
        got = [unit for unit in found[at].tolist() if unit >= 0]
        assert len(set(got)) == len(got) == min(header.top_k, len(best)), "how many units"
        assert set(got) <= best.keys(), "units nobody may see"
        largest = max((abs(score) for score in best.values()), default=0.0)
        if largest < 1e30 and len(got) < len(best):
            worst = min(best[unit] for unit in got)
            missed = max(score for unit, score in best.items() if unit not in got)
            assert missed <= worst + 1e-4 * max(1.0, largest), "a better unit was left out"


# A requester and a peer that answers something else ------------------------------------------------


def ask(subject: Subject, heard: Heard, script: Sequence[Message]) -> Tensor:
    """What comes of rank 0's own step if rank 1 says this.

    Raises: PeerError that names rank 1, or CoverageError.
    """
    subject.transport.rewind([encode(message.header, message.columns) for message in script])
    subject.world.progress.restart(heard.epoch - 1)
    with subject.unchanged():
        try:
            return take(subject.runtime, subject.steps[heard.step])
        except (PeerError, CoverageError) as error:
            blamed = error.culprits if isinstance(error, PeerError) else error.holders
            if 1 not in blamed or (isinstance(error, PeerError) and len(blamed) > 1):
                raise AssertionError(f"blames {blamed}: {error}") from error
            raise


def check_asked(heard: Heard, script: Sequence[Message], outcome: Tensor) -> None:
    """Exactly as with an honest peer, unless the numbers themselves were changed into others: a lie
    that no requester can see. Then at least all numbers are sound, and all ids are possible ones."""
    lies = ("out", "lse", "rows", "score", "id", "seen")
    for message in script:
        unknown = [name for name in message.columns if not _KNOWN.fullmatch(name)]
        assert not unknown, f"nobody reads {unknown}"
    told, honest = script[-1].columns, heard.messages[-1].columns
    lied = any(
        name.split(".")[-1] in lies and (name not in told or not same_bits(told[name], rows))
        for name, rows in honest.items()
    )
    if not lied:
        assert torch.equal(outcome, heard.outcome), "another result from the same numbers"
    assert bool(outcome.isfinite().all()), "NaN or infinity came out"
    for name, rows in honest.items():
        if name.endswith(".covered"):
            assert torch.equal(told[name], rows), "another coverage was taken"
    if outcome.dtype == torch.int32:
        for row in outcome.tolist():
            ids = [at for at in row if at >= 0]
            assert len(set(ids)) == len(ids)
            assert all(at < LOADED for at in ids)


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    raw = [rows.contiguous().view(-1).view(torch.uint8) for rows in (one, other)]
    return alike and torch.equal(*raw)


_KNOWN = re.compile(
    r"push(_index)?\.(ids|rows)|fetch|fetch\.(rows|mark)|score|id|seen|index\.(query|weights|runs|offsets|askable)"
    r"|[AB]\.(query|item|count|units|hidden|offsets|out|lse|covered)"
)

# Mutations of columns ------------------------------------------------------------------------------


def mutated_message(random: Random, message: Message, others: Sequence[Message]) -> Message:
    """One to three changes of columns or of the header's numbers."""
    header, columns = message.header, dict(message.columns)
    for _ in range(random.choice((1, 1, 2, 3))):
        if random.random() < 0.12 or not columns:
            header = _mutated_header(random, header)
            continue
        name = random.choice(list(columns))
        if name.startswith("push") and random.random() < 0.2:
            columns |= _longer_push(columns, name.partition(".")[0])
            continue
        match random.randrange(12):
            case 0:
                del columns[name]
            case 1:
                columns[random.choice([*columns, *HOSTILE_TEXTS, "A.units", "fetch"])] = columns[
                    name
                ]
            case 2:
                other = dict(random.choice(others).columns)
                if other:
                    picked = random.choice(list(other))
                    columns[picked] = other[picked]
            case 3 | 4 | 5:
                columns[name] = _mutated_shape(random, columns[name])
            case _:
                columns[name] = _mutated_values(random, columns[name])
    return Message(header, columns)


def _longer_push(columns: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One more row, of the entry behind the last."""
    ids, rows = columns.get(f"{name}.ids"), columns.get(f"{name}.rows")
    if ids is None or rows is None or ids.numel() == 0 or rows.numel() == 0:
        return {}
    return {
        f"{name}.ids": torch.cat((ids, ids[-1:] + 1)),
        f"{name}.rows": torch.cat((rows, rows[-1:])),
    }


def _mutated_header(random: Random, header: Header) -> Header:
    field = random.choice(("layer", "unit_tokens", "top_k"))
    near = getattr(header, field) + random.choice((-1, 1, 2, 3))
    value = random.choice((near, near, *(n for n in HOSTILE_INTS if 0 <= n < 2**63)))
    values = {name: getattr(header, name) for name in header.__slots__}
    return Header(**{**values, field: max(value, 0)})


def _mutated_shape(random: Random, rows: Tensor) -> Tensor:
    match random.randrange(9):
        case 0:
            return rows[: random.randrange(len(rows) + 1)]
        case 1:
            return torch.cat((rows, rows[: random.randrange(len(rows) + 1)]))
        case 2:
            return rows[..., : random.randrange(rows.shape[-1] + 1)]
        case 3:
            return rows.reshape(-1)
        case 4:
            return rows[None] if rows.dim() < 4 else rows[0]
        case 5:
            return rows[:0]
        case 6:
            return rows.repeat(random.choice((2, 50)), *[1] * (rows.dim() - 1))
        case 7:
            return rows.transpose(0, -1).contiguous()
        case _:
            dtypes = (torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.float64)
            return rows.to(random.choice(dtypes))


def _mutated_values(random: Random, rows: Tensor) -> Tensor:
    rows, flat = rows.clone(), rows.numel()
    if flat == 0:
        return rows
    view, at = rows.view(-1), random.randrange(flat)
    match random.randrange(8):
        case 0:
            return rows[torch.randperm(len(rows), generator=_noise(random))]
        case 1:
            return torch.full_like(
                rows, random.choice((0, 0, 255 if rows.dtype == torch.uint8 else -1))
            )
        case 2:
            rows[random.randrange(len(rows))] = rows[random.randrange(len(rows))].clone()
        case 3:
            view.view(torch.uint8)[random.randrange(flat * rows.element_size())] ^= (
                1 << random.randrange(8)
            )
        case 4 | 5:
            view[at] = view[at] + random.choice((-1, 1, 2, 8, 64))
        case 6 if rows.is_floating_point():
            view[at] = torch.tensor(random.choice(HOSTILE_FLOATS), dtype=torch.float64).to(
                rows.dtype
            )
        case 6:
            info = torch.iinfo(rows.dtype)
            near = [n for n in HOSTILE_INTS if info.min <= n <= info.max]
            view[at] = random.choice(near)
        case _:
            return -rows if rows.dtype != torch.uint8 else 255 - rows
    return rows


def _noise(random: Random) -> torch.Generator:
    return torch.Generator().manual_seed(random.getrandbits(32))
