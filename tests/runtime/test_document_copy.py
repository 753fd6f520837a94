"""Private copies of documents: moved to the request's position, bit for bit in place, refused if lost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import dense
import pytest
import torch
from at_offsets import DI, HI, LAYOUT, B, D, H, numbers, opened
from faults import die
from incarnations import Lives, threads
from ranks import run_loopback
from small_world import small, small_config

from qroam.indexer import rotate_index
from qroam.partition.presets import uniform_model, with_codec
from qroam.runtime import BlocksLostError, CoverageError, PeerError, Runtime
from qroam.runtime.transport.base import Transport


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("quantized", [False, True])
def test_attached_and_leased_documents_give_what_a_prefill_there_would(
    world: int, quantized: bool
) -> None:
    """One document by offset, by lease, and written at the place it is moved to: all the same."""
    index = replace(LAYOUT.index, quantized=quantized) if LAYOUT.index else None
    layout = replace(LAYOUT, index=index)
    rope = layout.index_rope
    assert index is not None
    assert rope is not None
    offset = 37
    by = torch.full((2 * B,), offset)

    def worker(transport: Transport) -> None:
        runtime = opened(transport, model=uniform_model(layout, 2))
        there = runtime.add_document("there", tokens=2 * B, position=10 + offset)
        entries, keys = numbers(2 * B, D), numbers(2 * B, DI, seed=9)
        moved = dense.moved_keys(entries, offset, layout.rope)
        moved_keys = rotate_index(keys, by, index, rope)
        for layer in range(2):
            runtime.load_document("there", layer, moved, moved_keys)
        request = runtime.request([("b", 10 + offset - 2 * B)])  # it ends where the lease begins
        assert request.position == 10 + offset
        ids = runtime.copy_document(request, "a")
        assert ids is not None
        assert request.position == 10 + offset + 2 * B
        own = runtime.scope(requests=[(request, ids[-1:])])
        places = [
            (runtime.scope(documents=["there"], queries=1), there.ids()),
            (
                runtime.scope(documents=[("a", 10 + offset)], queries=1),
                runtime.documents()[0].ids(),
            ),
            (own, ids),
        ]
        query, weights = numbers(1, HI, DI, seed=5), numbers(1, HI, seed=6).abs()
        results = []
        for scope, listed in places:
            for layer in range(2):
                out = runtime.attend(
                    layer, numbers(1, H, D, seed=7), runtime.selection(listed[None], scope)
                )
                results.append((layer, out))
        for layer, out in results:
            assert float((out - results[layer][1]).abs().max()) < 1e-12
        found = [
            runtime.select(0, query, weights, scope=scope, top_k=3).ids[0]
            for scope, _ in places[:2]
        ]
        assert (found[0] - there.start).tolist() == (found[1] - 0).tolist()
        runtime.release(request)

    run_loopback(world, worker)


def test_a_lease_names_the_holders_that_lack_something() -> None:
    def worker(transport: Transport) -> None:
        runtime = opened(transport)
        runtime.add_document("empty", tokens=B)
        request = runtime.request()
        lacking = r"'empty': rank 0 lacked 4 entries"

        def act() -> None:
            runtime.copy_document(request, "empty" if runtime.rank == 1 else "a")
            runtime.idle_attend(0)  # what rank 1 found is told to all

        with pytest.raises((CoverageError, PeerError), match=lacking):
            act()

    run_loopback(2, worker)


def test_index_keys_and_entries_of_any_codec_survive_a_lease_in_place() -> None:
    """At offset 0 nothing is rotated, and what is stored comes back bit for bit."""
    for codec, index_codec in (("bf16", "fp8_index"), ("fp32", "fp32"), ("fp64", "fp64")):
        model = uniform_model(with_codec(LAYOUT, codec, index_codec), 2)
        with opened(model=model) as runtime:
            runtime.add_document("first", tokens=2 * B, position=0)
            rows = numbers(2 * B, D, seed=3)
            for layer in range(2):
                runtime.load_document("first", layer, rows, numbers(2 * B, DI, seed=4))
            request = runtime.request()
            ids = runtime.copy_document(request, "first")
            assert ids is not None
            world = runtime._world
            source = runtime.documents()[-1].ids()
            for layer in range(2):
                for store in (world.stores.entries, world.stores.index):
                    index = [store.resolve(layer, part)[0] for part in (source, ids)]
                    assert torch.equal(*(store.rows(layer, at) for at in index))


def test_a_lease_of_a_lost_block_names_it_and_hurts_nobody() -> None:
    lives = Lives(8.0)
    config = small_config(max_blocks=16, corpus_slots=16, private_blocks=16, request_blocks=8)

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            world = small(runtime)
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                world.check()
            runtime.rejoin(lives.end(1, min(rank, 1), 2), incarnation=1)
            if rank == 0:
                with pytest.raises(BlocksLostError) as lost:
                    runtime.copy_document(runtime.request(), "doc")
                assert lost.value.blocks == runtime.lost_blocks() != {}
            else:
                runtime.copy_document(None, None)
            runtime.idle_attend(0)

    threads([partial(survivor, rank) for rank in range(3)])
