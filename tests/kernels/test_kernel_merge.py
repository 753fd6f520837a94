"""The merge kernel against `reference.merge` and `reference.apply_sink`, in both launch shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qroam.kernels import reference

pytest.importorskip("triton")
from qroam.kernels.library.merge import merge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def partials(
    num: int, items: int, heads: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """outs (P, N, H, C) and lses (P, N, H); a third of them empty, which hold NaN."""
    g = torch.Generator().manual_seed(seed)
    outs = torch.randn(num, items, heads, columns, generator=g).to(dtype)
    lses = 4 * torch.randn(num, items, heads, generator=g)
    empty = torch.rand(num, items, generator=g) < 0.33
    outs[empty], lses[empty] = math.nan, -INF
    return outs.to(DEVICE), lses.to(DEVICE)


def merged(outs: Tensor, lses: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition in the dtype of `lses`, for stacked partials."""
    item = torch.arange(outs.shape[1], device=outs.device).repeat(len(outs))
    out, lse = reference.merge(
        outs.flatten(0, 1).to(lses.dtype), lses.flatten(0, 1), item, outs.shape[1]
    )
    return (out if sink is None else reference.apply_sink(out, lse, sink.to(lse.dtype))), lse


def buffers(items: int, heads: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """Poisoned outputs."""
    out = torch.full((items, heads, columns), 7e4, dtype=dtype, device=DEVICE)
    return {"out": out, "lse": torch.full((items, heads), 7e4, device=DEVICE)}


def assert_as_good_as_torch(actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of eager torch in fp32, plus one rounding of the result."""
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite].isnan(), exact[~finite].isnan())
    infinite = exact.isinf()
    assert torch.equal(actual.double()[infinite], exact[infinite])
    assert bool(actual[finite].isfinite().all())
    if not bool(finite.any()):
        return
    error = (eager.double() - exact)[finite].abs().max()
    rounding = torch.finfo(actual.dtype).eps * exact[finite].abs().max()
    assert float((actual.double() - exact)[finite].abs().max()) <= 2 * float(error + rounding)


def check(
    got: tuple[Tensor, Tensor], outs: Tensor, lses: Tensor, sink: Tensor | None = None
) -> None:
    eager = merged(outs, lses, sink)
    exact = merged(outs.double(), lses.double(), sink)
    for actual, same, want in zip(got, eager, exact, strict=True):
        assert_as_good_as_torch(actual, same, want)


@pytest.mark.parametrize("num", [0, 1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dense(num: int, dtype: str) -> None:
    outs, lses = partials(num, 3, 2, 64, FLOATS[dtype], seed=num)
    got = merge(outs, lses, **buffers(3, 2, 64, torch.float32))
    check(got, outs, lses)


@pytest.mark.parametrize(("heads", "columns"), [(1, 512), (3, 512), (16, 128), (24, 96), (8, 1)])
def test_shapes(heads: int, columns: int) -> None:
    outs, lses = partials(4, 1, heads, columns, torch.float32)
    check(merge(outs, lses, **buffers(1, heads, columns, torch.float32)), outs, lses)


def listed(counts: list[int], heads: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A list of partials (outs, lses, offsets, item) whose capacity beyond the counts is NaN."""
    total = sum(counts)
    outs, lses = partials(1, total + 3, heads, columns, torch.float32)
    outs, lses = outs[0], lses[0]
    outs[total:] = lses[total:] = math.nan
    offsets = torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)
    item = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(DEVICE)
    return outs, lses, offsets, item


@pytest.mark.parametrize("counts", [[0], [1], [0, 4, 1, 0, 9, 2], [5] * 3, [65, 0, 1]])
def test_list(counts: list[int]) -> None:
    outs, lses, offsets, item = listed(counts, 3, 32)
    got = merge(outs, lses, offsets=offsets, **buffers(len(counts), 3, 32, torch.float32))
    outs, lses = outs[: len(item)], lses[: len(item)]
    eager = reference.merge(outs, lses, item, len(counts))
    exact = reference.merge(outs.double(), lses.double(), item, len(counts))
    for actual, same, want in zip(got, eager, exact, strict=True):
        assert_as_good_as_torch(actual, same, want)


@pytest.mark.parametrize("in_use", [0, 1, 4])
def test_items_beyond_the_count_are_not_touched(in_use: int) -> None:
    outs, lses, offsets, _ = listed([2, 1, 0, 3], 3, 32)
    offsets[in_use + 1 :] = 2**30
    num_items = torch.tensor([in_use], dtype=torch.int32, device=DEVICE)
    given = buffers(4, 3, 32, torch.float32)
    out, lse = merge(outs, lses, offsets=offsets, num_items=num_items, **given)
    assert bool((out[in_use:] == 7e4).all())
    assert bool((lse[in_use:] == 7e4).all())
    assert bool((lse[:in_use] != 7e4).all())
    assert bool((out[:in_use] != 7e4).all())


@pytest.mark.parametrize("empty", [math.nan, INF, -INF, 1e38])
def test_an_empty_partial_cannot_leak(empty: float) -> None:
    outs, lses = partials(4, 2, 3, 64, torch.float32)
    clean = merge(outs, lses)
    outs[lses == -INF] = empty
    for got, want in zip(merge(outs, lses), clean, strict=True):
        assert torch.equal(got, want)
    out, lse = merge(outs, torch.full_like(lses, -INF))
    assert bool((out == 0).all())
    assert bool((lse == -INF).all())


@pytest.mark.parametrize("position", [0, 3, 4, 5])
def test_nan_is_not_lost(position: int) -> None:
    """Also where another partial's lse is so much larger that the share is 0."""
    outs, lses = partials(6, 2, 3, 64, torch.float32)
    outs, lses = outs.nan_to_num(0.5), lses.clamp_min(-5.0)
    lses[(position + 1) % 6] += 300.0
    good = merge(outs, lses)
    in_out, in_lse = outs.clone(), lses.clone()
    in_out[position, 1, 2, 9] = math.nan
    out, _ = merge(in_out, lses)
    assert bool(out[1, 2, 9].isnan())
    assert int(out.isnan().sum()) == 1
    in_lse[position, 0, 1] = math.nan
    out, lse = merge(outs, in_lse)
    assert bool(out[0, 1].isnan().all())
    assert bool(lse[0, 1].isnan())
    assert torch.equal(out[1], good[0][1])
    assert int(lse.isnan().sum()) == 1


@pytest.mark.parametrize("dense", [True, False])
def test_sink(dense: bool) -> None:
    outs, lses = partials(3, 4, 5, 64, torch.float32)
    sink = torch.tensor([0.0, 3.0, -3.0, 200.0, -200.0], device=DEVICE)
    if dense:
        check(merge(outs, lses, sink=sink), outs, lses, sink)
    else:
        offsets = torch.arange(0, 13, 3, dtype=torch.int32, device=DEVICE)
        by_item = outs.transpose(0, 1).flatten(0, 1), lses.transpose(0, 1).flatten(0, 1)
        check(merge(*by_item, offsets=offsets, sink=sink), outs, lses, sink)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("column", "heads"), [(0, 5), (1, 1)])
def test_a_difference_in_coverage_poisons_the_item(dense: bool, column: int, heads: int) -> None:
    outs, lses = partials(6, 3, heads, 64, torch.float32)
    g = torch.Generator().manual_seed(3)
    expected = torch.randint(-(2**31), 2**31 - 1, (6, 3, 2), generator=g).int().to(DEVICE)
    covered = expected.clone()
    covered[[1, 4], 2, column] ^= -(2**31)
    given: dict[str, Any] = {}
    if not dense:
        outs, lses, expected, covered = (
            t.transpose(0, 1).flatten(0, 1).contiguous() for t in (outs, lses, expected, covered)
        )
        given["offsets"] = torch.arange(0, 19, 6, dtype=torch.int32, device=DEVICE)
    clean = merge(outs, lses, **given)
    fault = torch.full((3,), -7, dtype=torch.int32, device=DEVICE)
    out, lse = merge(outs, lses, covered=covered, expected=expected, fault=fault, **given)
    assert fault.tolist() == [0, 0, 1 + (4 if dense else 2 * 6 + 4)]
    assert bool(out[2].isnan().all())
    assert bool(lse[2].isnan().all())
    assert torch.equal(out[:2], clean[0][:2])
    assert torch.equal(lse[:2], clean[1][:2])


def test_windows_with_padding_between_the_rows() -> None:
    """A partial on the wire: out, lse and coverage side by side in one record."""
    outs, lses = partials(4, 3, 2, 32, torch.float32)
    record = torch.full((4, 3, 2 * 32 + 8), math.nan, device=DEVICE)
    record[..., :64], record[..., 64:66] = outs.flatten(2), lses
    covered = record.view(torch.int32)[..., 66:68]
    covered[:] = torch.arange(24, dtype=torch.int32, device=DEVICE).view(4, 3, 2)
    window = record[..., :64].unflatten(2, (2, 32))
    fault = torch.full((3,), -7, dtype=torch.int32, device=DEVICE)
    got = merge(
        window, record[..., 64:66], covered=covered, expected=covered.contiguous(), fault=fault
    )
    for actual, want in zip(got, merge(outs, lses), strict=True):
        # Loads of another width may give the sum another order.
        torch.testing.assert_close(actual, want, rtol=1e-6, atol=1e-6)
    assert fault.tolist() == [0, 0, 0]


def test_of_nothing() -> None:
    outs, lses = partials(4, 0, 2, 32, torch.float32)
    out, lse = merge(outs, lses)
    assert (out.shape, lse.shape) == ((0, 2, 32), (0, 2))


def test_bad_arguments() -> None:
    outs, lses = partials(4, 3, 2, 32, torch.float32)
    offsets = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    count = torch.zeros(3, 2, dtype=torch.int32, device=DEVICE)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("outs must be", {"outs": outs[0]}),
        ("outs must be", {"offsets": offsets}),
        ("bf16, fp16 or fp32", {"outs": outs.double()}),
        ("contiguous", {"outs": outs.mT.contiguous().mT}),
        ("value columns", {"outs": outs.new_zeros(4, 3, 2, 4096)}),
        ("lses", {"lses": lses[:, :2]}),
        ("lses", {"lses": lses.double()}),
        ("lses must have contiguous columns", {"lses": lses.mT.contiguous().mT}),
        ("go together", {"covered": count}),
        ("covered", {"covered": count, "expected": count, "fault": count[:, 0]}),
        ("sink", {"sink": torch.zeros(3, device=DEVICE)}),
        ("num_items", {"num_items": count}),
        ("out must be", {"out": outs[0, :2]}),
        ("out must be", {"out": outs[0].double()}),
        ("lse must be", {"lse": lses[0].double()}),
    ]
    for message, change in cases:
        given = {"outs": outs, "lses": lses} | change
        with pytest.raises(ValueError, match=message):
            merge(**given)
    with pytest.raises(ValueError, match="offsets must be"):
        merge(outs[0], lses[0], offsets=offsets.long())
    with pytest.raises(ValueError, match="offsets must be"):
        merge(outs[0], lses[0], offsets=offsets.view(2, 2))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("num", [1, 2, 4, 8, 33])
def test_full_size(num: int, dtype: str, out_dtype: str) -> None:
    outs, lses = partials(num, 64, 128, 512, FLOATS[dtype], seed=num)
    sink = torch.randn(128, device=DEVICE)
    for given in (None, sink):
        got = merge(outs, lses, sink=given, **buffers(64, 128, 512, FLOATS[out_dtype]))
        check(got, outs, lses, given)
        again = merge(outs, lses, sink=given, **buffers(64, 128, 512, FLOATS[out_dtype]))
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_replay_follows_the_counts_on_the_device() -> None:
    outs, lses, offsets, _ = listed([2, 1, 0, 3], 128, 512)
    num_items = torch.tensor([4], dtype=torch.int32, device=DEVICE)
    given = buffers(4, 128, 512, torch.float32)
    merge(outs, lses, offsets=offsets, num_items=num_items, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merge(outs, lses, offsets=offsets, num_items=num_items, **given)
    for counts, used in (([1, 2, 0, 3], 4), ([0, 0, 6, 0], 3), ([6, 0, 0, 0], 0)):
        offsets.copy_(torch.tensor([0, *counts]).cumsum(0).int())
        num_items.fill_(used)
        given["out"].fill_(7e4)
        graph.replay()
        fresh = buffers(4, 128, 512, torch.float32)
        want = merge(outs, lses, offsets=offsets, num_items=num_items, **fresh)
        assert torch.equal(given["out"][:used], want[0][:used])
        assert bool((given["out"][used:] == 7e4).all())


@pytest.mark.parametrize(
    ("offsets", "match"), [([0, 3, 2], "must rise"), ([0, 2, 5], "offsets must be below 5, got 5")]
)
def test_checked_offsets_are_read_back(offsets: list[int], match: str) -> None:
    outs, lses = torch.zeros(4, 1, 16, device=DEVICE), torch.zeros(4, 1, device=DEVICE)
    given = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=match):
        merge(outs, lses, offsets=given, checked=True)
    merge(
        outs, lses, offsets=torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE), checked=True
    )
