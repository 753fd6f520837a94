"""The public face: bad input is refused before anything changes; what the runtime tells about itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dense
import pytest
import torch
from ranks import run_loopback
from torch import Tensor

from qroam.partition.layout import Rope
from qroam.partition.placement import Placement
from qroam.partition.presets import mlra, named_layout, uniform_model, with_codec
from qroam.runtime import (
    CoverageError,
    LoopbackTransport,
    PeerError,
    Request,
    Runtime,
    RuntimeConfig,
    Scope,
    load_profile,
)
from qroam.runtime.scope import Selection
from qroam.runtime.transport.base import Transport

B = 8
TOKENS = {"a": 4 * B, "b": 2 * B + 3}
LAYOUT = with_codec(named_layout("mla-tiny"), "fp64", "fp64")
MODEL = uniform_model(LAYOUT, 2)
Q, H, D, HI, DI = 3, LAYOUT.heads, LAYOUT.key_dim, 4, 32


def config(**changes: Any) -> RuntimeConfig:
    sizes: dict[str, Any] = {
        "model": MODEL,
        "max_blocks": 16,
        "block_tokens": B,
        "corpus_slots": 12,
        "private_blocks": 3,
        "request_blocks": 2,
        "dtype": torch.float64,
        "deadline_s": 10.0,
    }
    return RuntimeConfig(**(sizes | changes))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ENTRIES = {name: numbers(tokens, D, seed=tokens) for name, tokens in TOKENS.items()}
KEYS = {name: numbers(tokens, DI, seed=tokens + 1) for name, tokens in TOKENS.items()}
QUERY, INDEX_QUERY, WEIGHTS = numbers(Q, H, D), numbers(Q, HI, DI), numbers(Q, HI).abs()


class Bench:
    """A runtime with two documents and a request whose tokens are written, and one correct step."""

    def __init__(self, transport: Transport, **changes: Any) -> None:
        self.runtime = runtime = Runtime.open(config(**changes), transport)
        for name, tokens in TOKENS.items():
            runtime.add_document(name, tokens=tokens)
            for layer in range(2):
                runtime.load_document(name, layer, ENTRIES[name], KEYS[name])
        self.request = runtime.request(["a"])
        self.at = runtime.append(self.request, 2)
        for layer in range(2):
            runtime.write(layer, self.at, numbers(2, D, seed=5), numbers(2, DI, seed=6))
        self.scope = runtime.scope(documents=["a"], queries=Q)
        self.closed = runtime.request()
        runtime.release(self.closed)
        # Equal in every field to `request`, but not ours.
        self.foreign = Request(
            attached=self.request.attached,
            tail=self.request.tail,
            capacity=self.request.capacity,
            block_tokens=B,
            length=self.request.length,
            blocks=list(self.request.blocks),
        )

    def step(self) -> Tensor:
        selection = self.runtime.select(0, INDEX_QUERY, WEIGHTS, scope=self.scope, top_k=9)
        mine = self.runtime.scope(requests=[(self.request, self.at)])
        both = self.runtime.selection(torch.tensor([[0, 1, int(self.at[0])]] * 2).int(), mine)
        return torch.cat(
            [self.runtime.attend(0, QUERY, selection), self.runtime.attend(1, QUERY[:2], both)]
        )

    def state(self) -> list[Any]:
        world = self.runtime._world
        tables = [
            table.tolist()
            for store in (world.stores.entries, world.stores.index)
            for table in (store.fill, store.slot_of, store.key_of)
        ]
        request = (self.request.length, list(self.request.blocks), self.request.is_open)
        requests = self.runtime._requests
        free = (list(requests._free_seats), list(requests._free_numbers))
        staged = world.writes._staged
        pushes = [len(p) for p in staged["entries"] + staged["index"]]
        return [tables, request, free, pushes, world.directory.version, world.progress.epoch]

    def pick(self, *ids: int, unit_tokens: int = 1) -> Selection:
        return self.runtime.selection(
            torch.tensor([list(ids)] * Q, dtype=torch.int32), self.scope, unit_tokens=unit_tokens
        )

    def attend(self, ids: Tensor, query: Tensor = QUERY, **sizes: Any) -> Tensor:
        return self.runtime.attend(0, query, self.runtime.selection(ids, self.scope, **sizes))

    def select(
        self, query: Tensor = INDEX_QUERY, weights: Tensor = WEIGHTS, **args: Any
    ) -> Selection:
        return self.runtime.select(
            args.pop("layer", 0), query, weights, **({"documents": ["a"]} | args)
        )

    def write(self, *ids: int, rows: int | None = None, **args: Any) -> None:
        count = len(ids) if rows is None else rows
        entries = args.get("entries", numbers(count, D))
        keys = args.get("keys", numbers(count, DI))
        self.runtime.write(
            args.get("layer", 0), torch.tensor(ids, dtype=torch.int32), entries, keys
        )


def with_nan(rows: Tensor) -> Tensor:
    rows = rows.clone()
    rows.view(-1)[3] = math.nan
    return rows


TAIL = 16 * B  # the first private id
BAD: dict[str, tuple[str, Callable[[Bench], object]]] = {
    # Documents
    "document-unknown": ("unknown document 'c'; known: a, b", lambda b: b.runtime.request(["c"])),
    "document-unknown-in-scope": (
        "unknown document 'c'",
        lambda b: b.runtime.scope(documents=["a", "c"], queries=1),
    ),
    "document-unknown-in-select": ("unknown document", lambda b: b.select(documents=["c"])),
    "document-unknown-loaded": (
        "unknown document",
        lambda b: b.runtime.load_document("c", 0, ENTRIES["a"], KEYS["a"]),
    ),
    "document-unknown-prefilled": ("unknown document", lambda b: b.runtime.request(into="c")),
    "document-attached-twice": ("attached twice", lambda b: b.runtime.request(["a", "b", "a"])),
    "document-read-and-written": (
        "attached and written",
        lambda b: b.runtime.request(["a"], into="a"),
    ),
    "document-start-beyond": ("start must be", lambda b: b.runtime.request(into="a", start=4 * B)),
    "document-name-taken": ("exists already", lambda b: b.runtime.add_document("a", tokens=1)),
    "document-empty": ("tokens > 0", lambda b: b.runtime.add_document("c", tokens=0)),
    "document-position": (
        "position >= 0",
        lambda b: b.runtime.add_document("c", tokens=1, position=-1),
    ),
    "document-loaded-twice": (
        "written once",
        lambda b: b.runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"]),
    ),
    "document-load-shape": (
        r"load must have shape \(1,\)",
        lambda b: b.runtime.add_document("c", tokens=1, load=torch.ones(2)),
    ),
    # Capacities
    "blocks-exhausted": ("9 of 16 are free", lambda b: b.runtime.add_document("c", tokens=10 * B)),
    "blocks-absurd": ("are free", lambda b: b.runtime.add_document("c", tokens=10**15)),
    "request-exhausted": ("room for 14 is left", lambda b: b.runtime.append(b.request, 15)),
    "append-nothing": ("cannot append 0", lambda b: b.runtime.append(b.request, 0)),
    "append-negative": ("cannot append -1", lambda b: b.runtime.append(b.request, -1)),
    # Requests
    "request-released": ("released", lambda b: b.runtime.append(b.closed, 1)),
    "request-released-twice": ("released", lambda b: b.runtime.release(b.closed)),
    "request-foreign": ("another runtime", lambda b: b.runtime.append(b.foreign, 1)),
    "request-foreign-released": ("another runtime", lambda b: b.runtime.release(b.foreign)),
    "request-foreign-scope": (
        "another runtime",
        lambda b: b.runtime.scope(requests=[(b.foreign, b.at)]),
    ),
    "scope-ids-not-of-the-request": (
        "ids must lie in",
        lambda b: b.runtime.scope(requests=[(b.request, b.at + 2)]),
    ),
    "scope-ids-of-the-corpus": (
        "ids must lie in",
        lambda b: b.runtime.scope(requests=[(b.request, b.at - TAIL)]),
    ),
    "scope-ids-dtype": (
        "ids must be torch.int32",
        lambda b: b.runtime.scope(requests=[(b.request, b.at.long())]),
    ),
    "scope-of-both": (
        "either documents or requests",
        lambda b: b.runtime.scope(documents=["a"], requests=[]),
    ),
    "scope-of-neither": ("either documents or requests", lambda b: b.runtime.scope()),
    # Writes
    "write-twice": ("written once", lambda b: b.write(TAIL)),
    "write-a-gap": ("in order", lambda b: b.write(TAIL + 4)),
    "write-repeats": ("ids repeat", lambda b: b.write(TAIL + 2, TAIL + 2)),
    "write-beyond-a-document": ("ids must be of", lambda b: b.write(4 * B + 2 * B + 3)),
    "write-to-a-free-block": ("ids must be of", lambda b: b.write(15 * B)),
    "write-to-an-unassigned-private-block": ("ids must be of", lambda b: b.write(TAIL + B)),
    "write-negative": ("ids must be of", lambda b: b.write(-1)),
    "write-beyond-the-table": ("ids must be of", lambda b: b.write(2**31 - 1)),
    "write-too-few-rows": ("entries must have shape", lambda b: b.write(TAIL + 2, rows=2)),
    "write-wide-entries": (
        "entries must have shape",
        lambda b: b.write(TAIL + 2, entries=numbers(1, D + 1)),
    ),
    "write-dtype": ("float64", lambda b: b.write(TAIL + 2, entries=numbers(1, D).float())),
    "write-no-keys": ("go together", lambda b: b.write(TAIL + 2, keys=None)),
    "write-wide-keys": ("index keys must have", lambda b: b.write(TAIL + 2, keys=numbers(1, 31))),
    "write-nan-entries": ("NaN", lambda b: b.write(TAIL + 2, entries=with_nan(numbers(1, D)))),
    "write-nan-keys": ("NaN", lambda b: b.write(TAIL + 2, keys=with_nan(numbers(1, DI)))),
    "write-layer": (r"layer must be in \[0, 2\)", lambda b: b.write(TAIL + 2, layer=2)),
    "load-shape": (
        "entries must have shape",
        lambda b: b.runtime.load_document("a", 0, ENTRIES["b"], KEYS["b"]),
    ),
    # Index queries
    "select-layer": ("layer must be", lambda b: b.select(layer=-1)),
    "select-heads": ("index query must have shape", lambda b: b.select(INDEX_QUERY[:, :3])),
    "select-dtype": ("index query must be", lambda b: b.select(INDEX_QUERY.float())),
    "select-weights": ("index weights must have", lambda b: b.select(weights=WEIGHTS[:2])),
    "select-nan-query": ("finite", lambda b: b.select(with_nan(INDEX_QUERY))),
    "select-inf-weights": ("finite", lambda b: b.select(weights=WEIGHTS / 0)),
    "select-top-k": ("top_k must be", lambda b: b.select(top_k=0)),
    "select-top-k-absurd": ("top_k must be", lambda b: b.select(top_k=10**9)),
    "select-units": ("divide block_tokens 8", lambda b: b.select(unit_tokens=3)),
    "select-units-beyond-a-block": ("divide block_tokens", lambda b: b.select(unit_tokens=2 * B)),
    "select-two-scopes": ("either documents or a scope", lambda b: b.select(scope=b.scope)),
    "select-no-scope": ("either documents or a scope", lambda b: b.select(documents=None)),
    "select-scope-of-others": (
        "scope is for 2 queries, got 3",
        lambda b: b.select(documents=None, scope=b.runtime.scope(documents=["a"], queries=2)),
    ),
    # Attention
    "attend-layer": ("layer must be", lambda b: b.runtime.attend(7, QUERY, b.pick(0))),
    "attend-heads": ("query must have shape", lambda b: b.attend(b.pick(0).ids, QUERY[:, :3])),
    "attend-columns": ("query must have shape", lambda b: b.attend(b.pick(0).ids, QUERY[..., 1:])),
    "attend-dtype": (
        "query must be torch.float64",
        lambda b: b.attend(b.pick(0).ids, QUERY.float()),
    ),
    "attend-ids-dtype": ("must be int32", lambda b: b.attend(b.pick(0).ids.long())),
    "attend-ids-queries": ("must be int32", lambda b: b.attend(b.pick(0).ids[:2])),
    "attend-ids-dims": ("must be int32", lambda b: b.attend(b.pick(0).ids[:, 0])),
    "attend-branches": ("2 branches, the layer 1", lambda b: b.attend(torch.zeros(Q, 2, 1).int())),
    "attend-repeats": ("ids repeat", lambda b: b.attend(b.pick(3, -1, 3, -1).ids)),
    "attend-foreign-document": (
        f"query 0 selects unit {4 * B}",
        lambda b: b.attend(b.pick(0, 4 * B).ids),
    ),
    "attend-foreign-request": ("outside what it may see", lambda b: b.attend(b.pick(TAIL).ids)),
    "attend-beyond-everything": ("outside", lambda b: b.attend(b.pick(2**31 - 1).ids)),
    "attend-below-the-padding": ("outside", lambda b: b.attend(b.pick(-2).ids)),
    "attend-ahead-of-the-query": (
        "outside what it may see",
        lambda b: b.runtime.attend(
            0,
            QUERY[:1],
            b.runtime.selection(b.at[None, 1:], b.runtime.scope(requests=[(b.request, b.at[:1])])),
        ),
    ),
    "attend-units-do-not-nest": ("do not nest", lambda b: b.attend(b.pick(0).ids, unit_tokens=3)),
    "attend-units-zero": ("do not nest", lambda b: b.attend(b.pick(0).ids, unit_tokens=0)),
    "attend-units-absurd": ("do not nest", lambda b: b.attend(b.pick(0).ids, unit_tokens=B << 40)),
    "attend-unit-foreign": (
        "outside",
        lambda b: b.attend(b.pick(4).ids, unit_tokens=B),  # the first block of document b
    ),
    "attend-sink": (
        r"sink must have shape \(4,\)",
        lambda b: b.runtime.attend(0, QUERY, b.pick(0), sink=torch.zeros(3)),
    ),
    "attend-mode": (
        "unknown mode",
        lambda b: b.runtime.attend(0, QUERY, b.pick(0), mode="fastest"),  # type: ignore[arg-type]
    ),
    "attend-scope-dtype": (
        "scope",
        lambda b: b.runtime.attend(
            0, QUERY, Selection(b.pick(0).ids, 1, Scope(b.scope.runs.long(), b.scope.hidden))
        ),
    ),
    # Weights
    "weights-shape": (
        "w_uk must have shape",
        lambda b: b.runtime.load_weights(0, numbers(1, H, 31, 64), numbers(1, H, 64, 32)),
    ),
    "weights-layer": ("layer must be", lambda b: b.runtime.load_weights(5, QUERY, QUERY)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    message, act = BAD[case]

    def worker(transport: Transport) -> None:
        bench = Bench(transport, mode="always-route")
        before, state = bench.step(), bench.state()
        with pytest.raises(ValueError, match=message):
            act(bench)
        assert bench.state() == state
        assert torch.equal(bench.step(), before)

    run_loopback(2, worker)


def test_a_stale_scope_of_a_released_request_is_refused() -> None:
    with Runtime.open(config()) as runtime:
        request = runtime.request()
        at = runtime.append(request, 1)
        runtime.write(0, at, numbers(1, D), numbers(1, DI))
        selection = runtime.selection(at[None], runtime.scope(requests=[(request, at)]))
        runtime.attend(0, QUERY[:1], selection)
        runtime.release(request)
        with pytest.raises(ValueError, match="released"):
            runtime.attend(0, QUERY[:1], selection)


BAD_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "no-blocks": ("max_blocks must be at least 1", {"max_blocks": 0}),
    "no-block-tokens": ("block_tokens", {"block_tokens": 0}),
    "no-slots": ("corpus_slots must be at least 1", {"corpus_slots": 0}),
    "negative-private": ("private_blocks must not be negative", {"private_blocks": -1}),
    "no-request-blocks": ("request_blocks", {"request_blocks": 0}),
    "negative-leases": ("lease_entries must not be negative", {"lease_entries": -1}),
    "unknown-mode": ("unknown mode 'fast'; known: auto", {"mode": "fast"}),
    "unknown-index-placement": ("unknown index placement", {"index_placement": "nowhere"}),
    "reuse-below-one": ("reuse must be", {"reuse": 0.5}),
    "reuse-nan": ("reuse must be", {"reuse": math.nan}),
    "reuse-inf": ("reuse must be", {"reuse": math.inf}),
    "deadline-zero": ("deadline_s must be", {"deadline_s": 0.0}),
    "deadline-nan": ("deadline_s must be", {"deadline_s": math.nan}),
    "deadline-inf": ("deadline_s must be", {"deadline_s": math.inf}),
    "workspace": ("workspace_bytes must be at least 32", {"workspace_bytes": 8}),
    "dtype": ("dtype must be one of", {"dtype": torch.float16}),
    "fabric-number": ("fabric must be a FabricProfile, .* or None, got 4", {"fabric": 4}),
    "fabric-unknown": ("unknown fabric profile 'nvlink9'; known: ", {"fabric": "nvlink9"}),
    "fabric-no-file": ("absent.toml: cannot be read", {"fabric": "absent.toml"}),
    "ids-beyond-int32": ("do not fit int32", {"max_blocks": 2**28}),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_absurd_configs_are_refused(case: str) -> None:
    message, changes = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        config(**changes)


BAD_OPENINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown-codec": ("unknown codec", {"model": uniform_model(replace(LAYOUT, codec="int4"), 1)}),
    "codec-does-not-fit": (
        "multiple of 128",
        {"model": uniform_model(replace(LAYOUT, codec="fp8_v32"), 1)},
    ),
    "index-codec-does-not-fit": (
        "unknown codec",
        {"model": uniform_model(replace(LAYOUT, index_codec="none"), 1)},
    ),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_a_model_that_cannot_be_stored_is_refused_at_open(case: str) -> None:
    message, changes = BAD_OPENINGS[case]
    with pytest.raises(ValueError, match=message):
        Runtime.open(config(**changes))


def test_absurd_profiles_are_refused(tmp_path: Path) -> None:
    profile = load_profile("nvlink4")
    with pytest.raises(ValueError, match="known: ibgda-ndr200"):
        load_profile("nvlink9")
    with pytest.raises(ValueError, match="cannot be read"):
        load_profile(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="probe_us must be in"):
        replace(profile.path, probe_s=-1.0)
    with pytest.raises(ValueError, match="probe_us must be in"):
        replace(profile.path, probe_s=math.nan)


def test_more_copies_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 copies need as many ranks"):
        Runtime.open(config(placement=Placement(copies=2)))


@pytest.mark.parametrize(
    ("taken", "message"),
    [(3, "all 3 private blocks or requests are in use"), (0, "all 0 private blocks")],
    ids=["all-in-use", "none-kept"],
)
def test_requests_are_bounded_and_come_back(taken: int, message: str) -> None:
    with Runtime.open(config(private_blocks=taken)) as runtime:
        requests = [runtime.request() for _ in range(taken)]
        with pytest.raises(ValueError, match=message):
            runtime.request()
        for request in requests:
            runtime.release(request)
        assert len([runtime.request() for _ in range(taken)]) == taken


def test_private_blocks_are_bounded_and_come_back() -> None:
    with Runtime.open(config(private_blocks=3)) as runtime:
        first, second = runtime.request(), runtime.request()
        runtime.append(first, 2 * B)
        runtime.append(second, B)
        with pytest.raises(ValueError, match="1 private blocks needed, 0 of 3 are free"):
            runtime.append(second, 1)
        runtime.release(first)
        assert runtime.append(second, 1).tolist() == [second.tail_start + B]


def test_a_rank_without_room_says_so() -> None:
    with Runtime.open(config(corpus_slots=3)) as runtime:
        runtime.add_document("a", tokens=2 * B)
        with pytest.raises(ValueError, match=r"rank 0 would hold 4 .* its pool has 3"):
            runtime.add_document("b", tokens=2 * B)
        runtime.add_document("b", tokens=B)


def test_layers_without_an_indexer_take_no_keys_and_do_not_select() -> None:
    layout = replace(LAYOUT, index=None)
    with Runtime.open(config(model=uniform_model(layout, 1))) as runtime:
        runtime.add_document("a", tokens=TOKENS["a"])
        with pytest.raises(ValueError, match="go together"):
            runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"])
        runtime.load_document("a", 0, ENTRIES["a"])
        with pytest.raises(ValueError, match="has no indexer"):
            runtime.select(0, INDEX_QUERY, WEIGHTS, documents=["a"])
        with pytest.raises(ValueError, match="no indexer"):
            runtime.idle_select(0)


def test_a_layout_without_a_projection_takes_no_weights() -> None:
    layout = replace(LAYOUT, projection=None, rope=Rope(dim=16, pairing="half"))
    with (
        Runtime.open(config(model=uniform_model(layout, 1))) as runtime,
        pytest.raises(ValueError, match="has no projection"),
    ):
        runtime.load_weights(0, numbers(1, H, 32, 64), numbers(1, H, 64, 32))


@pytest.mark.parametrize("of", ["document", "private"])
def test_entries_that_were_never_written_are_an_error_not_a_smaller_answer(of: str) -> None:
    with Runtime.open(config()) as runtime:
        runtime.add_document("a", tokens=TOKENS["a"])
        runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"])
        request = runtime.request()
        at = runtime.append(request, 1)
        if of == "document":
            listed = torch.tensor([[0, 1]], dtype=torch.int32)
            scope = runtime.scope(documents=["a"], queries=1)
        else:
            listed, scope = at[None], runtime.scope(requests=[(request, at)])
        with pytest.raises(CoverageError, match="layer 1: query 0 at rank 0"):
            runtime.attend(1, QUERY[:1], runtime.selection(listed, scope))


def test_a_unit_larger_than_a_block_stays_within_the_documents_of_its_query() -> None:
    """Unit 0 of 16 tokens is block 0, of document a, and block 1, of a document not attached."""
    outputs = []
    for seed in (1, 2):
        with Runtime.open(config()) as runtime:
            for name in ("mine", "foreign"):
                runtime.add_document(name, tokens=B)
            runtime.load_document("mine", 0, ENTRIES["a"][:B], KEYS["a"][:B])
            runtime.load_document("foreign", 0, numbers(B, D, seed=seed), numbers(B, DI))
            scope = runtime.scope(documents=["mine"], queries=Q)
            unit = torch.zeros(Q, 1, dtype=torch.int32)
            outputs.append(
                runtime.attend(0, QUERY, runtime.selection(unit, scope, unit_tokens=2 * B))
            )
    assert torch.equal(*outputs)
    all_of_mine = torch.ones(Q, 1, B, dtype=torch.bool)
    want = dense.attend(LAYOUT, QUERY, ENTRIES["a"][:B, None], all_of_mine)
    assert float((outputs[0] - want).abs().max()) <= 1e-12


@pytest.mark.parametrize("index_placement", ["with-blocks", "replicated"])
@pytest.mark.parametrize("selected", [True, False], ids=["by-the-indexer", "given"])
def test_chunks_prefilled_in_one_step_see_one_another(index_placement: str, selected: bool) -> None:
    """Two ranks compute half a document each; every block is stored at the other one too."""
    tokens, half = 4 * B, 2 * B
    query = numbers(tokens, H, D)
    index_query, weights = numbers(tokens, HI, DI), numbers(tokens, HI).abs()

    def worker(transport: Transport) -> Tensor:
        with Runtime.open(config(index_placement=index_placement), transport) as runtime:
            runtime.add_document("a", tokens=tokens)
            request = runtime.request(into="a", start=half * runtime.rank)
            at = runtime.append(request, half)
            mine = slice(int(at[0]), int(at[-1]) + 1)
            runtime.write(0, at, ENTRIES["a"][mine], KEYS["a"][mine])
            scope = runtime.scope(requests=[(request, at)])
            everything = torch.arange(tokens, dtype=torch.int32)
            ids = torch.where(everything <= at[:, None], everything, -1)
            selection = runtime.selection(ids, scope)
            if selected:
                selection = runtime.select(
                    0, index_query[mine], weights[mine], scope=scope, top_k=tokens
                )
                assert torch.equal(selection.ids, ids)
            return runtime.attend(0, query[mine], selection)

    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[:, None]
    want = dense.attend(LAYOUT, query, ENTRIES["a"][:, None], causal)
    out = torch.cat(run_loopback(2, worker))
    assert float((out - want).abs().max()) <= 1e-12


def test_a_world_of_one_needs_no_launcher_and_sends_nothing() -> None:
    with Runtime.open(config()) as runtime:
        assert (runtime.rank, runtime.world_size) == (0, 1)
        runtime.add_document("a", tokens=TOKENS["a"])
        runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"])
        every = torch.arange(TOKENS["a"], dtype=torch.int32).repeat(Q, 1)
        scope = runtime.scope(documents=["a"], queries=Q)
        out = runtime.attend(0, QUERY, runtime.selection(every, scope))
        want = dense.attend(LAYOUT, QUERY, ENTRIES["a"][:, None], every[:, None] >= 0)
        assert float((out - want).abs().max()) <= 1e-12
        stats = runtime.stats()
        assert stats["bytes_sent"] == {}
        assert stats["decisions"] == {0: {"local": Q, "route_a": 0, "route_b": 0, "fetch": 0}}


def test_queries_that_select_nothing_get_zero() -> None:
    with Runtime.open(config()) as runtime:
        runtime.add_document("a", tokens=TOKENS["a"])
        runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"])
        scope = runtime.scope(documents=["a"], queries=Q)
        for width in (0, 4):
            nothing = torch.full((Q, width), -1, dtype=torch.int32)
            assert not bool(runtime.attend(0, QUERY, runtime.selection(nothing, scope)).any())


@pytest.mark.parametrize(("mode", "way"), [("always-route", "ROUTE_A"), ("always-fetch", "FETCH")])
def test_stats_and_explain_tell_of_the_last_step(mode: str, way: str) -> None:
    def worker(transport: Transport) -> tuple[list[Any], dict[str, Any], dict[str, int]]:
        bench = Bench(transport, mode=mode)
        assert bench.runtime.explain() == []
        if bench.runtime.rank == 0:
            bench.attend(bench.pick(0, 1, B, 3 * B).ids)
        else:
            bench.runtime.idle_attend(0)
        return bench.runtime.explain(), bench.runtime.stats(), dict(transport.bytes_sent)

    (lines, stats, sent), (idle_lines, idle_stats, _) = run_loopback(2, worker)
    assert [(line.query, line.holder, line.units, line.way) for line in lines] == [
        (query, holder, 2, "LOCAL" if holder == 0 else way)
        for query in range(Q)
        for holder in (0, 1)
    ]
    assert all(line.layer == line.branch == 0 for line in lines)
    remote = [line for line in lines if line.holder == 1]
    assert all(line.reason == "FORCED" for line in remote)
    assert all(line.route_us > 0 and line.fetch_us > 0 for line in remote)
    assert (stats["rank"], stats["steps"], stats["queries"]) == (0, 1, Q)
    assert stats["decisions"][1][way.lower()] == Q
    assert stats["bytes_sent"] == sent
    assert {"attend", "attend-answer"} <= set(sent)
    assert stats["pool_bytes"] > 0
    assert all(seconds >= 0 for seconds in stats["phase_s"].values())
    assert idle_lines == []
    assert (idle_stats["steps"], idle_stats["queries"]) == (1, 0)


def test_idle_ranks_take_part_in_every_step() -> None:
    def worker(transport: Transport) -> Tensor | None:
        bench = Bench(transport, mode="random")
        runtime = bench.runtime
        if runtime.rank == 0:
            return bench.step()
        runtime.idle_select(0)
        runtime.idle_attend(0)
        runtime.idle_attend(1)
        return None

    alone = run_loopback(1, worker)[0]
    assert alone is not None
    out = run_loopback(3, worker)[0]
    assert out is not None
    assert float((out - alone).abs().max()) <= 1e-12


def test_a_closed_runtime_refuses_everything() -> None:
    (transport,) = LoopbackTransport.world(1)
    bench = Bench(transport)
    runtime = bench.runtime
    runtime.close()
    runtime.close()
    selection = bench.pick(0)
    for act in (
        lambda: runtime.add_document("c", tokens=1),
        lambda: runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"]),
        lambda: runtime.request(),
        lambda: runtime.append(bench.request, 1),
        lambda: runtime.release(bench.request),
        lambda: runtime.write(0, bench.at, numbers(2, D), numbers(2, DI)),
        lambda: runtime.select(0, INDEX_QUERY, WEIGHTS, documents=["a"]),
        lambda: runtime.attend(0, QUERY, selection),
        lambda: runtime.idle_select(0),
        lambda: runtime.idle_attend(0),
    ):
        with pytest.raises(RuntimeError, match="the runtime is closed"):
            act()


def test_the_error_of_another_rank_names_it() -> None:
    def worker(transport: Transport) -> PeerError | None:
        try:
            with Runtime.open(config(), transport) as runtime:
                if runtime.rank == 1:
                    raise KeyError("mine")
                runtime.idle_attend(0)
        except PeerError as error:
            return error
        except KeyError:
            return None
        raise AssertionError("nothing was raised")

    first, second = run_loopback(2, worker)
    assert second is None
    assert first is not None
    assert first.culprits == (1,)
    assert "KeyError" in str(first)


def test_documents_declared_in_another_order_are_caught() -> None:
    def worker(transport: Transport) -> str:
        with Runtime.open(config(), transport) as runtime:
            for name in ("a", "b") if runtime.rank == 0 else ("b", "a"):
                runtime.add_document(name, tokens=TOKENS[name])
            try:
                runtime.idle_attend(0)
            except PeerError as error:
                return str(error)
        return ""

    assert all("out of step" in said and "tables" in said for said in run_loopback(2, worker))


def test_mlra_branches_may_select_different_units() -> None:
    layout = mlra(4, heads=2, codec="fp64")
    model = uniform_model(replace(layout, projection=None), 1)
    with Runtime.open(config(model=model, corpus_slots=64)) as runtime:
        runtime.add_document("a", tokens=2 * B)
        entries = numbers(2 * B, 4, 192)
        runtime.load_document("a", 0, entries)
        ids = torch.stack([torch.arange(4) + 3 * branch for branch in range(4)]).int()
        scope = runtime.scope(documents=["a"], queries=1)
        out = runtime.attend(0, numbers(1, 2, 192), runtime.selection(ids[None], scope))
        listed = torch.zeros(1, 4, 2 * B, dtype=torch.bool).scatter(2, ids[None].long(), True)
        want = dense.attend(replace(layout, projection=None), numbers(1, 2, 192), entries, listed)
        assert float((out - want).abs().max()) <= 1e-12


def test_a_holder_without_index_keys_is_noticed() -> None:
    """Rank 1 never loads its part of the document: its index keys would silently win nothing."""

    def work(transport: Transport) -> str:
        layout = named_layout("mla-tiny")
        shared = RuntimeConfig(model=uniform_model(layout, 1), max_blocks=4, deadline_s=10.0)
        with Runtime.open(shared, transport) as runtime:
            runtime.add_document("a", tokens=256)
            if runtime.rank == 0:
                runtime.load_document("a", 0, torch.randn(256, 80), torch.randn(256, 32))
            with pytest.raises(CoverageError) as caught:
                runtime.select(0, torch.randn(1, 4, 32), torch.rand(1, 4), documents=["a"])
            return str(caught.value)

    for said in run_loopback(2, work):
        assert "query 0 sees 256 entries, index keys of 128 were scored" in said


@pytest.mark.parametrize("copies", [1, 2])
def test_a_full_pool_is_hardly_larger_than_its_blocks(copies: int) -> None:
    """Bytes per rank at most 1.05 x the encoded bytes of the blocks it holds, replicas included."""
    full = RuntimeConfig(
        model=uniform_model(named_layout("mla-tiny"), 2),
        max_blocks=32,
        private_blocks=0,
        placement=Placement(policy="block-cyclic", run=2, copies=copies),
        deadline_s=10.0,
    )

    def work(transport: Transport) -> float:
        with Runtime.open(full, transport) as runtime:
            runtime.add_document("a", tokens=20 * 64)
            runtime.add_document("b", tokens=12 * 64)
            stats = runtime.stats()
            return float(stats["pool_bytes"] / stats["block_bytes"])

    assert max(run_loopback(4, work)) <= 1.05
