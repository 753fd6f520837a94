"""The store against a plain model: any sequence of operations, zero differences.

Three ranks live in one process, a thread each. The model is a dictionary of documents with their
numbers, and knows nothing of blocks' places. Worlds are saved, end, and others of other sizes and
placements go on from there. QROAM_STATEFUL_SEQUENCES sets the number of sequences.
"""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import dense
import pytest
import torch
from effort import examples
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

from qroam.partition.directory import Document
from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model, with_codec
from qroam.partition.snapshot.verify import verify
from qroam.runtime import LoopbackTransport, Request, Runtime, RuntimeConfig, Scope

WORLD, LAYERS, B = 3, 2, 4
LAYOUT = with_codec(named_layout("mla-tiny"), "fp64", "fp64")
H, D, HI, DI, TOP_K = LAYOUT.heads, LAYOUT.key_dim, 4, 32, 9
MAX_BLOCKS, REQUEST_BLOCKS, QUOTA = 10, 4, 3
SEQUENCES = int(os.environ.get("QROAM_STATEFUL_SEQUENCES", examples(20, quick=8)))
NAMES = st.sampled_from("abcdef")
RANKS = st.integers(0, WORLD - 1)
OPENED: dict[str, st.SearchStrategy[Any]] = {
    "mode": st.sampled_from(("always-route", "always-fetch", "random")),
    "copies": st.integers(1, 2),
    "index_placement": st.sampled_from(("with-blocks", "replicated")),
    "policy": st.sampled_from(("balanced", "document-affine")),
}
# Texts with common beginnings: 5, 2 and 0 blocks of the longest are those of others.
TEXTS = (tuple(range(22)), (*range(8), 90, 91, 92, 93), (*range(8), 90), (50, 51, 52, 53, 54))

Outcome = Any


class Rows(NamedTuple):
    """Entries (L, T, D) and index keys (L, T, DI)."""

    entries: Tensor
    keys: Tensor

    def moved(self, offset: int) -> Rows:
        entries = [dense.moved_keys(rows, offset, LAYOUT.rope) for rows in self.entries]
        keys = [dense.moved_index_keys(rows, offset, LAYOUT) for rows in self.keys]
        return Rows(torch.stack(entries), torch.stack(keys))

    def part(self, first: int, end: int) -> Rows:
        return Rows(self.entries[:, first:end], self.keys[:, first:end])


@dataclass(eq=False)
class Doc:
    """What the model knows of a document. Equal `blocks` are stored once."""

    real: Document
    rows: Rows
    written: int
    blocks: tuple[Hashable, ...]
    group: str
    last: int = -1
    writer: int = -1

    @property
    def is_complete(self) -> bool:
        return self.written == self.real.tokens


@dataclass(eq=False)
class Reader:
    """A request of one rank, and the rows of its own tokens."""

    rank: int
    real: Request
    attached: list[tuple[Doc, int]]
    rows: Rows = field(default_factory=lambda: invented("nothing", tokens=0))

    def append(self, rows: Rows) -> None:
        pairs = zip(self.rows, rows, strict=True)
        self.rows = Rows(*(torch.cat(pair, dim=1) for pair in pairs))


class Saved(NamedTuple):
    """What a snapshot has: documents in order, those of their blocks that are closed, and pins."""

    docs: dict[str, Doc]
    closed: frozenset[Hashable]
    pinned: frozenset[str]


class Sight(NamedTuple):
    """A scope that was made at some time, and the rows that were in it: ids (I,) and rows."""

    rank: int
    scope: Scope
    docs: list[Doc]
    reader: Reader | None
    ids: Tensor
    rows: Rows


def invented(*facts: object, tokens: int) -> Rows:
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(repr(facts).encode()))
    shape = {"generator": generator, "dtype": torch.float64}
    entries = torch.randn(LAYERS, tokens, D, **shape)  # type: ignore[call-overload]
    return Rows(entries, torch.randn(LAYERS, tokens, DI, **shape))  # type: ignore[call-overload]


def spoken(text: tuple[int, ...], position: int) -> Rows:
    """Rows that depend on the text before each token and on its position, as a model's do."""
    parts = [invented(text[: t + 1], position, tokens=1) for t in range(len(text))]
    return Rows(*(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))


class Store(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.docs: dict[str, Doc] = {}
        self.pinned: set[str] = set()
        self.readers: list[Reader] = []
        self.sights: list[Sight] = []
        self.closed: set[Hashable] = set()
        self.pending: Saved | None = None
        self.saved: Saved | None = None
        self.count = 0
        self.files = tempfile.TemporaryDirectory()
        self.folder = Path(self.files.name) / "snapshot"
        self.threads = ThreadPoolExecutor(WORLD)
        self.runtimes: list[Runtime] = []

    @initialize(opened=st.fixed_dictionaries(OPENED))
    def open(self, opened: dict[str, Any]) -> None:
        self.open_world(WORLD, **opened)
        for runtime in self.runtimes:
            runtime.set_quota("small", QUOTA)

    def open_world(
        self, size: int, *, mode: str, copies: int, index_placement: str, policy: str
    ) -> None:
        config = RuntimeConfig(
            model=uniform_model(LAYOUT, LAYERS),
            max_blocks=MAX_BLOCKS,
            block_tokens=B,
            corpus_slots=MAX_BLOCKS,
            private_blocks=8,
            request_blocks=REQUEST_BLOCKS,
            placement=Placement(policy=policy, copies=copies),  # type: ignore[arg-type]
            index_placement=index_placement,  # type: ignore[arg-type]
            lease_entries=24,
            mode=mode,  # type: ignore[arg-type]
            dtype=torch.float64,
            deadline_s=20.0,
        )
        ends = LoopbackTransport.world(size, deadline_s=20.0)
        self.runtimes = list(self.threads.map(lambda end: Runtime.open(config, end), ends))

    def teardown(self) -> None:
        for runtime in self.runtimes:
            runtime.close()
        self.threads.shutdown()
        self.files.cleanup()

    # Running it ----------------------------------------------------------------------------------

    def everywhere(self, act: Callable[[Runtime], Outcome]) -> list[Outcome]:
        """What `act` gives on every rank, all at the same time; a ValueError is a result."""

        def guarded(runtime: Runtime) -> Outcome:
            try:
                return act(runtime)
            except ValueError as error:
                return error

        outcomes = list(self.threads.map(guarded, self.runtimes))
        refused = [isinstance(outcome, ValueError) for outcome in outcomes]
        assert all(refused) or not any(refused), outcomes
        return outcomes

    def done(self, outcomes: list[Outcome], *, possible: bool) -> bool:
        """Whether it was done, which must be whether it is possible."""
        done = not isinstance(outcomes[0], ValueError)
        assert done == possible, outcomes[0]
        return done

    def fits(self, name: str, blocks: tuple[Hashable, ...], group: str) -> bool:
        held = {block for doc in self.docs.values() for block in doc.blocks}
        charged = sum(len(doc.blocks) for doc in self.docs.values() if doc.group == group)
        within = group != "small" or charged + len(blocks) <= QUOTA
        return name not in self.docs and within and len(held | set(blocks)) <= MAX_BLOCKS

    def blocks(
        self, tokens: int, text: tuple[int, ...] | None, position: int
    ) -> tuple[Hashable, ...]:
        """Of a text, its full blocks are what they say and where; all others are themselves."""
        self.count += 1
        full = len(text) // B if text else 0
        said = [(text[: (n + 1) * B], position) for n in range(full)] if text else []
        return (*said, *((self.count, n) for n in range(full, -(-tokens // B))))

    def pick(self, some: list[Any], number: int) -> Any:
        return some[number % len(some)]

    def gone(self, name: str) -> None:
        del self.docs[name]
        self.closed &= {block for doc in self.docs.values() for block in doc.blocks}

    def wrote(self, doc: Doc, written: int) -> None:
        doc.written = written
        full = len(doc.blocks) if doc.is_complete else written // B
        self.closed |= set(doc.blocks[:full])

    def is_live(self, doc: Doc) -> bool:
        return self.docs.get(doc.real.name) is doc

    def is_live_reader(self, reader: Reader) -> bool:
        return reader in self.readers and all(self.is_live(doc) for doc, _ in reader.attached)

    # Documents -----------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        tokens=st.integers(1, 14),
        text=st.none() | st.sampled_from(TEXTS),
        position=st.sampled_from((0, 0, 7)),
        loaded=st.sampled_from((True, True, False)),
        group=st.sampled_from(("", "", "small")),
    )
    def add(
        self,
        name: str,
        tokens: int,
        text: tuple[int, ...] | None,
        position: int,
        loaded: bool,
        group: str,
    ) -> None:
        said: dict[str, Any] = {"token_ids": text} if text else {"tokens": tokens}
        tokens = len(text) if text else tokens
        blocks = self.blocks(tokens, text, position)
        others = {b: d for d in self.docs.values() for b in d.blocks}
        outcomes = self.everywhere(
            lambda r: r.add_document(name, position=position, group=group, **said)
        )
        if not self.done(outcomes, possible=self.fits(name, blocks, group)):
            return
        document: Document = outcomes[0]
        shared = sum(block in others for block in blocks)
        assert document.shared == shared
        assert document.num_blocks == len(blocks)
        rows = spoken(text, position) if text else invented(self.count, tokens=tokens)
        written = min(shared * B, tokens)
        # What is shared may not be written yet; then this document is not complete either.
        for number, block in enumerate(blocks[:shared]):
            if others[block].written < (number + 1) * B:
                written = -1
        doc = self.docs[name] = Doc(document, rows, written, blocks, group)
        if loaded and written >= 0:
            for layer in range(LAYERS):
                entries, keys = rows.entries[layer], rows.keys[layer]
                self.everywhere(lambda r: r.load_document(name, layer, entries, keys))  # noqa: B023
            self.wrote(doc, tokens)

    @precondition(lambda self: any(0 <= d.written < d.real.tokens for d in self.docs.values()))
    @rule(number=st.integers(0, 9), rank=RANKS, count=st.integers(1, 9))
    def write(self, number: int, rank: int, count: int) -> None:
        doc: Doc = self.pick(
            [d for d in self.docs.values() if 0 <= d.written < d.real.tokens], number
        )
        rank %= len(self.runtimes)
        if doc.writer not in (-1, rank):
            self.settle()  # before another rank writes on
        doc.writer = rank
        runtime, first = self.runtimes[rank], doc.written
        end = min(first + count, doc.real.tokens)
        request = runtime.request(into=doc.real.name, start=first)
        ids = runtime.append(request, end - first)
        part = doc.rows.part(first, end)
        for layer in range(LAYERS):
            runtime.write(layer, ids, part.entries[layer], part.keys[layer])
        runtime.release(request)
        self.wrote(doc, end)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        possible = name in self.docs and name not in self.pinned
        if self.done(self.everywhere(lambda r: r.remove_document(name)), possible=possible):
            self.gone(name)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        outcomes = self.everywhere(lambda r: r.pin(name) if pinned else r.unpin(name))
        if self.done(outcomes, possible=name in self.docs):
            self.pinned = self.pinned | {name} if pinned else self.pinned - {name}

    @rule(
        tokens=st.integers(1, 4 * B),
        policy=st.sampled_from(("lru", "reuse")),
        group=st.sampled_from(("", "small")),
    )
    def evict(self, tokens: int, policy: str, group: str) -> None:
        blocks = self.blocks(tokens, None, 0)
        in_use = {doc.real.name for reader in self.readers for doc, _ in reader.attached}
        kept = self.pinned | {name for name in in_use if name in self.docs}
        before = dict(self.docs)
        outcomes = self.everywhere(
            lambda r: r.make_room("new", tokens=tokens, policy=policy, group=group)  # type: ignore[arg-type]
        )
        self.docs = {name: doc for name, doc in before.items() if name in kept}
        possible = self.fits("new", blocks, group)
        self.docs = before
        if not self.done(outcomes, possible=possible):
            return
        removed = outcomes[0]
        assert not set(removed) & kept
        for number, name in enumerate(removed):
            assert not self.fits("new", blocks, group), "removed more than it takes"
            if policy == "lru" and group == "":
                left = [doc.last for n, doc in self.docs.items() if n not in kept]
                assert self.docs[name].last == min(left), number
            self.gone(name)
        assert self.fits("new", blocks, group)

    # Requests ------------------------------------------------------------------------------------

    def attachable(self, number: int, offset: int) -> list[tuple[Doc, int]]:
        """Some complete documents that share no blocks, the first of them `offset` from its place."""
        attached: list[tuple[Doc, int]] = []
        seen: set[Hashable] = set()
        for at, doc in enumerate(self.docs.values()):
            if doc.is_complete and number >> at & 1 and not seen & set(doc.blocks):
                attached.append((doc, 0 if attached else offset))
                seen |= set(doc.blocks)
        return attached

    @staticmethod
    def places(attached: list[tuple[Doc, int]]) -> list[str | tuple[str, int]]:
        return [(doc.real.name, doc.real.position + offset) for doc, offset in attached]

    @precondition(lambda self: len(self.readers) < 4)
    @rule(rank=RANKS, number=st.integers(0, 63), offset=st.sampled_from((0, 5, 40)))
    def request(self, rank: int, number: int, offset: int) -> None:
        rank %= len(self.runtimes)
        attached = self.attachable(number, offset)
        real = self.runtimes[rank].request(self.places(attached))
        self.readers.append(Reader(rank, real, attached))

    @precondition(lambda self: self.readers)
    @rule(number=st.integers(0, 9), tokens=st.integers(1, 5))
    def append(self, number: int, tokens: int) -> None:
        reader: Reader = self.pick(self.readers, number)
        runtime = self.runtimes[reader.rank]
        rows = invented(self.count, reader.real.length, tokens=tokens)
        self.count += 1
        try:
            ids = runtime.append(reader.real, tokens)
        except ValueError:
            full = reader.real.length + tokens > reader.real.capacity
            assert full or not self.is_live_reader(reader) or len(runtime._requests._free_seats) < 2
            return
        assert self.is_live_reader(reader)
        for layer in range(LAYERS):
            runtime.write(layer, ids, rows.entries[layer], rows.keys[layer])
        reader.append(rows)

    @precondition(lambda self: self.readers)
    @rule(number=st.integers(0, 9))
    def release(self, number: int) -> None:
        reader: Reader = self.pick(self.readers, number)
        self.runtimes[reader.rank].release(reader.real)
        self.readers.remove(reader)

    @precondition(lambda self: any(reader.real.length for reader in self.readers))
    @rule(name=NAMES, number=st.integers(0, 9), text=st.booleans())
    def publish(self, name: str, number: int, text: bool) -> None:
        reader: Reader = self.pick([r for r in self.readers if r.real.length], number)
        tokens, position = reader.real.length, reader.real.position - reader.real.length
        said = tuple(range(10**6 + self.count, 10**6 + self.count + tokens)) if text else None
        blocks = self.blocks(tokens, said, position)
        outcomes = self.everywhere(
            lambda r: (
                r.publish(name, reader.real if r.rank == reader.rank else None, token_ids=said)
                if r.rank == reader.rank
                else r.publish(name, None)
            )
        )
        if self.done(outcomes, possible=self.fits(name, blocks, "")):
            self.docs[name] = Doc(outcomes[0], reader.rows, tokens, blocks, "")
            self.closed |= set(blocks)
            assert outcomes[0].position == position

    @precondition(lambda self: any(map(self.is_live_reader, self.readers)))
    @rule(number=st.integers(0, 9), which=st.integers(0, 9))
    def lease(self, number: int, which: int) -> None:
        reader: Reader = self.pick(list(filter(self.is_live_reader, self.readers)), number)
        room = reader.real.capacity - reader.real.length
        free = len(self.runtimes[reader.rank]._requests._free_seats)
        docs = [
            doc
            for doc in self.docs.values()
            if doc.is_complete and doc.real.tokens <= min(room, (free - 1) * B)
        ]
        if not docs:
            return
        self.settle()
        doc: Doc = self.pick(docs, which)
        offset = reader.real.position - doc.real.position
        self.everywhere(
            lambda r: (
                r.copy_document(reader.real, doc.real.name)
                if r.rank == reader.rank
                else r.copy_document(None, None)
            )
        )
        reader.append(doc.rows.moved(offset))

    def settle(self) -> None:
        """A step of each layer, with which all that was written arrives."""
        for layer in range(LAYERS):
            self.everywhere(lambda r: r.idle_attend(layer))  # noqa: B023

    # On disk -------------------------------------------------------------------------------------

    @precondition(lambda self: self.pending is None and self.closed)
    @rule()
    def snapshot(self) -> None:
        self.begin_snapshot()
        self.finish_snapshot()

    @precondition(lambda self: self.pending is None and self.closed)
    @rule()
    def begin_snapshot(self) -> None:
        self.everywhere(lambda r: r.begin_snapshot(self.folder))
        self.pending = Saved(dict(self.docs), frozenset(self.closed), frozenset())

    @precondition(lambda self: self.pending is not None)
    @rule()
    def finish_snapshot(self) -> None:
        """What was closed then, of what is still there; the pins are those of now."""
        assert self.pending is not None
        self.everywhere(lambda r: r.finish_snapshot())
        docs = {name: doc for name, doc in self.pending.docs.items() if self.is_live(doc)}
        pinned = frozenset(self.pinned & docs.keys())
        self.saved, self.pending = self.pending._replace(docs=docs, pinned=pinned), None
        assert verify(self.folder).damage == ()

    @precondition(lambda self: self.saved is not None and self.saved.docs)
    @rule(size=st.integers(2, WORLD), opened=st.fixed_dictionaries(OPENED))
    def restart(self, size: int, opened: dict[str, Any]) -> None:
        """This world ends, with all that was not saved; another one, empty, restores."""
        for runtime in self.runtimes:
            runtime.close()
        self.docs, self.pinned, self.closed = {}, set(), set()
        self.readers, self.sights, self.pending = [], [], None
        self.open_world(size, **opened)
        self.restore(cleared=False)
        assert {r._world.directory.quotas["small"] for r in self.runtimes} == {QUOTA}

    @precondition(lambda self: self.saved is not None and self.pending is None)
    @rule(cleared=st.booleans())
    def restore(self, cleared: bool) -> None:
        """Into the world as it is, perhaps `cleared` of documents of those names: nothing comes back
        if any of it does not fit.
        """
        assert self.saved is not None
        for name in self.docs.keys() & self.saved.docs.keys() if cleared else ():
            self.pin(name, pinned=False)
            self.remove(name)
        before, held = dict(self.docs), {b for doc in self.docs.values() for b in doc.blocks}
        possible = True
        for name, doc in self.saved.docs.items():
            possible = possible and self.fits(name, doc.blocks, doc.group)
            self.docs[name] = doc
        added, self.docs = self.docs, before
        outcomes = self.everywhere(lambda r: r.restore(self.folder))
        if not self.done(outcomes, possible=possible):
            return
        self.docs = added
        self.pinned |= self.saved.pinned
        self.closed |= {
            block
            for doc in self.saved.docs.values()
            for block in doc.blocks
            if block in self.saved.closed and block not in held
        }
        for name, doc in self.saved.docs.items():
            real = self.runtimes[0]._world.directory.document(name)
            closed = [block in self.closed for block in doc.blocks]
            first = [*closed, False].index(False)
            written = min(first * B, real.tokens)
            if any(closed[first:]) or first < real.shared:
                written = -1  # it waits for what another one has begun
            self.docs[name] = Doc(real, doc.rows, written, doc.blocks, doc.group)
            in_snapshot = [block in self.saved.closed for block in doc.blocks]
            tokens = min([*in_snapshot, False].index(False) * B, real.tokens)
            assert all(report.documents[name] == tokens for report in outcomes)

    @rule()
    def verify(self) -> None:
        """Every closed block is what it was, at every holder."""
        checks = self.everywhere(lambda r: r.verify_copies())
        assert checks == [checks[0]] * len(self.runtimes)
        assert all(check.is_sound for check in checks[0])
        for kind in ("entries", "index"):
            assert sum(check.kind == kind for check in checks[0]) == len(self.closed)

    # Attention -----------------------------------------------------------------------------------

    def sight(self, rank: int, number: int, offset: int, own: bool) -> Sight | None:
        """A new scope of documents, or of a request's own last token."""
        readers = [r for r in self.readers if self.is_live_reader(r) and r.real.length]
        reader: Reader | None = self.pick(readers, number) if own and readers else None
        attached = reader.attached if reader else self.attachable(number, offset)
        parts = [(doc.real.ids(), doc.rows.moved(offset)) for doc, offset in attached]
        if reader is None:
            scope = self.runtimes[rank].scope(documents=self.places(attached), queries=1)
        else:
            rank = reader.rank
            ids = reader.real.ids(0, reader.real.length)
            scope = self.runtimes[rank].scope(requests=[(reader.real, ids[-1:])])
            parts.append((ids, reader.rows))
        if not parts:
            return None
        entries, keys = zip(*(rows for _, rows in parts), strict=True)
        rows = Rows(torch.cat(entries, dim=1), torch.cat(keys, dim=1))
        docs = [doc for doc, _ in attached]
        return Sight(rank, scope, docs, reader, torch.cat([ids for ids, _ in parts]), rows)

    @rule(
        rank=RANKS,
        number=st.integers(0, 63),
        offset=st.sampled_from((0, 3, 50)),
        own=st.booleans(),
        keep=st.booleans(),
        layer=st.integers(0, LAYERS - 1),
    )
    def attend(
        self, rank: int, number: int, offset: int, own: bool, keep: bool, layer: int
    ) -> None:
        sight = self.sight(rank % len(self.runtimes), number, offset, own)
        if sight is not None:
            self.look(sight, layer)
            if keep:
                self.sights.append(sight)

    @precondition(lambda self: self.sights)
    @rule(number=st.integers(0, 9), layer=st.integers(0, LAYERS - 1))
    def look_again(self, number: int, layer: int) -> None:
        """A scope that was kept shows what it showed, or is refused: by that rank alone, at the door."""
        sight: Sight = self.pick(self.sights, number)
        live = all(map(self.is_live, sight.docs))
        if live and (sight.reader is None or self.is_live_reader(sight.reader)):
            self.look(sight, layer)
            return
        runtime, query = self.runtimes[sight.rank], torch.zeros(1, H, D, dtype=torch.float64)
        index_query = torch.zeros(1, HI, DI, dtype=torch.float64), torch.zeros(1, HI)
        selection = runtime.selection(sight.ids[None], sight.scope)
        with pytest.raises(ValueError, match=r"removed|released"):
            runtime.attend(layer, query, selection)
        with pytest.raises(ValueError, match=r"removed|released"):
            runtime.select(layer, *index_query, scope=sight.scope)

    def look(self, sight: Sight, layer: int) -> None:
        """Select and attend as one query of one rank, against dense scores and attention."""
        query = invented(self.count, "query", tokens=H).entries[0]
        index_query = invented(self.count, "index", tokens=HI).keys[0]
        weights = index_query[:, 0].abs()
        self.count += 1

        def select(runtime: Runtime) -> Any:
            if runtime.rank != sight.rank:
                return runtime.idle_select(layer)
            return runtime.select(
                layer, index_query[None], weights[None], scope=sight.scope, top_k=TOP_K
            )

        for doc in sight.docs:
            doc.last = self.runtimes[0]._world.progress.epoch
        selection = self.everywhere(select)[sight.rank]
        scores = dense.index_scores(index_query[None], weights[None], sight.rows.keys[layer])[0]
        ids = selection.ids[0]
        ids = ids[ids >= 0]
        rows = (sight.ids[None] == ids[:, None]).long().argmax(1)
        assert torch.equal(sight.ids[rows], ids)
        best = scores.topk(min(TOP_K, len(scores))).values
        found = scores[rows].sort(descending=True).values
        assert found.shape == best.shape
        assert float((found - best).abs().max()) < 1e-12

        def attend(runtime: Runtime) -> Any:
            if runtime.rank != sight.rank:
                return runtime.idle_attend(layer)
            return runtime.attend(layer, query[None], selection)

        for doc in sight.docs:
            doc.last = self.runtimes[0]._world.progress.epoch
        out = self.everywhere(attend)[sight.rank][0]
        keys = sight.rows.entries[layer, rows]
        shares = (query @ keys.T * LAYOUT.softmax_scale).softmax(-1)
        assert float((out - shares @ keys[:, : LAYOUT.value_dim]).abs().max()) < 1e-12

    @rule()
    def compare(self) -> None:
        """What every rank lists, pins and holds is what the model has."""
        used = {block for doc in self.docs.values() for block in doc.blocks}
        for runtime in self.runtimes:
            listed = {document.name: document for document in runtime.documents()}
            assert listed == {name: doc.real for name, doc in self.docs.items()}
            assert runtime.pinned() == self.pinned
            directory = runtime._world.directory
            assert directory.num_blocks == len(used)
            assert directory.version == self.runtimes[0]._world.directory.version
            assert int((directory.owners >= 0).sum()) == int(directory.used.sum())


TestStore = Store.TestCase
TestStore.settings = settings(
    max_examples=SEQUENCES,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
