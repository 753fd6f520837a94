"""What ranks compare before NVSHMEM starts: every refusal names the value and the remedy."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import msgpack
import pytest
import torch.distributed as dist
from ranks import RankPool

pytest.importorskip("triton")

from qroam.runtime.transport import Transport
from qroam.runtime.transport_nvshmem import Facts, gather, refusal

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
            r"rank 0 \(gpu 0 of one\) cannot store .* rank 1 \(gpu 1 of two\): open with put=True",
        ),
        ([RANK, replace(OTHER, reaches=())], "rank 1 .* cannot store .* open with put=True"),
    ],
    ids=["wire", "package", "library", "memory", "host", "reach"],
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
