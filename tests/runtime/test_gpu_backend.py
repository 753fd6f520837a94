"""Entries on GPUs, where there is none: the door, the pool's tables, and what the host does in a step.

The step itself is a stand-in in plain torch; `test_runtime_gpu.py` runs the same life on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from effort import slow_after, slow_between
from gpu_world import (
    BF16,
    HEADS,
    LAYERS,
    LAYOUT,
    WAYS_OF_LEASING,
    WIDE,
    B,
    Life,
    StandIns,
    assert_right,
    config,
    leasing,
    live,
    numbers,
    pool_of,
)
from ranks import RankPool, run_loopback
from torch import Tensor

from qroam.kernels import attend as kernel
from qroam.kernels import plan as kernel_plan
from qroam.partition.directory import empty_directory, with_document
from qroam.partition.layout import Layout, ModelLayout
from qroam.partition.placement import Placement
from qroam.partition.pool import BlockStore
from qroam.partition.presets import mlra, named_layout, with_codec
from qroam.runtime import (
    CoverageError,
    LoopbackTransport,
    PeerError,
    Runtime,
    RuntimeConfig,
)
from qroam.runtime.gpu import limits
from qroam.runtime.gpu.admit import admit
from qroam.runtime.gpu.backend import GpuBackend
from qroam.runtime.gpu.pool import GpuPool
from qroam.runtime.stores import entry_codec
from qroam.runtime.transport.base import Transport

V32 = replace(named_layout("mla-v3.2"), index=None)


def opened_alone(given: RuntimeConfig) -> Runtime:
    return Runtime.open(given, LoopbackTransport.world(1)[0])


# The door -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "tpu"}, "device must be one of"),
        ({"layout": mlra(4, heads=8), "dtype": BF16}, "one branch, got 4"),
        ({"layout": named_layout("mla-tiny")}, "got 64 and 80 of 80, and 4 heads"),
        ({"layout": with_codec(LAYOUT, "fp64"), "dtype": torch.float64}, "got fp64 with"),
        ({"layout": with_codec(LAYOUT, "bf16")}, "got bf16 with torch.float32"),
        ({"layout": with_codec(LAYOUT, "fp8_v32"), "dtype": BF16}, r"\(512,\) value columns"),
        ({"lease_entries": B + 4}, "lease_entries must be a multiple of block_tokens=8 .* got 12"),
        (
            {"lease_entries": B, "max_queries": 1, "max_units": 7},
            r"at least block_tokens=8, got 1 \* 7",
        ),
        ({"mode": "random"}, "got 'random'"),
        ({"max_queries": 257}, "max_queries is at most 256"),
        ({"max_units": 4097}, "max_units is at most 4096"),
        ({"max_queries": 0}, "max_queries must be at least 1"),
        ({"buckets": (4, 8)}, r"ascend to below max_queries=8, got \(4, 8\)"),
        ({"buckets": (0,)}, r"got \(0,\)"),
        ({"buckets": (2, 1)}, r"got \(2, 1\)"),
        ({"buckets": (1.0,)}, r"whole numbers .* got \(1.0,\)"),
        ({"buckets": [1, 2]}, r"a tuple of .* got \[1, 2\]"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_what_the_step_does_not_do(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**changes)


def test_layers_of_different_shapes_are_refused() -> None:
    model = ModelLayout(layers=(LAYOUT, replace(LAYOUT, codec="bf16")), index_source=(0, 1))
    with pytest.raises(ValueError, match="all layers must have the same"):
        config(model=model)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(LAYOUT, torch.float32), (with_codec(V32, "bf16"), BF16), (V32, BF16)],
    ids=["fp32", "bf16", "fp8"],
)
def test_what_the_step_does(layout: Layout, dtype: torch.dtype) -> None:
    assert config(layout=layout, dtype=dtype).device == "cuda"


def test_limits_are_those_of_the_kernels() -> None:
    of_runtime, of_attend, of_plan = vars(limits), vars(kernel), vars(kernel_plan)
    for name in ("LATENTS", "ROPES", "MAX_HEADS", "FP8_LATENT", "FP8_ROPE"):
        assert of_runtime[name] is of_attend[name]
    for name in ("MAX_QUERIES", "MAX_UNITS"):
        assert of_runtime[name] is of_plan[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nobody_opens() -> None:
    with pytest.raises(ValueError, match=r"rank 0: .* finds no CUDA device"):
        opened_alone(config())
    with pytest.raises(ValueError, match=r"a process per rank, .* is a LoopbackTransport"):
        run_loopback(2, lambda end: Runtime.open(config(), end))


def why_not(transport: Transport) -> str:
    try:
        Runtime.open(config(), transport)
    except ValueError as error:
        return str(error)
    return "opened"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_all_ranks_hear_who_has_no_gpu(four_ranks: RankPool) -> None:
    said = four_ranks.run(why_not)
    assert len(set(said)) == 1
    assert said[0].startswith("rank 0: device 'cuda' was asked for, and torch finds no CUDA device")


def test_a_world_on_gpus_is_not_rejoined() -> None:
    with pytest.raises(ValueError, match="a world with entries on GPUs is not rejoined"):
        Runtime.open(config(), LoopbackTransport.world(1)[0], incarnation=1)
    with StandIns(config(), 1), opened_alone(config()) as runtime:
        for call in (runtime.serve, runtime.disconnect, lambda: runtime.rejoin(incarnation=1)):
            with pytest.raises(RuntimeError, match="with its entries on GPUs cannot"):
                call()


def test_steps_that_are_refused() -> None:
    with StandIns(config(), 1), opened_alone(config()) as runtime:
        life = Life(runtime, weights=False)
        life.add("a", 4 * B, seed=1)

        def attend(ids: Tensor, documents: Any = ("a",), unit_tokens: int = 1) -> Tensor:
            scope = runtime.scope(documents=documents, queries=len(ids))
            chosen = runtime.selection(ids, scope, unit_tokens=unit_tokens)
            return runtime.attend(0, life.query(len(ids)), chosen)

        ids = torch.arange(8, dtype=torch.int32)[None]
        with pytest.raises(ValueError, match=r"max_queries=8 .* got 9 queries of 8"):
            attend(ids.expand(9, -1))
        with pytest.raises(ValueError, match=r"max_units=24 bound .* of 25 units"):
            attend(torch.arange(25, dtype=torch.int32)[None])
        with pytest.raises(ValueError, match="a unit is one entry"):
            attend(ids[:, :2], unit_tokens=2)
        with pytest.raises(ValueError, match="at their own positions"):
            attend(ids, documents=[("a", 5)])
        chosen = runtime.selection(ids, runtime.scope(documents=["a"], queries=1))
        with pytest.raises(ValueError, match="mode is one of"):
            runtime.attend(0, life.query(1), chosen, mode="random")
        assert attend(ids).shape == (1, HEADS, 128)


# The pool -------------------------------------------------------------------------------------------


def tables(pool: GpuPool) -> list[Tensor]:
    return [t.clone() for t in (pool.slot_of, pool.generation, pool.fill, pool.directory.records)]


@pytest.mark.parametrize(
    ("codec", "dtype", "row"),
    [
        ("fp32", torch.float32, (192, torch.float32)),
        ("bf16", BF16, (192, BF16)),
        ("fp8_v32", BF16, (656, torch.uint8)),
    ],
)
def test_entries_lie_where_the_store_put_them(
    codec: str, dtype: torch.dtype, row: tuple[int, torch.dtype]
) -> None:
    layout = V32 if codec == "fp8_v32" else with_codec(LAYOUT, codec)
    given = config(layout=layout, dtype=dtype)
    pool, coder = pool_of(given, 0, 1), entry_codec(layout)
    slots = pool.map.slots
    store = BlockStore(
        [coder] * LAYERS,
        num_slots=slots,
        num_keys=given.max_ids,
        block_tokens=B,
        storage=pool.storage(),
    )
    store.assign(torch.tensor([3, 1]), torch.tensor([2, 0]))
    rows = coder.encode(numbers(B + 2, coder.dim, seed=3))
    ids = torch.cat([torch.arange(B) + 3 * B, torch.arange(2) + B]).to(torch.int32)
    store.write(1, ids, rows)
    index, valid = store.resolve(1, ids)
    assert bool(valid.all())
    assert torch.equal(store.rows(1, index), rows)
    entries = pool.entries(1)
    assert (entries.shape, entries.dtype) == ((slots * B + 64, row[0]), row[1])
    assert torch.equal(entries[index].view(torch.uint8), rows)
    assert torch.equal(pool.entries(0)[slots * B :].view(torch.uint8), entries.view(torch.uint8))
    assert len(pool.storage()) == LAYERS


def test_tables_follow_the_hosts() -> None:
    given = config(placement=Placement(copies=2))
    pool, coder = pool_of(given, 1, 2), entry_codec(LAYOUT)
    assert [bool((t == -1).all()) for t in (pool.slot_of, pool.directory.records[:, :2])] == [
        True
    ] * 2
    directory = empty_directory(
        max_blocks=given.max_blocks, block_tokens=B, num_branches=1, copies=2, world_size=2
    )
    store = BlockStore(
        [coder] * LAYERS,
        num_slots=pool.map.slots,
        num_keys=given.max_ids,
        block_tokens=B,
        storage=pool.storage(),
    )
    addresses = [t.data_ptr() for t in (pool.slot_of, pool.fill, pool.directory.records)]
    assert pool.refresh(store, directory)
    assert not pool.refresh(store, directory)

    ranks = torch.tensor([[[0, 1]], [[1, 0]], [[0, -1]]], dtype=torch.int32)
    directory = with_document(
        directory, "a", tokens=2 * B + 3, position=0, ranks=ranks, capacity=given.slots_for(2)
    )
    private = given.max_blocks + 2
    store.assign(torch.tensor([0, 1]), torch.tensor([5, 6]), torch.tensor([0, 0]))
    store.assign(torch.tensor([private]), torch.tensor([7]))
    assert pool.refresh(store, directory)
    slot_of, generation, fill, records = tables(pool)
    assert torch.equal(slot_of, store.slot_of)
    assert torch.equal(generation, store.generation)
    assert not bool(fill.any())
    # Rank 1 asks copy 1: the own ones first, then the only one there is.
    assert records[:4].tolist() == [[1, 5, 0, B], [0, 6, 0, B], [0, -1, 0, 3], [-1, -1, 0, 0]]
    assert records[private].tolist() == [1, 7, 0, B]

    before = tables(pool)
    store.write(1, torch.arange(3, dtype=torch.int32), coder.encode(numbers(3, coder.dim, seed=1)))
    assert pool.refresh(store, directory)
    before[2][1, 5] = 3
    assert all(map(torch.equal, tables(pool), before))
    assert pool.refresh(store, directory, torch.tensor([2, 1], dtype=torch.uint8))
    assert pool.directory.records[0].tolist() == [0, 5, 0, B]

    store.release(torch.tensor([private]))
    assert pool.refresh(store, directory)
    assert pool.directory.records[private].tolist()[:2] == [-1, -1]
    assert int(pool.generation[7]) == 1
    assert addresses == [t.data_ptr() for t in (pool.slot_of, pool.fill, pool.directory.records)]


def test_a_region_of_another_size_is_refused() -> None:
    pool = pool_of(config(), 0, 1)
    with pytest.raises(ValueError, match="the region must be uint8"):
        GpuPool(pool.memory[:-16], pool.map, entry_codec(LAYOUT), rank=0)
    with pytest.raises(ValueError, match="entries of 768 bytes were mapped"):
        GpuPool(pool.memory, pool.map, entry_codec(with_codec(LAYOUT, "bf16")), rank=0)


# The host's part of a step --------------------------------------------------------------------------


bare = partial(live, weights=False)


def on_stand_ins(
    world_size: int, given: RuntimeConfig, life: Callable[[Runtime], list[Tensor]]
) -> list[list[Tensor]]:
    def work(end: Transport) -> list[Tensor]:
        with Runtime.open(given, end) as runtime:
            return life(runtime)

    with StandIns(given, world_size) as gpus:
        outs = run_loopback(world_size, work)  # at the same layers on all ranks
    assert len({tuple(layer for layer, _ in taken) for taken in gpus.taken}) == 1
    sizes = {*given.buckets, given.max_queries}
    assert all({rows for _, rows in taken} == sizes for taken in gpus.taken)
    return outs


@pytest.mark.parametrize(
    ("world_size", "changes"),
    slow_between(
        2,
        [
            (1, {}),
            (2, {}),
            (3, {"placement": Placement(copies=2)}),
            (2, {"placement": Placement(policy="document-affine"), "corpus_slots": 24}),
            (2, {"index_placement": "replicated"}),
            (2, {"layout": WIDE, "dtype": BF16}),
            (1, {"layout": with_codec(WIDE, "bf16"), "dtype": BF16}),
            (2, {"buckets": (1, 2)}),
        ],
    ),
    ids=["alone", "two", "three, copies", "affine", "replicated index", "fp8", "bf16", "buckets"],
)
def test_a_life_is_the_same_on_cpus(world_size: int, changes: dict[str, Any]) -> None:
    given, life = config(**changes), bare if world_size == 1 else live
    assert_right(on_stand_ins(world_size, given, life), given, life)


def test_a_head_that_errs_too_much_is_told() -> None:
    def short(runtime: Runtime) -> list[Tensor]:
        life = Life(runtime)
        life.add("a", 4 * B, seed=1)
        life.drawn(1, 2, "auto", ["a"])
        return life.outs

    given = config(layout=WIDE, dtype=BF16)
    ours = on_stand_ins(1, given, short)
    assert_right(ours, given, short)
    ours[0][0][1, 3] *= 1.06
    with pytest.raises(AssertionError, match=r"output 0 of rank 0 errs [2-4]\.\d\d times"):
        assert_right(ours, given, short)


@pytest.mark.parametrize("world_size", slow_after(1, [2, 3]))
def test_a_life_with_leases_that_come_and_go(world_size: int) -> None:
    """After every step whatever was fetched in it is leased, as far as there is room."""
    given, admitted = config(lease_entries=3 * B), list[int]()

    def keep(gpu: GpuBackend) -> None:
        before = gpu.pool.leases.key_of.clone()
        admit(gpu.pool, least=1)
        admitted.append(int((gpu.pool.leases.key_of != before).sum()))

    with patch.object(GpuBackend, "keep_leases", keep):
        ours = on_stand_ins(world_size, given, bare)
    assert_right(ours, given, bare)
    assert sum(admitted) > 3 * world_size  # so some made room for others


def test_a_select_carries_the_writes_for_the_attend_after_it() -> None:
    """Straight after a layer's select no message is sent; else one is, and its answer."""

    def work(end: Transport) -> list[int]:
        counts = []
        with Runtime.open(config(), end) as runtime:
            life = Life(runtime)
            life.add("a", 4 * B, seed=1)
            for layer, attends in ((0, 1), (0, 2), (1, 1)):
                runtime.idle_select(layer)
                before = end.counted().messages["attend"]
                for _ in range(attends):
                    runtime.idle_attend(layer)
                counts.append(end.counted().messages["attend"] - before)
            runtime.idle_select(0)
            before = end.counted().messages["attend"]
            runtime.idle_attend(1)
            runtime.idle_select(0)
            runtime.pin("a")
            runtime.idle_attend(0)
            counts.append(end.counted().messages["attend"] - before)
        return counts

    with StandIns(config(), 2):
        assert run_loopback(2, work) == [[0, 1, 0, 2]] * 2


def test_blocks_are_given_up_when_all_have_met() -> None:
    def work(end: Transport) -> list[int]:
        with Runtime.open(config(), end) as runtime:
            life, counts = Life(runtime), []
            for name in ("a", "b"):
                life.add(name, 4 * B, seed=1)
                counts.append(end.counted().messages["meet"])
                runtime.remove_document(name)
                counts.append(end.counted().messages["meet"])
        return counts

    with StandIns(config(), 2):
        assert run_loopback(2, work) == [[0, 1, 1, 2]] * 2


def test_ranks_must_be_at_the_same_layer() -> None:
    def work(end: Transport) -> None:
        with Runtime.open(config(), end) as runtime:
            runtime.idle_attend(end.rank)

    with StandIns(config(), 2), pytest.raises(PeerError, match=r"is at layer .*the same layers"):
        run_loopback(2, work)


def test_a_dropped_block_is_named_with_its_holder() -> None:
    def work(end: Transport) -> str:
        with Runtime.open(config(), end) as runtime:
            life = Life(runtime)
            life.add("a", 4 * B, seed=1)
            if end.rank == 1:
                runtime._world.stores.entries.release(torch.tensor([1]))
            ids = torch.tensor([[0, 2 * B], [0, B + 1]], dtype=torch.int32)
            chosen = runtime.selection(ids, runtime.scope(documents=["a"], queries=2))
            try:
                if end.rank == 0:
                    runtime.attend(1, life.query(2), chosen)
                else:
                    runtime.idle_attend(1)
                    runtime.idle_attend(1)
            except (CoverageError, PeerError) as error:
                return str(error)
        return "nothing"

    with StandIns(config(), 2):
        said = run_loopback(2, work)
    assert said[0].startswith("layer 1: query 1 at rank 1 did not have all entries")
    assert "rank 0 was not served" in said[1]


def test_what_a_step_tells_about_itself() -> None:
    def work(end: Transport) -> dict[str, Any]:
        with Runtime.open(config(), end) as runtime:
            life = Life(runtime, weights=False)
            life.add("a", 4 * B, seed=1)
            assert runtime.explain() == []
            assert runtime.predicted_s() == 0.0
            ids = torch.tensor([[0, B, B + 1, -1]], dtype=torch.int32)  # blocks of rank 0 and 1
            chosen = runtime.selection(ids, runtime.scope(documents=["a"], queries=1))
            for mode in ("always-route", "always-fetch"):
                runtime.attend(0, life.query(1), chosen, mode=mode)
            lines = runtime.explain()
            assert [line.holder for line in lines] == [0, 1]
            assert [line.way for line in lines] == (
                ["LOCAL", "FETCH"] if end.rank == 0 else ["FETCH", "LOCAL"]
            )
            assert runtime.predicted_s() > 0.0
            return runtime.stats()

    with StandIns(config(), 2):
        found = run_loopback(2, work)
    for rank, stats in enumerate(found):
        other = 1 - rank
        assert (stats["steps"], stats["queries"]) == (2, 2)
        assert stats["decisions"][rank] == {"local": 2, "route_a": 0, "route_b": 0, "fetch": 0}
        assert stats["decisions"][other] == {"local": 0, "route_a": 1, "route_b": 0, "fetch": 1}
        away = 2 if other == 1 else 1  # entries of the other rank
        counted = stats["bytes_sent"]
        messages = 2 * 512  # at most, of the exchanges before the steps
        asked, answer = HEADS * 192 * 4 + 4 * away, HEADS * (128 * 4 + 4) + 8 + away * 192 * 4
        assert asked < counted["attend"] < asked + messages
        assert answer < counted["attend-answer"] < answer + messages


def test_what_is_fetched_often_is_local_the_next_time() -> None:
    given = config(lease_entries=2 * B)

    def work(given: RuntimeConfig) -> list[tuple[list[Tensor], list[str]]]:
        def rank(end: Transport) -> tuple[list[Tensor], list[str]]:
            with Runtime.open(given, end) as runtime:
                return leasing(runtime)

        return run_loopback(2, rank)

    wanted = work(replace(given, device="cpu"))
    with StandIns(given, 2):
        found = work(given)
    torch.testing.assert_close(found[0][0], wanted[0][0], rtol=1e-5, atol=1e-5)
    assert found[0][1] == WAYS_OF_LEASING


def test_snapshots_come_back(tmp_path: Any) -> None:
    """What is saved of a pool on a device goes into another one."""
    outs = []
    for at in range(2):
        with StandIns(config(), 1), opened_alone(config()) as runtime:
            life = Life(runtime)
            if at == 0:
                life.add("a", 4 * B + 1, seed=1)
                runtime.snapshot(tmp_path / "saved")
            else:
                runtime.restore(tmp_path / "saved")
                assert all(check.is_sound for check in runtime.verify_copies())
            life.drawn(1, 2, "auto", ["a"])
            outs += life.outs
    assert torch.equal(*outs)
