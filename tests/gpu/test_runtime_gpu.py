"""`Runtime` with its entries on GPUs against the same life on CPUs: every placement, mode and rank.

In bf16 its outputs err, against fp64, at most twice what eager torch errs (`gpu_world.assert_right`).
With two GPUs each rank is a process, in a world of its own for every test.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_world import (
    BF16,
    LAYOUT,
    MODES,
    WAYS_OF_LEASING,
    WIDE,
    B,
    Life,
    assert_right,
    config,
    eighths,
    leasing,
    live,
    numbers,
)
from ranks import RankPool
from torch import Tensor

from qroam.partition.layout import Layout
from qroam.partition.placement import Placement
from qroam.partition.presets import with_codec
from qroam.runtime import CoverageError, LoopbackTransport, PeerError, Runtime, RuntimeConfig
from qroam.runtime.cost.predicate import Mode
from qroam.runtime.transport.base import Transport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def on_gpu(transport: Transport, given: RuntimeConfig) -> list[Tensor]:
    """A rank's life, on the GPU of its number."""
    torch.cuda.set_device(transport.rank)
    with Runtime.open(given, transport) as runtime:
        return live(runtime)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(LAYOUT, torch.float32), (WIDE, BF16), (with_codec(WIDE, "bf16"), BF16)],
    ids=["fp32", "fp8", "bf16"],
)
def test_a_life_alone(layout: Layout, dtype: torch.dtype) -> None:
    given = config(layout=layout, dtype=dtype)
    ours = [on_gpu(LoopbackTransport.world(1)[0], given)]
    assert_right(ours, given, live)


def alone_inside(state: Callable[[], AbstractContextManager[object]]) -> list[Tensor]:
    """What comes out of a life of one rank, each call made inside of a state of its own."""
    entries, query = numbers(3 * B, 192, seed=1), numbers(3, 4, 192, seed=2)
    keys, index_query = eighths(numbers(3 * B, 64, seed=3)), eighths(numbers(3, 4, 64, seed=4))
    weights, outs = numbers(3, 4, seed=5).abs(), list[Tensor]()
    with state():
        runtime = Runtime.open(config(), LoopbackTransport.world(1)[0])
    with state():
        runtime.add_document("d", tokens=3 * B)
        for layer in range(2):
            runtime.load_document("d", layer, entries, keys)
    for mode in MODES:
        with state():
            chosen = runtime.select(0, index_query, weights, documents=["d"])
            outs += [chosen.ids, runtime.attend(0, query, chosen, mode=mode)]
    with state():
        attend = torch.compile(runtime.attend, backend="eager")
        outs.append(attend(0, query, chosen))
        runtime.idle_attend(0)
        runtime.close()
    return outs


@pytest.mark.parametrize(
    "state",
    [
        lambda: torch.autocast("cuda", dtype=torch.float16),
        lambda: torch.device("cuda"),
        torch.inference_mode,
    ],
    ids=["autocast", "default device", "inference mode"],
)
def test_the_state_of_the_caller_stays_outside(
    state: Callable[[], AbstractContextManager[object]],
) -> None:
    for plain, found in zip(alone_inside(nullcontext), alone_inside(state), strict=True):
        assert (found.device, found.dtype) == (plain.device, plain.dtype)
        assert torch.equal(found, plain)


@two_gpus
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"placement": Placement(copies=2)},
        {"placement": Placement(policy="contiguous"), "corpus_slots": 24},
        {"placement": Placement(policy="document-affine"), "corpus_slots": 24},
        {"index_placement": "replicated", "max_queries": 32},
        {"layout": WIDE, "dtype": BF16},
        {"lease_entries": 4 * B},
        {"buckets": (1, 2)},
        {"buckets": (1, 2), "layout": WIDE, "dtype": BF16},
    ],
    ids=[
        "cyclic",
        "copies",
        "contiguous",
        "affine",
        "replicated index, many rows",
        "fp8",
        "leases",
        "buckets",
        "buckets, fp8",
    ],
)
def test_a_life_of_two(tmp_path: Path, changes: dict[str, Any]) -> None:
    given = config(**changes)
    with RankPool(2, tmp_path) as pool:
        ours = pool.run(on_gpu, given)
    assert_right(ours, given, live)


def leasing_on_gpu(transport: Transport, given: RuntimeConfig) -> tuple[list[Tensor], list[str]]:
    torch.cuda.set_device(transport.rank)
    with Runtime.open(given, transport) as runtime:
        return leasing(runtime)


@two_gpus
@pytest.mark.parametrize("changes", [{}, {"layout": WIDE, "dtype": BF16}], ids=["fp32", "fp8"])
def test_what_is_fetched_often_is_local_the_next_time(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    given = config(lease_entries=2 * B, **changes)
    with RankPool(2, tmp_path) as pool:
        (outs, ways), (idle, _) = pool.run(leasing_on_gpu, given)
    assert ways == WAYS_OF_LEASING
    assert_right([outs, idle], given, lambda runtime: leasing(runtime)[0])


def with_a_lost_block(transport: Transport, mode: Mode) -> str:
    """Rank 0 asks for a block that rank 1 has dropped; what each of them hears."""
    torch.cuda.set_device(transport.rank)
    with Runtime.open(config(), transport) as runtime:
        life = Life(runtime)
        life.add("a", 4 * B, seed=1)
        life.drawn(1, 2, mode, ["a"])
        if transport.rank == 1:
            runtime._world.stores.entries.release(torch.tensor([1]))
        ids = torch.tensor([[0, 2 * B], [0, B + 1]], dtype=torch.int32)
        chosen = runtime.selection(ids, runtime.scope(documents=["a"], queries=2))
        try:
            if transport.rank == 0:
                runtime.attend(1, life.query(2), chosen, mode=mode)
            else:
                runtime.idle_attend(1)
                runtime.idle_attend(1)
        except (CoverageError, PeerError) as error:
            return str(error)
    return "nothing"


@two_gpus
@pytest.mark.parametrize("mode", MODES)
def test_a_dropped_block_is_named_with_its_holder(tmp_path: Path, mode: Mode) -> None:
    with RankPool(2, tmp_path) as pool:
        said = pool.run(with_a_lost_block, mode)
    assert said[0].startswith("layer 1: query 1 at rank 1 did not have all entries")
    assert "rank 0 was not served" in said[1]


def with_a_silent_rank(transport: Transport) -> str:
    """Both select, and rank 1 does not attend."""
    torch.cuda.set_device(transport.rank)
    with Runtime.open(config(deadline_s=4.0), transport) as runtime:
        Life(runtime).add("a", 4 * B, seed=1)
        runtime.idle_select(0)
        try:
            if transport.rank == 0:
                runtime.idle_attend(0)
            else:
                runtime.idle_select(0)
        except PeerError as error:
            return str(error)
    return "nothing"


@two_gpus
def test_a_silent_rank_is_named(tmp_path: Path) -> None:
    with RankPool(2, tmp_path) as pool:
        said = pool.run(with_a_silent_rank)
    assert said[0] == "rank 1: no answer within 4 s"
    assert said[1].startswith("rank ")


def on_the_same_gpu(transport: Transport) -> str:
    torch.cuda.set_device(0)
    try:
        Runtime.open(config(), transport)
    except ValueError as error:
        return str(error)
    return "opened"


@two_gpus
def test_ranks_need_gpus_of_their_own(tmp_path: Path) -> None:
    with RankPool(2, tmp_path) as pool:
        said = pool.run(on_the_same_gpu)
    assert all(text.startswith("ranks 0 and 1 have the same GPU") for text in said)
