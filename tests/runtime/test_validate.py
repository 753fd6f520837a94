"""Bad input is refused before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ranks import run_loopback
from torch import Tensor
from two_documents import (
    DI,
    ENTRIES,
    INDEX_QUERY,
    KEYS,
    LAYOUT,
    QUERY,
    WEIGHTS,
    B,
    Bench,
    D,
    H,
    Q,
    config,
    numbers,
)

from qroam.partition.layout import Rope
from qroam.partition.presets import uniform_model
from qroam.runtime import (
    Runtime,
    Scope,
)
from qroam.runtime.scope import Selection
from qroam.runtime.transport.base import Transport


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
    "document-start-beyond": (
        "start in document 'a' must be a whole number in",
        lambda b: b.runtime.request(into="a", start=4 * B),
    ),
    "document-name-taken": ("exists already", lambda b: b.runtime.add_document("a", tokens=1)),
    "document-empty": (
        "tokens of document 'c' must be a whole number in .1, 2147483647., got 0",
        lambda b: b.runtime.add_document("c", tokens=0),
    ),
    "document-position": (
        "position of document 'c' must be a whole number in",
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
    "blocks-absurd": (
        "tokens of document 'c' must be a whole number in .1, 2147483647.",
        lambda b: b.runtime.add_document("c", tokens=10**15),
    ),
    "request-exhausted": ("room for 14 is left", lambda b: b.runtime.append(b.request, 15)),
    "append-nothing": (
        "number of tokens to append must be a whole number .*, got 0",
        lambda b: b.runtime.append(b.request, 0),
    ),
    "append-negative": (
        "number of tokens to append must be a whole number .*, got -1",
        lambda b: b.runtime.append(b.request, -1),
    ),
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


def test_a_layout_without_a_projection_takes_no_weights() -> None:
    layout = replace(LAYOUT, projection=None, rope=Rope(dim=16, pairing="half"))
    with (
        Runtime.open(config(model=uniform_model(layout, 1))) as runtime,
        pytest.raises(ValueError, match="has no projection"),
    ):
        runtime.load_weights(0, numbers(1, H, 32, 64), numbers(1, H, 64, 32))
