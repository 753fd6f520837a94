"""Index scores: only ranks that hold visible index keys are asked, and who lacks keys is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_loopback
from small_world import small_config
from two_documents import ENTRIES, INDEX_QUERY, KEYS, LAYOUT, TOKENS, WEIGHTS, config

from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import CoverageError, Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport


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


@pytest.mark.parametrize("seen", [["a", "c"], [("a", 9), "c"]], ids=["in place", "at offsets"])
def test_only_ranks_with_visible_index_keys_are_asked(seen: list[str | tuple[str, int]]) -> None:
    layout = replace(named_layout("mla-tiny"), codec="fp64")

    def rank(end: Transport) -> Any:
        placement = Placement(policy="document-affine")
        config = replace(small_config(placement=placement), model=uniform_model(layout, 1))
        with Runtime.open(config, end) as runtime:
            g = torch.Generator().manual_seed(3)
            for name in ("a", "b", "c"):  # at ranks 0, 1, 2
                runtime.add_document(name, tokens=16)
                entries = torch.randn(16, layout.entry_dim, generator=g, dtype=torch.float64)
                runtime.load_document(name, 0, entries, torch.randn(16, 32, generator=g))
            with runtime.serve() as served:
                if runtime.rank == 0:
                    index_query = torch.randn(2, 4, 32, generator=g, dtype=torch.float64)
                    weights = torch.ones(2, 4)
                    chosen = runtime.select(0, index_query, weights, documents=seen, top_k=32)
                    assert chosen.ids.tolist() == [[*range(16), *range(32, 48)]] * 2
                    runtime.select(0, index_query[:0], weights[:0], documents=["c"])
                assert served.wait(20.0)
            return runtime.stats()["served"]["answered"]

    assert run_loopback(4, rank) == [{}, {}, {0: 1}, {}]
