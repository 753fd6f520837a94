"""Rows that are written at one rank reach the ranks that hold them, and survive the death of another."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import dense
import pytest
import torch
from faults import die, die_after
from incarnations import Lives, threads
from ranks import run_loopback
from small_world import small_config

from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Runtime
from qroam.runtime.transport.base import Transport


def test_what_one_rank_writes_in_service_another_reads() -> None:
    """Blocks written at rank 1 lie at all ranks; a select or attend of rank 1 brings them there."""
    layout = replace(named_layout("mla-tiny"), codec="fp64", projection=None)
    written = threading.Event()
    g = torch.Generator().manual_seed(2)
    entries = torch.randn(30, 1, layout.entry_dim, generator=g, dtype=torch.float64)
    keys = torch.randn(30, 32, generator=g, dtype=torch.float64)
    query = torch.randn(1, 4, layout.key_dim, generator=g, dtype=torch.float64)
    weights = torch.rand(1, 4, generator=g, dtype=torch.float64)
    expected = dense.attend(layout, query, entries, torch.ones(1, 1, 30, dtype=torch.bool))

    def check(runtime: Runtime, scope: Any) -> None:
        index_query = keys[:1, None].expand(-1, 4, -1).contiguous()
        chosen = runtime.select(0, index_query, weights, scope=scope, top_k=30)
        assert chosen.ids.tolist() == [list(range(30))]
        out = runtime.attend(0, query, chosen)
        assert float((out - expected).abs().max()) <= 1e-12

    def rank(end: Transport, index_placement: str) -> None:
        config = small_config(index_placement=index_placement)
        config = replace(config, model=uniform_model(layout, 1))
        with Runtime.open(config, end) as runtime:
            runtime.add_document("new", tokens=30)
            with runtime.serve() as served:
                if runtime.rank == 1:
                    request = runtime.request(into="new")
                    for first, end_ in ((0, 11), (11, 30)):
                        ids = runtime.append(request, end_ - first)
                        runtime.write(0, ids, entries[first:end_], keys[first:end_])
                        if end_ < 30:
                            runtime.idle_select(0)  # brings the first part to its holders
                    check(runtime, runtime.scope(requests=[(request, ids[-1:])]))
                    written.set()
                else:
                    assert written.wait(20.0)
                    check(runtime, runtime.scope(documents=["new"], queries=1))
                assert served.wait(20.0)

    for index_placement in ("with-blocks", "replicated"):
        written.clear()
        run_loopback(3, lambda end, where=index_placement: rank(end, where))  # type: ignore[misc]


def test_what_is_on_its_way_when_a_rank_dies_is_not_lost() -> None:
    """Rank 0 writes blocks 1 and 3, which lie at ranks 1 and 3; rank 2 dies in the step that moves them."""
    lives, shape = Lives(), {"placement": Placement(policy="contiguous", copies=2), "max_blocks": 8}
    config = small_config(**shape)
    layout = config.model.layers[0]
    entries = torch.randn(32, layout.entry_dim, generator=torch.Generator().manual_seed(2)).double()
    query = torch.randn(1, layout.heads, layout.key_dim).double()
    shares = torch.softmax(query @ entries.T * layout.softmax_scale, -1)

    def rank(rank: int) -> None:
        end = lives.end(0, rank, 4)
        with Runtime.open(config, end) as runtime:
            document = runtime.add_document("doc", tokens=32)
            if rank == 2:
                die(end)
                return
            if rank == 0:
                request = runtime.request(into="doc")
                runtime.write(0, runtime.append(request, 20), entries[:20])
            with pytest.raises(PeerError):
                runtime.idle_attend(0)
            if rank == 0:
                runtime.write(0, runtime.append(request, 12), entries[20:])
            now = (0, 1, 0, 2)[rank]
            runtime.rejoin(lives.end(1, now, 3), incarnation=1)
            runtime.idle_attend(0)
            scope = runtime.scope(documents=["doc"], queries=1)
            out = runtime.attend(0, query, runtime.selection(document.ids()[None], scope))
            assert float((out - shares @ entries[:, : layout.value_dim]).abs().max()) <= 1e-12
            assert runtime.stats()["rank"] == now

    threads([partial(rank, r) for r in range(4)])


def step_until_broken(runtime: Runtime) -> None:
    with suppress(PeerError):
        while True:
            runtime.idle_attend(0)


@pytest.mark.parametrize("breath", range(7))
def test_a_prefill_that_only_its_writer_saw_through_is_not_lost(breath: int) -> None:
    """Rank 3 dies so many messages into the step that moves what rank 0 wrote: the writer may see that
    step succeed while nobody else took what it sent. Or rank 0 is to hold what rank 3 held."""
    lives = Lives()
    placement = Placement(policy="contiguous", copies=2)
    config = small_config(placement=placement, max_blocks=8, corpus_slots=8)
    layout = config.model.layers[0]
    entries = torch.randn(32, layout.entry_dim, generator=torch.Generator().manual_seed(2)).double()
    query = torch.randn(1, layout.heads, layout.key_dim).double()
    shares = torch.softmax(query @ entries.T * layout.softmax_scale, -1)

    def rank(rank: int) -> None:
        end = lives.end(0, rank, 4)
        with Runtime.open(config, end) as runtime:
            document = runtime.add_document("doc", tokens=32)
            if rank == 0:
                request = runtime.request(into="doc")
                runtime.write(0, runtime.append(request, 32), entries)
            if rank == 3:
                die_after(end, breath)
            step_until_broken(runtime)
            if rank == 3:
                return
            runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
            runtime.idle_attend(0)
            scope = runtime.scope(documents=["doc"], queries=1)
            out = runtime.attend(0, query, runtime.selection(document.ids()[None], scope))
            assert float((out - shares @ entries[:, : layout.value_dim]).abs().max()) <= 1e-12

    threads([partial(rank, r) for r in range(4)])
