"""One random world, played rank by rank and compared with dense attention at every step.

A `Case` is a handful of facts; everything else follows from its seed, so that every rank plays its
part of the same script: documents are loaded whole, or prefilled chunk by chunk on changing ranks;
then requests come, grow, ask and go. Letters: Q queries, G branches, I entry ids, K units.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import dense
import torch
from torch import Tensor

from qroam.partition.codec import make_codec
from qroam.partition.directory import Document
from qroam.partition.layout import (
    Branch,
    IndexLayout,
    Layout,
    Projection,
    Role,
    Rope,
    Stream,
    Yarn,
)
from qroam.partition.placement import Placement, PlacementPolicy
from qroam.partition.presets import mla, mlra, uniform_model
from qroam.runtime.config import IndexPlacement, RuntimeConfig
from qroam.runtime.cost.predicate import Mode
from qroam.runtime.cost.profile import PROFILE_NAMES, load_profile
from qroam.runtime.cpu.step import Selection
from qroam.runtime.runtime import Runtime
from qroam.runtime.scope import Request, Scope, stacked
from qroam.runtime.transport.base import Transport

Architecture = Literal["mla", "mlra-2", "mlra-4", "mixed"]
Picks = Literal["random", "all", "one-holder", "none", "select"]

# The dtype of queries and outputs, and the codec of entries.
STORAGE = {
    "fp64": (torch.float64, "fp64"),
    "fp32": (torch.float32, "fp32"),
    "bf16": (torch.bfloat16, "bf16"),
    "fp8-fp64": (torch.float64, "fp8_v32"),
    "fp8-fp32": (torch.float32, "fp8_v32"),
}
# Without an entry: twice the error of eager torch in that dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_UNKNOWN = 1e6  # what the oracle has where nobody wrote
_REQUESTS, _REQUEST_BLOCKS = 6, 3
_STREAMS: tuple[tuple[tuple[Role, int], ...], ...] = (
    (("v", 3), ("kv", 5), ("k", 4)),
    (("v", 4), ("k", 6)),
    (("kv", 5), ("k", 2)),
    (("kv", 6),),
)


class MismatchError(AssertionError):
    """The step differs from dense attention by `error`, where `allowed` is allowed."""

    def __init__(self, error: float, allowed: float) -> None:
        super().__init__(f"differs from dense attention by {error:.3g}, allowed is {allowed:.3g}")
        self.error = error


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is drawn.

    `documents`: tokens of each; the last `prefilled` are prefilled in chunks of `chunk`. `queries`:
    of each rank per step, besides those of its requests. `stranger` is the document that nobody
    attaches, `perturbed` one that is given other contents. With `offsets` documents are attached
    away from their own positions too, and some are leased by requests.
    """

    seed: int
    world: int = 3
    architecture: Architecture = "mla"
    heads: int = 2
    storage: str = "fp64"
    weights: bool = True
    layers: int = 1
    block_tokens: int = 8
    documents: tuple[int, ...] = (40, 21, 16)
    prefilled: int = 0
    chunk: int = 11
    policy: PlacementPolicy = "block-cyclic"
    run: int = 1
    copies: int = 1
    index_placement: IndexPlacement = "with-blocks"
    mode: Mode = "random"
    lease_entries: int = 0
    reuse: float = 1.0
    picks: Picks = "random"
    unit_tokens: int = 1
    per_branch: bool = False
    sink: bool = False
    steps: int = 2
    repeats: int = 1
    queries: tuple[int, ...] = (3, 2, 0, 5)
    requests: int = 2
    stranger: int | None = None
    perturbed: int | None = None
    offsets: bool = False


class Group(NamedTuple):
    """Queries that share documents: `at` are the entry ids of the request's own tokens, or None."""

    documents: tuple[Document, ...]
    request: Request | None
    at: Tensor
    offsets: tuple[int, ...]

    @property
    def attached(self) -> list[str | tuple[str, int]]:
        pairs = zip(self.documents, self.offsets, strict=True)
        return [(d.name, d.position + offset) for d, offset in pairs]


def run_case(transport: Transport, case: Case) -> list[Tensor]:
    """Play this rank's part; returns all its outputs and selections, in order.

    Raises: MismatchError, or AssertionError if the counters do not add up.
    """
    with Runtime.open(make_config(case), transport) as runtime:
        player = Player(runtime, case)
        player.add_documents()
        player.prefill()
        for _ in range(case.steps):
            player.decode()
        return player.outputs


def make_layout(case: Case) -> Layout:
    """The case's architecture in small and odd sizes, with an indexer if the case selects by one."""
    rng = random.Random(case.seed)
    codec = STORAGE[case.storage][1]
    index = IndexLayout(heads=2, head_dim=8, rope_dim=4, pairing="half", top_k=rng.randint(1, 30))
    index_or_none = index if case.picks == "select" else None
    index_codec = rng.choice(("fp32", "fp8_index"))
    match case.architecture:
        case "mla":
            return mla(
                name="mla",
                heads=case.heads,
                latent=128 if codec == "fp8_v32" else rng.choice((7, 12)),
                rope=rng.choice((2, 4)),
                nope=5,
                value=6,
                softmax_scale=0.4,
                codec=codec,
                index=index_or_none,
                index_codec=index_codec,
            )
        case "mlra-2" | "mlra-4":
            layout = mlra(2, heads=2 * case.heads) if case.architecture == "mlra-2" else None
            layout = layout or mlra(4, heads=case.heads)
            return replace(layout, codec=codec, index=index_or_none, index_codec=index_codec)
        case "mixed":
            return _mixed(rng, case, index_or_none)


def _scaled(layout: Layout, seed: int) -> Layout:
    """The layer with YaRN's frequencies, every other time."""
    rng = random.Random(f"{seed} yarn")
    if layout.rope is None or rng.random() < 0.5:
        return layout
    yarn = Yarn(factor=rng.choice((4.0, 40.0)), original_positions=rng.choice((16, 4096)))
    return replace(layout, rope=replace(layout.rope, yarn=yarn))


def _mixed(rng: random.Random, case: Case, index: IndexLayout | None) -> Layout:
    """A made-up layout: value-only, tied and key-only streams, overlapping heads, odd weights."""
    dims, branches = rng.choice(_STREAMS), rng.choice((2, 3))
    streams = tuple(Stream(name=role, dim=dim, role=role) for role, dim in dims)
    stride = rng.randint(0, case.heads)
    return Layout(
        name="mixed",
        heads=(branches - 1) * stride + case.heads,
        branches=tuple(
            Branch(
                name=f"b{b}",
                streams=streams,
                head_start=b * stride,
                heads=case.heads,
                weight=rng.uniform(-1.5, 1.5),
            )
            for b in range(branches)
        ),
        softmax_scale=0.3,
        codec=STORAGE[case.storage][1],
        rope=rng.choice((None, Rope(dim=2, pairing="half"))),
        projection=Projection(nope_dim=3, out_dim=4) if case.weights else None,
        index=index,
    )


def make_config(case: Case) -> RuntimeConfig:
    rng = random.Random(case.seed)
    layout = make_layout(case)
    layout = _scaled(layout, case.seed) if case.offsets else layout
    blocks = sum(-(-tokens // case.block_tokens) for tokens in case.documents) + 1
    blocks += blocks % 2  # units of two blocks fill the corpus
    return RuntimeConfig(
        model=uniform_model(layout, case.layers),
        max_blocks=blocks,
        block_tokens=case.block_tokens,
        corpus_slots=blocks * layout.num_branches,
        private_blocks=_REQUESTS,
        request_blocks=_REQUEST_BLOCKS,
        placement=Placement(policy=case.policy, run=case.run, copies=case.copies),
        index_placement=case.index_placement,
        lease_entries=case.lease_entries,
        mode=case.mode,
        seed=case.seed,
        reuse=case.reuse,
        fabric=load_profile(rng.choice(PROFILE_NAMES)),
        dtype=STORAGE[case.storage][0],
        workspace_bytes=rng.choice((1 << 13, 32 << 20)),
        checked=rng.random() < 0.8,
    )


class Player:
    """A rank's part in a case, and what it knows to be true."""

    def __init__(self, runtime: Runtime, case: Case) -> None:
        self.runtime = runtime
        self.case = case
        self.rank, self.world = runtime.rank, runtime.world_size
        self.config = runtime.config
        self.layout = self.config.model.layers[0]
        self.rng = random.Random(f"{case.seed} {self.rank}")
        self.noise = _generator(case.seed, self.rank)
        self.codec = make_codec(
            self.layout.codec, dim=self.layout.entry_dim, rope_dim=self.layout.rope_dim
        )
        size = (self.config.max_blocks + _REQUESTS * _REQUEST_BLOCKS) * case.block_tokens
        shape = (case.layers, size, self.layout.num_branches, self.layout.entry_dim)
        self.entries = torch.full(shape, _UNKNOWN, dtype=torch.float64)
        self.keys = torch.full((case.layers, size, 8), _UNKNOWN, dtype=torch.float64)
        self.weights: list[tuple[Tensor, Tensor] | None] = [None] * case.layers
        self.contents: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        self.documents: list[Document] = []
        self.complete: list[Document] = []
        self.requests: list[Request] = []
        self.outputs: list[Tensor] = []

    # The script ----------------------------------------------------------------------------------

    def add_documents(self) -> None:
        if self.case.weights and self.layout.projection:
            for layer in range(self.case.layers):
                self._load_weights(layer)
        loaded = len(self.case.documents) - self.case.prefilled
        for number, tokens in enumerate(self.case.documents):
            document = self.runtime.add_document(f"d{number}", tokens=tokens, position=3 * number)
            self.documents.append(document)
            ids = document.ids().long()
            noise = _generator(self.case.seed, number, self.case.perturbed == number)
            for layer in range(self.case.layers):
                entries, keys = self._invent(layer, ids, noise)
                self.contents[document.name, layer] = entries, keys
                if number < loaded:
                    self.runtime.load_document(document.name, layer, entries, keys)
        self.complete = [d for d in self.documents[:loaded] if d != self._stranger()]

    def prefill(self) -> None:
        """All documents that were not loaded, at the same time, each chunk of them on another rank."""
        writing = self.documents[len(self.case.documents) - self.case.prefilled :]
        rounds = max((-(-d.tokens // self.case.chunk) for d in writing), default=0)
        for chunk in range(rounds):
            groups = []
            for number, document in enumerate(writing):
                first = chunk * self.case.chunk
                last = min(first + self.case.chunk, document.tokens)
                if first < last and (number + chunk) % self.world == self.rank:
                    names = self._attach(0.5)
                    request = self.runtime.request(names, into=document.name, start=first)
                    at = self.runtime.append(request, last - first)
                    groups.append(_group(request, at))
            self._ask_and_check(groups or self._readers(), fresh=groups)
            for group in groups:
                assert group.request is not None
                self.runtime.release(group.request)
        self.complete += [document for document in writing if document != self._stranger()]

    def decode(self) -> None:
        """Requests come and go; each appends tokens and asks for them and for earlier ones again."""
        room = _REQUEST_BLOCKS * self.case.block_tokens
        for request in list(self.requests):
            if request.length + 5 > room or self.rng.random() < 0.2:
                self.runtime.release(request)
                self.requests.remove(request)
        while len(self.requests) < self.case.requests and self.rng.random() < 0.8:
            self.requests.append(self.runtime.request(self._attach(0.6)))
        if self.case.offsets:
            self._lease()
        fresh, groups = [], self._readers()
        for request in self.requests:
            at = self.runtime.append(request, self.rng.randint(1, min(5, room)))
            fresh.append(_group(request, at))
            earlier = torch.randint(
                request.tail_start, int(at[-1]) + 1, (2,), generator=self.noise, dtype=torch.int32
            )
            groups.append(_group(request, torch.cat((at, earlier))))
        self._ask_and_check(groups, fresh=fresh)

    def _attach(self, share: float) -> list[str | tuple[str, int]]:
        """Some of the documents, and where: at home, a little off, or far away."""
        chosen = [d for d in self.complete if self.rng.random() < share]
        if not self.case.offsets or (self.layout.index and not self.layout.rope):
            return [d.name for d in chosen]
        places = (0, self.rng.randint(1, 30), 3000)
        return [
            d.name if self.rng.random() < 0.4 else (d.name, self.rng.choice(places)) for d in chosen
        ]

    def _lease(self) -> None:
        """Perhaps one document for one request of this rank; the oracle moves its entries too."""
        room = _REQUEST_BLOCKS * self.case.block_tokens - 10
        pairs = [
            (request, document)
            for request in self.requests
            for document in self.complete
            if request.length + document.tokens <= room
        ]
        movable = not (self.layout.index and not self.layout.rope)
        if not pairs or not movable or self.case.storage not in ("fp64", "fp32", "fp8-fp64"):
            assert self.runtime.lease(None, None) is None
            return
        request, document = self.rng.choice(pairs)
        offset = request.position - document.position
        ids = self.runtime.lease(request, document.name)
        assert ids is not None
        for layer in range(self.case.layers):
            entries = self.entries[layer, document.ids().long()]
            flat = entries.flatten(0, 1)
            moved = flat.clone()
            key = flat.shape[1] - self.layout.key_dim
            moved[:, key:] = dense.moved_keys(flat[:, key:], offset, self.layout.rope)
            kept = self.codec.decode(self.codec.encode(moved), torch.float64)
            self.entries[layer, ids.long()] = kept.view(entries.shape)
            if self.layout.index is not None:
                keys = self.keys[layer, document.ids().long()]
                self.keys[layer, ids.long()] = self._kept_keys(
                    dense.moved_index_keys(keys, offset, self.layout)
                )

    def _kept_keys(self, keys: Tensor) -> Tensor:
        """What the index codec keeps of index keys."""
        assert self.layout.index is not None
        codec = make_codec(self.layout.index_codec, dim=8, rope_dim=4)
        return codec.decode(codec.encode(keys), torch.float64)

    def _stranger(self) -> Document | None:
        return None if self.case.stranger is None else self.documents[self.case.stranger]

    def _readers(self) -> list[Group]:
        """Queries without tokens of their own, sometimes over no document at all."""
        count = self.case.queries[self.rank % len(self.case.queries)]
        attached = self._attach(0.8)
        names = [item if isinstance(item, str) else item[0] for item in attached]
        documents = tuple(self.runtime._world.directory.document(name) for name in names)
        offsets = tuple(
            0 if isinstance(item, str) else item[1] - document.position
            for item, document in zip(attached, documents, strict=True)
        )
        nobody = torch.zeros(count, dtype=torch.int32)
        return [Group(documents, None, nobody, offsets)] if count else []

    # One round: every layer, select and attend ---------------------------------------------------

    def _ask_and_check(self, groups: Sequence[Group], *, fresh: Sequence[Group]) -> None:
        scope, visible = self._scope(groups), self._visible(groups)
        shift = self._shift(groups)
        for layer in range(self.case.layers):
            for group in fresh:
                self.runtime.write(layer, group.at, *self._fresh_content(layer, group))
            selection = self._select(layer, scope, visible, shift)
            for _ in range(self.case.repeats):
                if len(visible):
                    self._attend(layer, selection, visible, shift)
                else:
                    self.runtime.idle_attend(layer)

    def _fresh_content(self, layer: int, group: Group) -> tuple[Tensor, Tensor | None]:
        """What a request appends: the next part of the document it writes, or tokens of its own."""
        request, at = group.request, group.at.long()
        assert request is not None
        if request.into is None:
            return self._invent(layer, at, self.noise)
        entries, keys = self.contents[request.into.name, layer]
        at = request.indices(at)
        return entries[at], None if keys is None else keys[at]

    def _select(self, layer: int, scope: Scope, visible: Tensor, shift: Tensor) -> Selection:
        runtime, unit_tokens = self.runtime, self.case.unit_tokens
        if self.case.picks != "select":
            return runtime.selection(self._pick(visible), scope, unit_tokens=unit_tokens)
        if not len(visible):
            runtime.idle_select(layer)
            return runtime.selection(torch.empty(0, 0, dtype=torch.int32), scope)
        index = self.layout.index
        assert index is not None
        # Small integers: scores are exact in every dtype, and ties abound.
        query = self._integers(len(visible), index.heads, index.head_dim)
        if self.case.offsets:
            query = self._normal(len(visible), index.heads, index.head_dim)
        weights = self._integers(len(visible), index.heads)
        selection = runtime.select(
            layer, query.to(self.config.dtype), weights, scope=scope, unit_tokens=unit_tokens
        )
        if self.case.offsets:
            scores = dense.shifted_scores(self.layout, query, weights, self.keys[layer], shift)
            scores = torch.where(visible, scores, -torch.inf)
            units = scores.unflatten(1, (-1, unit_tokens)).amax(2)
            self._check_best(selection.ids, units, index.top_k)
            return selection
        expected = dense.top_units(
            query, weights, self.keys[layer], visible, k=index.top_k, unit_tokens=unit_tokens
        )
        self.outputs.append(selection.ids)
        assert torch.equal(selection.ids, expected), "select differs from the exact top-k"
        return selection

    def _check_best(self, ids: Tensor, units: Tensor, top_k: int) -> None:
        """The units selected have the best scores (Q, U); which of near ties, is rounding's choice."""
        assert all(len(row[row >= 0].unique()) == len(row[row >= 0]) for row in ids)
        found = torch.where(ids >= 0, units.gather(1, ids.clamp(min=0).long()), -torch.inf)
        best = units.topk(min(top_k, units.shape[1]), dim=1).values
        found = found.sort(dim=1, descending=True).values[:, : best.shape[1]]
        assert torch.equal(found > -torch.inf, best > -torch.inf)
        error = torch.where(best > -torch.inf, found - best, 0.0).abs()
        exact = 1e-12 if self.config.dtype == torch.float64 else 1e-3
        assert not error.numel() or float(error.max()) <= exact, "not the best units"

    def _attend(self, layer: int, selection: Selection, visible: Tensor, shift: Tensor) -> None:
        weights, dtype = self.weights[layer], self.config.dtype
        dim = self.layout.query_dim if weights else self.layout.key_dim
        query = self._normal(len(visible), self.layout.heads, dim)
        sink = self._normal(self.layout.heads) if self.case.sink else None
        before = self.runtime.stats()
        out = self.runtime.attend(layer, query, selection, sink=sink)
        self.outputs.append(out)
        listed = dense.listed_entries(
            selection.ids,
            visible,
            branches=self.layout.num_branches,
            unit_tokens=selection.unit_tokens,
        )

        def oracle(dtype: torch.dtype) -> Tensor:
            return dense.attend(
                self.layout,
                query,
                self.entries[layer],
                listed,
                weights=weights,
                sink=sink,
                dtype=dtype,
                shift=shift if self.case.offsets else None,
            )

        expected = oracle(torch.float64)
        allowed = TOLERANCE.get(dtype) or 2 * _worst(oracle(dtype), expected)
        assert out.dtype == dtype
        assert out.shape == expected.shape
        error = _worst(out, expected)
        if not error <= allowed:
            raise MismatchError(error, allowed)
        self._check_counters(before, selection, visible)

    def _check_counters(
        self, before: dict[str, Any], selection: Selection, visible: Tensor
    ) -> None:
        """What was decided is what was counted, and every listed unit is asked of one holder."""
        after, lines = self.runtime.stats(), self.runtime.explain()
        counted = {
            (holder, way): count - before["decisions"][holder][way]
            for holder, ways in after["decisions"].items()
            for way, count in ways.items()
            if count > before["decisions"][holder][way]
        }
        assert counted == Counter((line.holder, line.way.lower()) for line in lines)
        assert after["queries"] - before["queries"] == len(visible)
        assert all((line.holder == self.rank) == (line.way == "LOCAL") for line in lines)
        ways = {line.way for line in lines}
        assert self.case.mode != "always-route" or "FETCH" not in ways
        assert self.case.mode != "always-fetch" or ways <= {"FETCH", "LOCAL"}
        sent = [stats["bytes_sent"].get("attend", 0) for stats in (before, after)]
        assert (sent[1] > sent[0]) == (self.world > 1)
        # A unit larger than a block is asked for block by block.
        branches = self.layout.num_branches
        piece = min(selection.unit_tokens, self.case.block_tokens)
        listed = dense.listed_entries(
            selection.ids, visible, branches=branches, unit_tokens=selection.unit_tokens
        )
        pieces = listed.unflatten(2, (-1, piece)).any(3).sum(2).flatten()
        asked = torch.zeros(len(pieces), dtype=torch.int64)
        for line in lines:
            asked[line.query * branches + line.branch] += line.units
        assert torch.equal(asked, pieces), "units asked for are not the units selected"

    # What is asked -------------------------------------------------------------------------------

    def _scope(self, groups: Sequence[Group]) -> Scope:
        runtime = self.runtime
        scopes = [
            runtime.scope(documents=group.attached, queries=len(group.at))
            if group.request is None
            else runtime.scope(requests=[(group.request, group.at)])
            for group in groups
        ]
        return stacked(scopes) if scopes else runtime.scope(documents=())

    def _visible(self, groups: Sequence[Group]) -> Tensor:
        """(Q, I) bool, from the definition: the documents attached, own tokens up to oneself."""
        ids = torch.arange(self.entries.shape[1])
        rows = [torch.zeros(0, len(ids), dtype=torch.bool)]
        for group in groups:
            into = group.request.into if group.request else None
            seen = torch.zeros(len(ids), dtype=torch.bool)
            for document in group.documents:
                if document != into:
                    seen[document.ids().long()] = True
            rows.append(seen.expand(len(group.at), -1))
            if group.request:
                own = (ids >= group.request.tail_start) & (ids <= group.at[:, None])
                rows[-1] = rows[-1] | own
        return torch.cat(rows)

    def _shift(self, groups: Sequence[Group]) -> Tensor:
        """(Q, I) int64: how much further on each query sees each entry than it was stored."""
        size = self.entries.shape[1]
        rows = [torch.zeros(0, size, dtype=torch.int64)]
        for group in groups:
            shift = torch.zeros(len(group.at), size, dtype=torch.int64)
            for document, offset in zip(group.documents, group.offsets, strict=True):
                shift[:, document.ids().long()] = offset
            rows.append(shift)
        return torch.cat(rows)

    def _pick(self, visible: Tensor) -> Tensor:
        """Units each query sees, as many and as the case wants, padding anywhere."""
        unit, branches = self.case.unit_tokens, self.layout.num_branches
        allowed = visible.unflatten(1, (-1, unit)).any(2)
        if self.case.picks == "one-holder":
            owners = self.runtime._world.directory.owners[::branches, 0]
            block = torch.arange(allowed.shape[1]) * unit // self.case.block_tokens
            owner = torch.where(block < len(owners), owners[block.clamp(max=len(owners) - 1)], -1)
            allowed = allowed & (owner == self.rng.randrange(self.world))
        if self.case.per_branch:
            allowed = allowed[:, None].expand(-1, branches, -1)
        most = {"none": 0, "random": self.rng.choice((1, 4, 40))}.get(self.case.picks, 1 << 20)
        every = self.case.picks != "random"
        return _subsets(allowed, most, every=every, extra=self.rng.randint(0, 3), noise=self.noise)

    # What is true --------------------------------------------------------------------------------

    def _load_weights(self, layer: int) -> None:
        layout, noise = self.layout, _generator(self.case.seed, "weights", layer)
        assert layout.projection is not None
        heads = (layout.num_branches, layout.branch_heads)
        dtype = self.config.dtype

        def draw(rows: int, columns: int, fan_in: int) -> Tensor:
            return (torch.randn(*heads, rows, columns, generator=noise) / math.sqrt(fan_in)).to(
                dtype
            )

        nope = layout.projection.nope_dim
        w_uk = draw(nope, layout.absorbed_dim, layout.absorbed_dim)
        w_uv = draw(layout.value_dim, layout.projection.out_dim, layout.value_dim)
        self.runtime.load_weights(layer, w_uk, w_uv)
        self.weights[layer] = (w_uk, w_uv)

    def _invent(
        self, layer: int, ids: Tensor, noise: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """New entries and index keys of these ids; the oracle learns what their codec keeps of them."""
        shape = (len(ids), self.layout.num_branches, self.layout.entry_dim)
        entries = torch.randn(shape, generator=noise, dtype=torch.float64).to(self.config.dtype)
        kept = self.codec.decode(self.codec.encode(entries.flatten(0, 1)), torch.float64)
        self.entries[layer, ids] = kept.view(shape)
        if self.layout.index is None:
            return entries, None
        keys = torch.randint(-2, 3, (len(ids), 8), generator=noise).double()
        if self.case.offsets:
            keys = torch.randn(len(ids), 8, generator=noise, dtype=torch.float64)
        self.keys[layer, ids] = self._kept_keys(keys)
        return entries, self.keys[layer, ids].clone()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.noise, dtype=torch.float64).to(self.config.dtype)

    def _integers(self, *shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=self.noise).float()


def _group(request: Request, at: Tensor) -> Group:
    """The queries of a request's own tokens `at`, with the document it writes among what they see."""
    into = () if request.into is None else (request.into,)
    offsets = [attached.offset for attached in request.attached]
    return Group((*request.documents, *into), request, at, (*offsets, *(0 for _ in into)))


def _subsets(
    allowed: Tensor, most: int, *, every: bool, extra: int, noise: torch.Generator
) -> Tensor:
    """Of each row's allowed units (..., U) at most `most`, a random number or as `every` can be.

    Returns: (..., K) int32 in random order, with `extra` columns and all shortfall as -1.
    """
    keys = torch.rand(allowed.shape, generator=noise).masked_fill(~allowed, 2.0)
    order = keys.argsort(-1)
    count = allowed.sum(-1, keepdim=True).clamp(max=most)
    if not every:
        count = (torch.rand(count.shape, generator=noise) * (count + 1)).long()
    width = int(count.max()) if count.numel() else 0
    ids = torch.where(torch.arange(width) < count, order[..., :width], -1)
    ids = torch.nn.functional.pad(ids, (0, extra), value=-1)
    shuffle = torch.rand(ids.shape, generator=noise).argsort(-1)
    return ids.gather(-1, shuffle).to(torch.int32)


def _worst(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference; NaN if there is one."""
    return float((actual.double() - expected).abs().amax()) if expected.numel() else 0.0


def _generator(*facts: object) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(zlib.crc32(repr(facts).encode()))
    return generator
