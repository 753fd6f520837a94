"""The gather kernel moves bytes: everything is compared with torch's indexing, bitwise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from qroam.kernels.gather import gather

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def random_bytes(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=g, dtype=torch.uint8).to(DEVICE)


def random_index(num: int, below: int, *, padding: float = 0.3, seed: int = 1) -> Tensor:
    """(num,) int32 with repeats, and -1 anywhere."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(below, (num,), generator=g)
    return torch.where(torch.rand(num, generator=g) < padding, -1, index).int().to(DEVICE)


def expected(rows: Tensor, index: Tensor, before: Tensor, count: int | None = None) -> Tensor:
    used = index >= 0
    used[count:] &= count is None
    out = before.clone()
    out[used] = rows[index[used].long()]
    return out


@pytest.mark.parametrize("entry_bytes", [1152, 656, 132, 4, 16, 20])
@pytest.mark.parametrize("num", [0, 1, 63, 64, 65])
def test_entries(entry_bytes: int, num: int) -> None:
    rows, index = random_bytes(100, entry_bytes), random_index(num, 100)
    before = random_bytes(num, entry_bytes, seed=2)
    out = before.clone()
    assert gather(rows, index, out=out) is out
    assert torch.equal(out, expected(rows, index, before))


def test_all_padding_and_no_padding() -> None:
    rows = random_bytes(10, 656)
    before = random_bytes(7, 656, seed=2)
    nothing = torch.full((7,), -1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(gather(rows, nothing, out=before.clone()), before)
    index = random_index(65, 10, padding=0)
    assert torch.equal(gather(rows, index), rows[index.long()])


@pytest.mark.parametrize("count", [0, 1, 64, 65])
def test_rows_beyond_the_count_are_not_touched(count: int) -> None:
    rows, index = random_bytes(100, 656), random_index(65, 100)
    before = random_bytes(65, 656, seed=2)
    want = expected(rows, index, before, count)
    index[count:] = 2**30  # would be a read far out of bounds
    on_device = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    assert torch.equal(gather(rows, index, count=on_device, out=before.clone()), want)


def test_whole_blocks() -> None:
    pool = random_bytes(5, 64 * 132)
    index = random_index(4, 5, padding=0)
    assert torch.equal(gather(pool, index), pool[index.long()])


def test_query_rows_keep_shape_and_dtype() -> None:
    query = random_bytes(6, 4 * 72 * 2).view(torch.bfloat16).view(6, 4, 72)
    query[2, 1, 3] = math.nan
    index = random_index(9, 6, padding=0)
    packed = gather(query, index)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(packed.view(torch.int16), query[index.long()].view(torch.int16))


@pytest.mark.parametrize(
    ("distance", "offset"), [(672, 16), (672, 4), (660, 4), (656, 0), (664, 8)]
)
def test_rows_with_space_between_them(distance: int, offset: int) -> None:
    store = random_bytes(20, distance)
    rows = store.flatten()[offset : offset + 19 * distance].view(19, distance)[:, :640]
    index = random_index(30, 19)
    before = random_bytes(31, distance + 32, seed=2)
    out = before.clone()
    gather(rows, index, out=out[1:, :640])
    want = before.clone()
    want[1:, :640] = expected(rows, index, before[1:, :640])
    assert torch.equal(out, want)


def test_bad_arguments() -> None:
    rows, index = random_bytes(10, 656), random_index(5, 10)
    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("index must be", {"index": index.long()}),
        ("index must be", {"index": index[None]}),
        ("index must be", {"index": index[::2]}),
        ("count must be", {"count": count.long()}),
        ("count must be", {"count": index}),
        ("out must be", {"out": rows}),
        ("out must be", {"out": rows[:5].view(torch.int32)}),
        ("multiple of 4", {"rows": rows[:, :655]}),
        ("multiple of 4", {"rows": rows[:0]}),
        ("contiguous", {"rows": rows.view(torch.int32)[:, ::2]}),
        ("begin at multiples", {"rows": rows.flatten()[2 : 2 + 6552].view(9, 728)}),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            gather(**{"rows": rows, "index": index, "count": count} | change)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("num", [2048, 64 * 2048])
@pytest.mark.parametrize("entry_bytes", [1152, 656, 132])
def test_full_size(num: int, entry_bytes: int) -> None:
    rows, index = random_bytes(262144, entry_bytes), random_index(num, 262144)
    before = random_bytes(num, entry_bytes, seed=2)
    assert torch.equal(gather(rows, index, out=before.clone()), expected(rows, index, before))


@pytest.mark.gpu
@needs_gpu
def test_replay_follows_the_count_on_the_device() -> None:
    rows, index = random_bytes(4096, 656), random_index(2048, 4096)
    before = random_bytes(2048, 656, seed=2)
    out, count = before.clone(), torch.tensor([2048], dtype=torch.int32, device=DEVICE)
    gather(rows, index, count=count, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gather(rows, index, count=count, out=out)
    for used in (0, 1, 1000, 2048):
        count.fill_(used)
        out.copy_(before)
        graph.replay()
        assert torch.equal(out, expected(rows, index, before, used))


def test_checked_ids_are_read_back() -> None:
    rows = torch.zeros(4, 8, dtype=torch.int32, device=DEVICE)
    index = torch.tensor([0, -1, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="index must be below 4, got 4"):
        gather(rows, index, checked=True)
    used = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    gather(rows, index, count=used, checked=True)
