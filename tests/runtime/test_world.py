"""Opening and closing a world, idle ranks, and ranks that do not do the same."""

from __future__ import annotations

import dense
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
    TOKENS,
    WEIGHTS,
    B,
    Bench,
    D,
    Q,
    config,
    numbers,
)

from qroam.partition.placement import Placement
from qroam.runtime import LoopbackTransport, PeerError, Runtime
from qroam.runtime.transport.base import Transport


def test_more_copies_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 copies need as many ranks"):
        Runtime.open(config(placement=Placement(copies=2)))


def test_a_rank_without_room_says_so() -> None:
    with Runtime.open(config(corpus_slots=3)) as runtime:
        runtime.add_document("a", tokens=2 * B)
        with pytest.raises(ValueError, match=r"rank 0 would hold 4 .* its pool has 3"):
            runtime.add_document("b", tokens=2 * B)
        runtime.add_document("b", tokens=B)


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
