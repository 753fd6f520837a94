"""What a query sees: documents at their own and at other positions, requests, and units of many tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dense
import pytest
import torch
from at_offsets import opened
from ranks import run_loopback
from torch import Tensor
from two_documents import DI, ENTRIES, HI, KEYS, LAYOUT, QUERY, TOKENS, B, D, H, Q, config, numbers

from qroam.partition.layout import ModelLayout
from qroam.partition.presets import mlra, uniform_model
from qroam.runtime import Runtime
from qroam.runtime.scope import MAX_OFFSETS
from qroam.runtime.transport.base import Transport


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


def test_queries_that_select_nothing_get_zero() -> None:
    with Runtime.open(config()) as runtime:
        runtime.add_document("a", tokens=TOKENS["a"])
        runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"])
        scope = runtime.scope(documents=["a"], queries=Q)
        for width in (0, 4):
            nothing = torch.full((Q, width), -1, dtype=torch.int32)
            assert not bool(runtime.attend(0, QUERY, runtime.selection(nothing, scope)).any())


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


MIXED = ModelLayout(
    layers=(LAYOUT, replace(LAYOUT, rope=None, projection=None)), index_source=(0, 1)
)


BAD: dict[str, tuple[str, dict[str, Any], Callable[[Runtime], object]]] = {
    "negative-position": ("position >= 0", {}, lambda r: r.request([("a", -1)])),
    "no-number": ("position >= 0", {}, lambda r: r.request([("a", 1.5)])),  # type: ignore[list-item]
    "no-pair": ("position >= 0", {}, lambda r: r.request([("a", 1, 2)])),  # type: ignore[list-item]
    "twice": ("attached twice", {}, lambda r: r.request(["a", ("a", 9)])),
    "no-rope": ("no rope", {"model": MIXED}, lambda r: r.request([("a", 9)])),
    "copy-no-rope": ("no rope", {"model": MIXED}, lambda r: r.copy_document(r.request(), "a")),
    "copy-half": ("or neither", {}, lambda r: r.copy_document(r.request(), None)),
    "copy-into": (
        "private tokens only",
        {},
        lambda r: r.copy_document(r.request(into="a"), "b"),
    ),
    "copy-room": (
        "cannot append 8 tokens",
        {"request_blocks": 1},
        lambda r: r.copy_document(r.request(), "a"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_attachments_are_refused(case: str) -> None:
    message, changes, act = BAD[case]
    with opened(**changes) as runtime:
        epoch = runtime._world.progress.epoch
        with pytest.raises(ValueError, match=message):
            act(runtime)
        assert runtime._world.progress.epoch == epoch


def test_a_request_has_so_many_offsets_at_most() -> None:
    with Runtime.open(config(max_blocks=70, block_tokens=1, corpus_slots=70)) as runtime:
        for number in range(MAX_OFFSETS + 1):
            runtime.add_document(str(number), tokens=1)
        places = [(str(number), 2 * number) for number in range(MAX_OFFSETS + 1)]
        runtime.request(places[:-1])
        with pytest.raises(ValueError, match="at 64 offsets at once, got 65"):
            runtime.request(places)
