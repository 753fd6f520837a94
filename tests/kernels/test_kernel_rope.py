"""The rotation kernel against `partition/rope.py`, which the models' keys are made with."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from qroam.partition.rope import apply_rope, rope_tables

pytest.importorskip("triton")
from qroam.kernels.rope import inverse_frequencies, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
Pairing = Literal["interleaved", "half"]
PAIRINGS: list[Pairing] = ["interleaved", "half"]
THETA = 10000.0


def entries(layers: int, stored: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(layers, stored, columns, generator=g).to(dtype).to(DEVICE)


def listed(num: int, stored: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """index (N,) of distinct entries with -1 anywhere, offset (N,) of either sign."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(stored, generator=g)[:num]
    index = torch.where(torch.rand(num, generator=g) < 0.3, -1, index).int()
    offset = torch.randint(-70_000, 70_000, (num,), generator=g).int()
    return index.to(DEVICE), offset.to(DEVICE)


def rotated(
    rope: Tensor,
    index: Tensor,
    offset: Tensor,
    pairing: Pairing,
    dtype: torch.dtype,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """(L, S, R): the definition, with the angles that models compute, computed with in `dtype`."""
    out = rope.clone() if dtype == torch.float32 else rope.to(dtype)
    for layer in range(len(rope)):
        here = (index if index.dim() == 1 else index[layer]) >= 0
        if not bool(here.any()):
            continue
        places = (index if index.dim() == 1 else index[layer])[here].long()
        if inv_freq is None:
            cos, sin = rope_tables(offset[here], rope.shape[2], THETA, torch.float32)
        else:
            angles = offset[here].float()[:, None] * inv_freq
            cos, sin = angles.cos(), angles.sin()
        x = rope[layer, places].to(dtype)
        turned = apply_rope(x, cos.to(dtype), sin.to(dtype), pairing=pairing)
        out[layer, places] = turned.to(out.dtype)
    return out


def check(
    actual: Tensor,
    before: Tensor,
    index: Tensor,
    offset: Tensor,
    pairing: Pairing,
    inv_freq: Tensor | None = None,
) -> None:
    """What is not listed is bitwise the same; the rest errs at most twice as much as eager torch.

    The interpreter cuts off when it stores bf16, which costs it one more rounding.
    """
    exact = rotated(before, index, offset, pairing, torch.float64, inv_freq)
    eager = rotated(before.float(), index, offset, pairing, torch.float32, inv_freq)
    eager = eager.to(before.dtype)
    touched = torch.zeros(before.shape[:2], dtype=torch.bool, device=DEVICE)
    for layer, places in enumerate(index if index.dim() == 2 else [index] * len(before)):
        touched[layer, places[places >= 0].long()] = True
    assert torch.equal(actual[~touched], before[~touched])
    if not bool(touched.any()):
        return
    error = float((eager.double() - exact)[touched].abs().max())
    rounding = torch.finfo(before.dtype).eps * float(exact[touched].abs().max())
    assert float((actual.double() - exact)[touched].abs().max()) <= 2 * error + rounding


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num", [0, 1, 63, 64, 65])
def test_bf16_and_fp32_entries(num: int, dtype: str, pairing: Pairing) -> None:
    pool = entries(3, 80, 576, FLOATS[dtype])
    before = pool.clone()
    index, offset = listed(num, 80)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    rotate(pool[..., -64:], index, offset, inv_freq, pairing=pairing)
    assert torch.equal(pool[..., :-64], before[..., :-64])
    check(pool[..., -64:], before[..., -64:], index, offset, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_rows_of_656_bytes(pairing: Pairing) -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (2, 40, 656), generator=g, dtype=torch.uint8).to(DEVICE)
    rows.view(torch.bfloat16)[..., -64:] = entries(2, 40, 64, torch.bfloat16)
    before = rows.clone()
    index, offset = listed(33, 40)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    rotate(rows.view(torch.bfloat16)[..., -64:], index, offset, inv_freq, pairing=pairing)
    assert torch.equal(rows[..., :528], before[..., :528])
    was, is_now = (r.view(torch.bfloat16)[..., -64:] for r in (before, rows))
    check(is_now, was, index, offset, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("dim", [2, 6, 32, 96, 128])
def test_other_widths(dim: int, pairing: Pairing) -> None:
    pool = entries(2, 20, dim + 3, torch.float32)
    before = pool.clone()
    index, offset = listed(17, 20)
    inv_freq = inverse_frequencies(dim, THETA, DEVICE)
    rotate(pool[..., -dim:], index, offset, inv_freq, pairing=pairing)
    assert torch.equal(pool[..., :3], before[..., :3])
    check(pool[..., -dim:], before[..., -dim:], index, offset, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("reverse", [True, False])
def test_a_row_without_space_behind_it(reverse: bool, pairing: Pairing) -> None:
    """Three pairs fill a tile of four: the fourth would write to the next entry."""
    pool = entries(1, 9, 6, torch.float32)
    before = pool.clone()
    index = torch.arange(9, dtype=torch.int32, device=DEVICE)
    index = index.flip(0) if reverse else index
    index[4] = -1
    offset = 5 + torch.arange(9, dtype=torch.int32, device=DEVICE)
    rotate(pool, index, offset, inverse_frequencies(6, THETA, DEVICE), pairing=pairing)
    check(pool, before, index, offset, pairing)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_another_place_in_every_layer(pairing: Pairing) -> None:
    pool = entries(4, 50, 64, torch.float32)
    before = pool.clone()
    index = torch.stack([listed(40, 50, seed)[0] for seed in range(4)])
    offset = listed(40, 50)[1]
    rotate(pool, index, offset, inverse_frequencies(64, THETA, DEVICE), pairing=pairing)
    check(pool, before, index, offset, pairing)


@pytest.mark.parametrize("count", [0, 1, 64, 65])
def test_entries_beyond_the_count_are_not_touched(count: int) -> None:
    pool = entries(2, 80, 64, torch.float32)
    before = pool.clone()
    index, offset = listed(65, 80)
    want = index.clone()
    want[count:] = -1
    index[count:] = 2**30
    on_device = torch.tensor([count], dtype=torch.int32, device=DEVICE)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    rotate(pool, index, offset, inv_freq, pairing="half", count=on_device)
    check(pool, before, want, offset, "half")


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_given_frequencies(pairing: Pairing) -> None:
    """YaRN: some frequencies are divided by a factor."""
    pool = entries(2, 20, 64, torch.float32)
    before = pool.clone()
    index, offset = listed(17, 20)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    inv_freq[10:] /= 40
    rotate(pool, index, offset, inv_freq, pairing=pairing)
    check(pool, before, index, offset, pairing, inv_freq)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_moving_a_key_is_caching_it_elsewhere(pairing: Pairing) -> None:
    key = entries(1, 30, 64, torch.float32)
    position, offset = torch.arange(30), torch.arange(30) * 7 - 50
    cached = apply_rope(
        key[0].cpu(), *rope_tables(position, 64, THETA, torch.float32), pairing=pairing
    )
    want = apply_rope(
        key[0].cpu(), *rope_tables(position + offset, 64, THETA, torch.float32), pairing=pairing
    )
    pool = cached[None].to(DEVICE)
    index = torch.arange(30, dtype=torch.int32, device=DEVICE)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    rotate(pool, index, offset.int().to(DEVICE), inv_freq, pairing=pairing)
    torch.testing.assert_close(pool[0].cpu(), want, rtol=0, atol=1e-4)


def test_a_poisoned_latent_is_never_read() -> None:
    pool = entries(2, 20, 576, torch.float32)
    clean = pool.clone()
    pool[..., :512] = math.nan
    index, offset = listed(17, 20)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    for t in (pool, clean):
        rotate(t[..., 512:], index, offset, inv_freq, pairing="half")
    assert torch.equal(pool[..., 512:], clean[..., 512:])


@pytest.mark.parametrize("theta", [10000.0, 5e6])
def test_frequencies_are_the_models(theta: float) -> None:
    """Angles of one position are the frequencies, bit for bit those of `rope_tables`."""
    inv_freq = inverse_frequencies(64, theta, "cpu")
    cos, sin = rope_tables(torch.tensor([1]), 64, theta, torch.float32)
    assert torch.equal(inv_freq.cos(), cos[0])
    assert torch.equal(inv_freq.sin(), sin[0])
    for dim, bad in ((63, theta), (0, theta), (64, 1.0)):
        with pytest.raises(ValueError, match="even rope dim"):
            inverse_frequencies(dim, bad, "cpu")


def test_bad_arguments() -> None:
    rope = entries(2, 20, 64, torch.bfloat16)
    index, offset = listed(17, 20)
    inv_freq = inverse_frequencies(64, THETA, DEVICE)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("rope must be", {"rope": rope[0]}),
        ("rope must be", {"rope": rope.double()}),
        ("contiguous columns", {"rope": rope[..., :63]}),
        ("contiguous columns", {"rope": rope.mT.contiguous().mT}),
        ("pairing", {"pairing": "neox"}),
        ("index must be", {"index": index.long()}),
        ("index must be", {"index": index[:5]}),
        ("index must be", {"index": index.expand(3, -1).contiguous()}),
        ("index must be", {"index": index.expand(2, -1)}),
        ("offset must be", {"offset": offset.long()}),
        ("inv_freq must be", {"inv_freq": inv_freq[:31]}),
        ("inv_freq must be", {"inv_freq": inv_freq.double()}),
        ("count must be", {"count": index}),
    ]
    given: dict[str, Any] = {"rope": rope, "index": index, "offset": offset, "inv_freq": inv_freq}
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            rotate(**{**given, "pairing": "half"} | change)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("num", [55, 4096])
def test_all_layers_of_a_model(num: int, pairing: Pairing) -> None:
    pool = entries(61, 8192, 576, torch.bfloat16)
    before = pool[..., 512:].clone()
    index, offset = listed(num, 8192)
    rotate(pool[..., 512:], index, offset, inverse_frequencies(64, THETA, DEVICE), pairing=pairing)
    check(pool[..., 512:], before, index, offset, pairing)


def test_checked_ids_are_read_back() -> None:
    rope = torch.zeros(2, 4, 8, device=DEVICE)
    index = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="index must be below 4, got 4"):
        rotate(rope, index, torch.zeros_like(index), inverse_frequencies(8, 1e4, DEVICE),
               pairing="half", checked=True)  # fmt: skip
