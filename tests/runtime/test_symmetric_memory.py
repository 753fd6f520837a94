"""What ranks compare before NVSHMEM starts: every refusal names the value and the remedy."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import patch

import msgpack
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool

pytest.importorskip("triton")

from qroam.kernels.exchange.layout import Wire
from qroam.runtime.gpu import symmetric_memory
from qroam.runtime.gpu.symmetric_memory import Facts, SymmetricMemory, gather, refusal
from qroam.runtime.transport.base import Transport

GIB = 1 << 30
RANK = Facts(
    wires=("rows=8",),
    heap=0,
    incarnation=1,
    put=False,
    libnvshmem="3.4.5",
    nvshmem4py="0.3.1",
    triton="3.6.0",
    host="one",
    device="gpu 0",
    reaches=("gpu 1",),
    free_bytes=8 * GIB,
)
OTHER = replace(RANK, device="gpu 1", reaches=("gpu 0",))


def test_ranks_that_fit_are_not_refused() -> None:
    assert refusal([RANK, OTHER], 4 * GIB) is None


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        (
            [RANK, replace(OTHER, wires=("rows=9",))],
            r"rank 1 has wires=\('rows=9',\), rank 0 has \('rows=8',\)",
        ),
        ([RANK, replace(OTHER, triton="3.7.0")], "rank 1 has triton=3.7.0, rank 0 has 3.6.0"),
        (
            [replace(rank, libnvshmem="3.8.0") for rank in (RANK, OTHER)],
            r"libnvshmem is 3.8.0, qroam needs 3.4 up to below 3.7: install nvidia-nvshmem-cu13==3.4",
        ),
        (
            [RANK, replace(OTHER, free_bytes=4 * GIB)],
            f"rank 1 has {4 * GIB} bytes of device memory free, arena and pool take {4 * GIB}",
        ),
        (
            [RANK, replace(OTHER, host="two")],
            r"rank 0 \(gpu 0 of one\) cannot store .* rank 1 \(gpu 1 of two\): .* open with put=True",
        ),
        ([RANK, replace(OTHER, reaches=())], "rank 1 .* cannot store .*CUDA_VISIBLE_DEVICES"),
        (
            [RANK, replace(OTHER, device="gpu 0")],
            "ranks 0 and 1 have the same GPU, gpu 0 of one: each must open with one of its own",
        ),
        ([RANK, replace(OTHER, heap=7)], "rank 1 has heap=7, rank 0 has 0: .* equal wires, heaps"),
        ([RANK, replace(OTHER, incarnation=2)], "rank 1 has incarnation=2, rank 0 has 1"),
        ([RANK, replace(OTHER, put=True)], "rank 1 has put=True, rank 0 has False"),
        ([replace(rank, libnvshmem="3.3.9") for rank in (RANK, OTHER)], "libnvshmem is 3.3.9"),
    ],
    ids=[
        "wire",
        "package",
        "library",
        "memory",
        "host",
        "reach",
        "same GPU",
        "heap",
        "incarnation",
        "put",
        "older library",
    ],
)
def test_refusals_name_value_and_remedy(ranks: list[Facts], says: str) -> None:
    reason = refusal(ranks, 4 * GIB)
    assert reason is not None
    assert re.search(says, reason), reason


def test_other_hosts_are_reached_by_put() -> None:
    ranks = [replace(RANK, put=True), replace(OTHER, put=True, host="two", reaches=())]
    assert refusal(ranks, 4 * GIB) is None


def test_facts_are_read_as_they_were_written() -> None:
    assert RANK.read(1, OTHER.encoded()) == OTHER


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xc1",
        b"\x80",
        b"\x93\x01\x02\x03",
        OTHER.encoded()[:-1],
        msgpack.packb({**asdict(RANK), "free_bytes": "much"}),
    ],
)
def test_whoever_says_something_else_is_named(said: bytes) -> None:
    with pytest.raises(ValueError, match="rank 3 sent"):
        RANK.read(3, said)


def say(transport: Transport, lengths: list[int]) -> list[int]:
    group = dist.group.WORLD
    assert group is not None
    said = gather(bytes([transport.rank]) * lengths[transport.rank], group)
    assert all(set(text) <= {rank} for rank, text in enumerate(said))
    return [len(text) for text in said]


def test_everyone_hears_what_everyone_says(four_ranks: RankPool) -> None:
    lengths = [0, 1, 1 << 14, 128]
    assert four_ranks.run(say, lengths) == [lengths] * 4


WIRE = {"rows": 4, "heads": 4, "query_words": 48, "answer_words": 32, "units": 8}
GPU = torch.device("cuda", 0)


def refused(
    transport: Transport, culprit: int, wire: dict[str, Any], options: dict[str, Any]
) -> str:
    """What a rank says where one of them opens with other options, and nobody has a GPU."""
    group = dist.group.WORLD
    assert group is not None
    ours = transport.rank == culprit
    wires = [Wire(**WIRE | {"world_size": transport.world_size} | (wire if ours else {}))]
    given = {"device": GPU} | (options if ours else {})
    try:
        SymmetricMemory(wires, group=group, **given)
    except ValueError as error:
        return str(error)
    return "it opened"


@pytest.mark.parametrize(
    ("wire", "options", "says"),
    [
        ({"world_size": 3}, {}, "rank 0: ValueError: a wire of 3 ranks, staged False: here are 4"),
        ({"staged": True}, {}, "rank 0: ValueError: a wire of 4 ranks, staged True"),
        ({}, {"incarnation": 0}, "rank 0: ValueError: incarnation 0 of 1 channels"),
        ({}, {"device": torch.device("cpu")}, "rank 0: ValueError: needs a CUDA device .* got cpu, 2"),
        ({}, {"deadline_s": 0.0}, "rank 0: ValueError: needs a CUDA device .*, 0.0 s"),
        ({}, {"heap": -1}, "rank 0: ValueError: heap must not be negative, got -1"),
        pytest.param(
            {}, {}, "rank 0: ValueError: cuda:0 was asked for, and torch finds no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU"),
        ),
    ],
    ids=["world", "staged", "incarnation", "device", "deadline", "heap", "no GPU"],
)  # fmt: skip
def test_all_ranks_refuse_what_one_cannot(
    four_ranks: RankPool, wire: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    said = four_ranks.run(refused, 0, wire, options)
    assert len(set(said)) == 1
    assert re.match(says, said[0]), said[0]


def test_a_package_that_one_rank_lacks_is_told_to_all(four_ranks: RankPool) -> None:
    said = four_ranks.run(without_library, 2)
    assert set(said) == {"rank 2: ImportError: No module named 'nvshmem'"}


def without_library(transport: Transport, culprit: int) -> str:
    """As `refused`, where torch seems to have a GPU, and the other ranks would have the library."""

    def library() -> None:
        if transport.rank == culprit:
            raise ImportError("No module named 'nvshmem'")

    with (
        patch.object(torch.cuda, "is_available", lambda: True),
        patch.object(torch.cuda, "set_device"),
        patch.object(torch.cuda, "init"),
        patch.object(symmetric_memory, "_library", library),
        patch.object(symmetric_memory, "_facts", lambda *facts, **more: RANK),
    ):
        return refused(transport, culprit, {}, {})
