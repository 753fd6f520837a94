"""The codec kernels byte for byte against `partition/codec.py`.

The Triton interpreter rounds to bf16 and e4m3 by cutting off, so without a GPU the numbers to encode
are ones that need no rounding; scales, layout and places are the same. On a GPU any number will do.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qroam.partition.codec import Codec, gather_rows, make_codec, scatter_rows

pytest.importorskip("triton")
from qroam.kernels.codec import (
    decode_index,
    decode_latent,
    encode_index,
    encode_latent,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device, which rounds")
FLOATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
V32 = make_codec("fp8_v32", dim=576, rope_dim=64)
INDEX = make_codec("fp8_index", dim=128)


def any_numbers(num: int, codec: Codec, seed: int = 0) -> Tensor:
    """Rows of many magnitudes, with zeros of either sign, peaks at 448 powers of two, and tiny rows."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num, codec.dim, generator=g)
    x *= torch.exp2(torch.randint(-30, 30, (num, 1), generator=g))
    x *= torch.exp2(torch.randint(-10, 1, (num, codec.dim), generator=g))
    x[torch.rand(x.shape, generator=g) < 0.05] = 0.0
    x[torch.rand(x.shape, generator=g) < 0.05] = -0.0
    if num >= 8:
        x[0] = 0.0
        x[1] = 1e-44
        peak = torch.tensor(448.0)
        for row, other in enumerate((peak, peak.nextafter(peak * 0), peak.nextafter(peak * 2)), 2):
            x[row].clamp_(-1, 1)[0] = other * 2.0 ** (row - 12)
        x[5, ::3] = 1e-5
        x[6] = x[6].sign() * 1e37
    return x


def exact_numbers(num: int, codec: Codec, seed: int = 0) -> Tensor:
    """Numbers that survive the codec unchanged."""
    rows = codec.encode(any_numbers(num, codec, seed))
    return codec.decode(rows, torch.float32)


def numbers(num: int, codec: Codec, seed: int = 0) -> Tensor:
    return (any_numbers if DEVICE == "cuda" else exact_numbers)(num, codec, seed)


def poisoned_bytes(*shape: int) -> Tensor:
    return torch.full(shape, 0xFF, dtype=torch.uint8, device=DEVICE)


@pytest.mark.parametrize("num", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("dtype", FLOATS)
def test_latent_bytes(num: int, dtype: str) -> None:
    entries = numbers(num, V32).to(FLOATS[dtype])
    out = poisoned_bytes(num, 656)
    assert encode_latent(entries.to(DEVICE), rope_dim=64, out=out) is out
    assert torch.equal(out.cpu(), V32.encode(entries))


@pytest.mark.parametrize(("latent", "rope"), [(128, 0), (384, 64), (256, 2), (512, 6)])
def test_latent_widths(latent: int, rope: int) -> None:
    codec = make_codec("fp8_v32", dim=latent + rope, rope_dim=rope)
    entries = numbers(9, codec)
    rows = encode_latent(entries.to(DEVICE), rope_dim=rope)
    assert torch.equal(rows.cpu(), codec.encode(entries))
    decoded = decode_latent(rows, rope_dim=rope, dtype=torch.float32)
    assert torch.equal(decoded.cpu(), codec.decode(rows.cpu(), torch.float32))


@pytest.mark.parametrize("dim", [4, 96, 128])
@pytest.mark.parametrize("num", [0, 1, 65])
def test_index_rows(num: int, dim: int) -> None:
    codec = make_codec("fp8_index", dim=dim)
    keys = numbers(num, codec)
    rows = encode_index(keys.to(DEVICE))
    assert torch.equal(rows.cpu(), codec.encode(keys))
    decoded = decode_index(rows, dtype=torch.float32)
    assert torch.equal(decoded.cpu(), codec.decode(rows.cpu(), torch.float32))


@pytest.mark.parametrize("name", ["fp8_v32", "fp8_index"])
def test_scales_of_any_numbers(name: str) -> None:
    """What does not round: amax, the clamp and the power of two, at its edges too."""
    codec = V32 if name == "fp8_v32" else INDEX
    encode = (lambda x: encode_latent(x, rope_dim=64)) if codec is V32 else encode_index
    entries = any_numbers(64, codec)
    columns = slice(512, 528) if codec is V32 else slice(128, 132)
    got, want = encode(entries.to(DEVICE)).cpu(), codec.encode(entries)
    assert torch.equal(got[:, columns], want[:, columns])
    assert len(got[:, columns].contiguous().view(torch.float32).unique()) > 20


@pytest.mark.parametrize("dtype", FLOATS)
def test_decode_every_code(dtype: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(8).view(4, 512)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN, which does not compare
    scales = torch.exp2(torch.arange(16) - 8.0).view(4, 4).view(torch.uint8)
    rope = (torch.arange(256).view(4, 64) - 99.0).bfloat16().view(torch.uint8)
    rows = torch.cat((codes, scales, rope), dim=1)
    got = decode_latent(rows.to(DEVICE), rope_dim=64, dtype=FLOATS[dtype])
    assert torch.equal(got.cpu(), V32.decode(rows, FLOATS[dtype]))
    assert got.cpu().signbit().equal(V32.decode(rows, FLOATS[dtype]).signbit())
    keys = torch.cat((codes.view(16, 128), scales.view(16, 4)), dim=1)
    got = decode_index(keys.to(DEVICE), dtype=FLOATS[dtype])
    assert torch.equal(got.cpu(), INDEX.decode(keys, FLOATS[dtype]))


def places(num: int, below: int) -> Tensor:
    """(num,) int32 distinct places, with -1 among them."""
    g = torch.Generator().manual_seed(5)
    index = torch.randperm(below, generator=g)[:num]
    return torch.where(torch.rand(num, generator=g) < 0.3, -1, index).int()


@pytest.mark.parametrize("count", [0, 1, 64, 65])
def test_latent_in_place_of_a_pool(count: int) -> None:
    entries, index = numbers(65, V32), places(65, 100)
    used = (index >= 0) & (torch.arange(65) < count)
    entries[count:] = math.nan
    pool = torch.full((100, 656), 0xAB, dtype=torch.uint8)
    want = pool.clone()
    scatter_rows(want, V32, 1, index[used].long(), V32.encode(entries[used]))
    index[count:] = 2**30
    given: dict[str, Any] = {
        "index": index.to(DEVICE),
        "count": torch.tensor([count], dtype=torch.int32, device=DEVICE),
    }
    pool = encode_latent(entries.to(DEVICE), rope_dim=64, out=pool.to(DEVICE), **given)
    assert torch.equal(pool.cpu(), want)

    before = torch.full((65, 576), 7e4, device=DEVICE)
    got = decode_latent(pool, rope_dim=64, out=before.clone(), **given)
    assert torch.equal(
        got[used.to(DEVICE)].cpu(), V32.decode(want[index[used].long()], torch.float32)
    )
    assert torch.equal(got[~used.to(DEVICE)], before[~used.to(DEVICE)])


@pytest.mark.parametrize("count", [0, 64, 65])
@pytest.mark.parametrize("block_tokens", [64, 16])
def test_index_blocks(count: int, block_tokens: int) -> None:
    slots = 256 // block_tokens
    keys, index = numbers(65, INDEX), places(65, 256)
    used = (index >= 0) & (torch.arange(65) < count)
    keys[count:] = math.nan
    blocks = torch.full((slots, block_tokens * 132), 0xAB, dtype=torch.uint8)
    want = blocks.clone()
    scatter_rows(want, INDEX, block_tokens, index[used].long(), INDEX.encode(keys[used]))
    index[count:] = 2**30
    given: dict[str, Any] = {
        "index": index.to(DEVICE),
        "count": torch.tensor([count], dtype=torch.int32, device=DEVICE),
        "block_tokens": block_tokens,
    }
    blocks = encode_index(keys.to(DEVICE), out=blocks.to(DEVICE), **given)
    assert torch.equal(blocks.cpu(), want)

    before = torch.full((65, 128), 7e4, device=DEVICE)
    got = decode_index(blocks, out=before.clone(), **given)
    rows = gather_rows(want, INDEX, block_tokens, index[used].long())
    assert torch.equal(got[used.to(DEVICE)].cpu(), INDEX.decode(rows, torch.float32))
    assert torch.equal(got[~used.to(DEVICE)], before[~used.to(DEVICE)])


def test_index_blocks_in_order() -> None:
    keys = numbers(130, INDEX)
    blocks = encode_index(keys.to(DEVICE), block_tokens=64, out=poisoned_bytes(3, 64 * 132))
    want = torch.full((3, 64 * 132), 0xFF, dtype=torch.uint8)
    scatter_rows(want, INDEX, 64, torch.arange(130), INDEX.encode(keys))
    assert torch.equal(blocks.cpu(), want)
    decoded = decode_index(blocks, block_tokens=64, dtype=torch.float32)
    assert decoded.shape == (192, 128)
    assert torch.equal(decoded[:130].cpu(), INDEX.decode(INDEX.encode(keys), torch.float32))


def test_columns_of_a_wider_tensor() -> None:
    """A projection's output: the entry is a slice of each row."""
    entries = numbers(9, V32)
    wide = torch.full((9, 700), math.nan)
    wide[:, 50:626] = entries
    assert torch.equal(
        encode_latent(wide.to(DEVICE)[:, 50:626], rope_dim=64).cpu(), V32.encode(entries)
    )


@pytest.mark.parametrize(
    "poison",
    [
        pytest.param(
            math.nan, marks=[pytest.mark.gpu, needs_gpu]
        ),  # the interpreter has no e4m3 NaN
        math.inf,
        -math.inf,
    ],
)
def test_what_cannot_be_stored_shows_when_decoded(poison: float) -> None:
    entries = numbers(3, V32)
    entries[1, 200] = poison
    rows = encode_latent(entries.to(DEVICE), rope_dim=64)
    decoded = decode_latent(rows, rope_dim=64, dtype=torch.float32).cpu()
    assert not bool(decoded[1, 200].isfinite())
    assert torch.equal(decoded[[0, 2]], V32.decode(V32.encode(entries[[0, 2]]), torch.float32))


def test_a_list_without_a_count() -> None:
    entries, keys, index = numbers(9, V32), numbers(9, INDEX), places(9, 20)
    listed, here = index.to(DEVICE), index[index >= 0].long()
    pool = encode_latent(entries.to(DEVICE), rope_dim=64, index=listed, out=poisoned_bytes(20, 656))
    blocks = encode_index(
        keys.to(DEVICE), block_tokens=5, index=listed, out=poisoned_bytes(4, 5 * 132)
    )
    want = torch.full((20, 656), 0xFF, dtype=torch.uint8)
    want[here] = V32.encode(entries[index >= 0])
    assert torch.equal(pool.cpu(), want)
    want = torch.full((4, 5 * 132), 0xFF, dtype=torch.uint8)
    scatter_rows(want, INDEX, 5, here, INDEX.encode(keys[index >= 0]))
    assert torch.equal(blocks.cpu(), want)


def test_bad_arguments() -> None:
    entries = torch.zeros(5, 576, device=DEVICE)
    index = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    rows = poisoned_bytes(9, 656)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("multiple of 128", {"entries": entries[:, :575]}),
        ("multiple of 128", {"rope_dim": 63}),
        ("multiple of 128", {"rope_dim": 576}),
        ("bf16 or fp32", {"entries": entries.double()}),
        ("contiguous columns", {"entries": entries.mT.contiguous().mT}),
        ("which is missing", {"out": None}),
        ("out must have 5 rows", {"index": None}),
        ("uint8", {"out": rows.int()}),
        ("uint8", {"out": rows[:, :655]}),
        ("out must be contiguous", {"out": poisoned_bytes(9, 660)[:, :656]}),
        ("multiple of 4 bytes", {"out": poisoned_bytes(9 * 656 + 2)[2:].view(9, 656)}),
        ("index must be", {"index": index.long()}),
        ("index must be", {"index": index[:4]}),
        ("count must be", {"count": index}),
    ]
    for message, change in cases:
        given: dict[str, Any] = {
            "entries": entries,
            "rope_dim": 64,
            "index": index,
            "out": rows,
        } | change
        with pytest.raises(ValueError, match=message):
            encode_latent(**given)
    cases = [
        ("no latent", {"rope_dim": 62}),
        ("multiple of 128", {"rope_dim": 328}),
        ("bf16 or fp32", {"dtype": torch.float64}),
        ("bf16 or fp32", {"out": entries}),
        ("uint8", {"rows": rows.int()}),
    ]
    for message, change in cases:
        given = {"rows": rows, "rope_dim": 64}
        with pytest.raises(ValueError, match=message):
            decode_latent(**given | change)
    with pytest.raises(ValueError, match="multiple of 4 columns"):
        encode_index(torch.zeros(2, 126, device=DEVICE))
    with pytest.raises(ValueError, match="block_tokens >= 1"):
        encode_index(torch.zeros(2, 128, device=DEVICE), block_tokens=0)
    with pytest.raises(ValueError, match="uint8"):
        decode_index(poisoned_bytes(3, 64 * 132 + 1), block_tokens=64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_full_size(dtype: str) -> None:
    entries = any_numbers(20_000, V32).to(FLOATS[dtype])
    rows = encode_latent(entries.to(DEVICE), rope_dim=64)
    assert torch.equal(rows.cpu(), V32.encode(entries))
    decoded = decode_latent(rows, rope_dim=64, dtype=FLOATS[dtype])
    assert torch.equal(decoded.cpu(), V32.decode(rows.cpu(), FLOATS[dtype]))
    keys = any_numbers(20_000, INDEX).to(FLOATS[dtype])
    rows = encode_index(keys.to(DEVICE))
    assert torch.equal(rows.cpu(), INDEX.encode(keys))
    assert torch.equal(
        decode_index(rows, dtype=FLOATS[dtype]).cpu(), INDEX.decode(rows.cpu(), FLOATS[dtype])
    )


def test_checked_ids_are_read_back() -> None:
    entries = torch.zeros(2, 192, device=DEVICE)
    rows = torch.zeros(4, 128 + 4 + 128, dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([1, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="index must be below 4, got 4"):
        encode_latent(entries, rope_dim=64, index=index, out=rows, checked=True)
    with pytest.raises(ValueError, match="index must be below 4, got 4"):
        decode_latent(rows, rope_dim=64, index=index, checked=True)
    blocks = torch.zeros(1, 4 * 132, dtype=torch.uint8, device=DEVICE)
    keys = torch.zeros(2, 128, device=DEVICE)
    with pytest.raises(ValueError, match="index must be below 4, got 4"):
        encode_index(keys, block_tokens=4, index=index, out=blocks, checked=True)
    with pytest.raises(ValueError, match="index must be below 4, got 4"):
        decode_index(blocks, block_tokens=4, index=index, checked=True)
