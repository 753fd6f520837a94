"""Codecs byte for byte against rows assembled by hand, and the planes of a block."""

from __future__ import annotations

import hashlib
import struct
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qroam.partition.codec import (
    CODEC_NAMES,
    Codec,
    act_quant,
    gather_rows,
    make_codec,
    scatter_rows,
)

FP32_MAX = float(np.finfo(np.float32).max)
CODES = np.arange(127)  # the positive e4m3 numbers; 127 is NaN
MAGNITUDES = np.where(CODES < 8, CODES / 8 * 2.0**-6, (1 + CODES % 8 / 8) * 2.0 ** (CODES // 8 - 7))


def e4m3_bytes(x: np.ndarray) -> bytes:
    """Round to the nearest e4m3 number, ties to the even code."""
    magnitude = np.abs(x.astype(np.float64))
    above = np.searchsorted(MAGNITUDES, magnitude).clip(0, 126)
    below = (above - 1).clip(0)
    up, down = MAGNITUDES[above] - magnitude, magnitude - MAGNITUDES[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    code = np.where(magnitude == MAGNITUDES[above], above, code)
    return bytes((code | (np.signbit(x) << 7)).astype(np.uint8))


def ceil_scale(amax: float, lowest: int) -> float:
    """The smallest power of two s >= 2**lowest with amax <= 448 * s, in exact arithmetic."""
    exponent = lowest
    while Fraction(amax) > 448 * Fraction(2) ** exponent:
        exponent += 1
    return 2.0**exponent


def v32_row(row: np.ndarray, latent: int) -> bytes:
    """e4m3 latent | fp32 scales | bf16 rope; 2**-13 is 1e-4 rounded up to a power of two."""
    tiles = row[:latent].reshape(-1, 128)
    scales = [ceil_scale(float(np.abs(tile).max()), -13) for tile in tiles]
    values = b"".join(e4m3_bytes(tile / s) for tile, s in zip(tiles, scales, strict=True))
    rope: Any = row[latent:].view(np.uint32)
    rope = (rope + 0x7FFF + ((rope >> 16) & 1)) >> 16
    packed: bytes = rope.astype("<u2").tobytes()
    return values + struct.pack(f"<{len(scales)}f", *scales) + packed


def index_row(row: np.ndarray) -> bytes:
    """e4m3 values | fp32 scale; 2**-22 is 1e-4 / 448 rounded up to a power of two."""
    scale = ceil_scale(float(np.abs(row).max()), -22)
    return e4m3_bytes(row / scale) + struct.pack("<f", scale)


def scrambled(num_rows: int, dim: int) -> np.ndarray:
    """Numbers of many magnitudes that no random generator's version can change."""
    i = np.arange(num_rows * dim, dtype=np.uint64)
    unit = (i * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**31 - 1
    return (unit * 2.0 ** (i % np.uint64(17) - 8.0)).astype(np.float32).reshape(num_rows, dim)


def corner_rows(dim: int) -> np.ndarray:
    """Rows whose largest number is zero, tiny, huge, or at a power of two times 448."""
    peaks: list[Any] = [0.0, -0.0, 1e-45, 1e-30, 1e-5, 1e-4, 0.0448, 1.0, 447.0, 65504.0, FP32_MAX]
    for exponent in range(-30, 31, 3):
        peak = np.float32(448.0 * 2.0**exponent)
        peaks += [np.nextafter(peak, np.float32(0)), peak, np.nextafter(peak, np.float32(np.inf))]
        peaks += [np.float32(2.0**exponent)]
    rows = scrambled(len(peaks), dim)
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    rows[::2, 0], rows[1::2, 0] = 1, -1
    with np.errstate(under="ignore"):
        return rows * np.asarray(peaks, dtype=np.float32)[:, None]


def unpack(rows: torch.Tensor) -> list[bytes]:
    return [bytes(row.tolist()) for row in rows]


@pytest.mark.parametrize("latent", [128, 512])
def test_fp8_v32_rows_equal_hand_made_ones(latent: int) -> None:
    codec = make_codec("fp8_v32", dim=latent + 64, rope_dim=64)
    entries = np.concatenate([corner_rows(latent + 64), scrambled(50, latent + 64)])
    entries[:, latent:] = np.clip(entries[:, latent:], -1e38, 1e38)
    assert codec.entry_bytes == latent + latent // 128 * 4 + 128
    assert unpack(codec.encode(torch.from_numpy(entries))) == [v32_row(r, latent) for r in entries]


@pytest.mark.parametrize("dim", [32, 128])
def test_fp8_index_rows_equal_hand_made_ones(dim: int) -> None:
    codec = make_codec("fp8_index", dim=dim)
    entries = np.concatenate([corner_rows(dim), scrambled(50, dim)])
    assert codec.planes == (dim, 4)
    assert unpack(codec.encode(torch.from_numpy(entries))) == [index_row(row) for row in entries]


def test_published_row_sizes() -> None:
    assert make_codec("fp8_v32", dim=576, rope_dim=64).entry_bytes == 656
    assert make_codec("fp8_index", dim=128).entry_bytes == 132
    assert make_codec("bf16", dim=576, rope_dim=64).entry_bytes == 1152


@pytest.mark.parametrize(
    ("name", "dim", "rope_dim", "digest"),
    [
        ("fp8_v32", 576, 64, "0ca78b31cdadd85c2a6eea46b8a985e63d80353ae6f1c87bd6e1c74fe7f69da8"),
        ("fp8_index", 128, 0, "5b3b602031f06594d91a29ff3e6c0c3219f603247e433306bd04a67eeb4ff1e2"),
    ],
)
def test_golden_bytes(name: str, dim: int, rope_dim: int, digest: str) -> None:
    rows = make_codec(name, dim=dim, rope_dim=rope_dim).encode(torch.from_numpy(scrambled(64, dim)))
    assert hashlib.sha256(rows.numpy().tobytes()).hexdigest() == digest


def test_clamps_differ_for_tiny_rows() -> None:
    tiny = torch.full((1, 128), 1e-6)
    v32 = make_codec("fp8_v32", dim=128).encode(tiny)[0, 128:]
    index = make_codec("fp8_index", dim=128).encode(tiny)[0, 128:]
    assert v32.view(torch.float32).item() == 2.0**-13
    assert index.view(torch.float32).item() == 2.0**-22


@pytest.mark.parametrize(("name", "dim", "rope_dim"), [("fp8_v32", 144, 16), ("fp8_index", 128, 0)])
def test_decode_by_hand(name: str, dim: int, rope_dim: int) -> None:
    codec = make_codec(name, dim=dim, rope_dim=rope_dim)
    codes = np.arange(128, dtype=np.uint8) + np.array([[0], [128]], dtype=np.uint8)
    magnitude = np.append(MAGNITUDES, np.nan)
    rope = np.arange(rope_dim) - 5.5
    raw = b"".join(
        row.tobytes()
        + struct.pack("<f", scale)
        + (rope.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        for row, scale in zip(codes, (0.5, 2.0**9), strict=True)
    )
    rows = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(2, codec.entry_bytes)
    want = np.stack([np.append(magnitude * 0.5, rope), np.append(-magnitude * 2.0**9, rope)])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        np.testing.assert_array_equal(codec.decode(rows, dtype).double().numpy(), want)


@pytest.mark.parametrize(
    ("name", "stored"),
    [("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)],
)
def test_plain_codecs_store_the_number_and_decode_to_a_view(name: str, stored: torch.dtype) -> None:
    codec = make_codec(name, dim=7)
    entries = torch.from_numpy(scrambled(9, 7)).double()
    rows = codec.encode(entries)
    assert torch.equal(rows.view(stored), entries.to(stored))
    assert codec.decode(rows, stored).data_ptr() == rows.data_ptr()
    assert torch.equal(codec.decode(rows, torch.float64), entries.to(stored).double())


@pytest.mark.parametrize(
    ("name", "dim", "rope_dim"),
    [("fp64", 5, 0), ("bf16", 6, 2), ("fp8_v32", 144, 16), ("fp8_index", 32, 0)],
)
def test_decode_takes_unaligned_and_strided_rows(name: str, dim: int, rope_dim: int) -> None:
    codec = make_codec(name, dim=dim, rope_dim=rope_dim)
    rows = codec.encode(torch.from_numpy(scrambled(6, dim)))
    want = codec.decode(rows, torch.float32)
    shifted = torch.cat((rows.new_zeros(3), rows.flatten()))[3:].view(rows.shape)
    wide = torch.cat((rows, rows[:, :1]), dim=1)[:, :-1]
    transposed = rows.T.contiguous().T
    for same in (shifted, wide, transposed):
        assert torch.equal(codec.decode(same, torch.float32), want)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_no_entries(name: str) -> None:
    codec = make_codec(name, dim=128)
    rows = codec.encode(torch.empty(0, 128))
    assert rows.shape == (0, codec.entry_bytes)
    assert codec.decode(rows, torch.bfloat16).shape == (0, 128)


FLOATS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.just(128)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@settings(deadline=None, max_examples=60)
@given(x=FLOATS, name=st.sampled_from(["fp8_v32", "fp8_index"]))
def test_fp8_error_is_half_a_step_and_rounding_twice_changes_nothing(
    x: np.ndarray, name: str
) -> None:
    codec = make_codec(name, dim=128)
    entries = torch.from_numpy(x)
    rows = codec.encode(entries)
    once = codec.decode(rows, torch.float64)
    scale = rows[:, 128:].contiguous().view(torch.float32).double()
    exact = entries.double()
    assert ((once - exact).abs() <= (exact.abs() * 2.0**-4).maximum(scale * 2.0**-10)).all()
    assert torch.equal(codec.decode(codec.encode(once), torch.float64), once)
    assert torch.equal(codec.decode(rows, torch.float32).double(), once)


@settings(deadline=None, max_examples=40)
@given(x=FLOATS, name=st.sampled_from(["fp64", "fp32", "bf16"]))
def test_plain_round_trip_is_bitwise(x: np.ndarray, name: str) -> None:
    codec = make_codec(name, dim=128)
    rows = codec.encode(torch.from_numpy(x))
    assert torch.equal(codec.encode(codec.decode(rows, torch.float64)), rows)


def test_act_quant_takes_heads() -> None:
    x = torch.from_numpy(scrambled(6, 32)).view(2, 3, 32)
    values, scale = act_quant(x)
    rows = make_codec("fp8_index", dim=32).encode(x.view(6, 32))
    assert values.shape == (2, 3, 32)
    assert scale.shape == (2, 3, 1)
    assert torch.equal(values.view(torch.uint8).view(6, 32), rows[:, :32])
    assert torch.equal(scale.view(torch.uint8).view(6, 4), rows[:, 32:])


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_encode_rejects_what_is_not_finite(name: str, bad: float) -> None:
    for column in (0, 130):
        entries = torch.zeros(3, 132)
        entries[1, column] = bad
        codec = make_codec(name, dim=132, rope_dim=4)
        with pytest.raises(ValueError, match="NaN or inf"):
            codec.encode(entries)


@pytest.mark.parametrize(("name", "rope_dim"), [("bf16", 0), ("fp8_v32", 2), ("fp32", 0)])
def test_encode_rejects_what_overflows(name: str, rope_dim: int) -> None:
    entries = torch.zeros(1, 130, dtype=torch.float64)
    entries[0, -1] = 1e300 if name == "fp32" else FP32_MAX
    with pytest.raises(ValueError, match="NaN or inf"):
        make_codec(name, dim=130, rope_dim=rope_dim).encode(entries)


@pytest.mark.parametrize(
    ("name", "dim", "rope_dim", "message"),
    [
        ("fp16", 8, 0, "unknown codec"),
        ("fp32", 0, 0, "rope_dim <= dim"),
        ("fp32", 4, 6, "rope_dim <= dim"),
        ("fp8_v32", 576, 0, "multiple of 128"),
        ("fp8_v32", 64, 64, "multiple of 128"),
        ("fp8_v32", 129, 1, "even"),
        ("fp8_index", 30, 0, "multiple of 4"),
    ],
)
def test_make_codec_rejects(name: str, dim: int, rope_dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_codec(name, dim=dim, rope_dim=rope_dim)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_wrong_shapes_and_dtypes(name: str) -> None:
    codec = make_codec(name, dim=128)
    for entries in (torch.zeros(2, 127), torch.zeros(128), torch.zeros(2, 128, dtype=torch.int32)):
        with pytest.raises(ValueError, match="entries must be"):
            codec.encode(entries)
    rows = codec.encode(torch.zeros(2, 128))
    for wrong in (rows[:, 1:], rows[0], rows.view(torch.int8)):
        with pytest.raises(ValueError, match="rows must be"):
            codec.decode(wrong, torch.float32)
    with pytest.raises(ValueError, match="decodes to floats"):
        codec.decode(rows, torch.int32)


POOLS = [
    ("fp64", 5, 0),
    ("fp32", 6, 0),
    ("bf16", 5, 0),
    ("fp8_v32", 144, 16),
    ("fp8_index", 32, 0),
    ("fp8_index", 12, 0),
]


def expected_blocks(
    blocks: torch.Tensor, codec: Codec, tokens: int, index: list[int], rows: torch.Tensor
) -> bytes:
    """The pool's bytes after a scatter, written one entry and one plane at a time."""
    raw = bytearray(blocks.numpy().tobytes())
    for entry, row in zip(index, unpack(rows), strict=True):
        at = entry // tokens * tokens * codec.entry_bytes
        for plane in codec.planes:
            part, row = row[:plane], row[plane:]
            start = at + entry % tokens * plane
            raw[start : start + plane] = part
            at += tokens * plane
    return bytes(raw)


@pytest.mark.parametrize(("name", "dim", "rope_dim"), POOLS)
@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("offset", [0, 1])
def test_blocks_store_plane_by_plane(
    name: str, dim: int, rope_dim: int, tokens: int, offset: int
) -> None:
    codec = make_codec(name, dim=dim, rope_dim=rope_dim)
    generator = torch.Generator().manual_seed(tokens)
    size = 7 * tokens * codec.entry_bytes
    arena = torch.randint(0, 256, (size + offset,), dtype=torch.uint8, generator=generator)
    blocks = arena[offset:].view(7, -1)
    index = torch.randperm(7 * tokens, generator=generator)[: 5 * tokens]
    rows = torch.randint(
        0, 256, (len(index), codec.entry_bytes), dtype=torch.uint8, generator=generator
    )
    want = expected_blocks(blocks, codec, tokens, index.tolist(), rows)
    scatter_rows(blocks, codec, tokens, index, rows)
    assert blocks.numpy().tobytes() == want
    assert torch.equal(gather_rows(blocks, codec, tokens, index), rows)
    assert gather_rows(blocks, codec, tokens, index[:0]).shape == (0, codec.entry_bytes)
    twice = torch.cat((index[:1], index[:1]))
    assert torch.equal(gather_rows(blocks, codec, tokens, twice), rows[:1].expand(2, -1))


def test_index_block_is_the_paged_layout_of_deepgemm() -> None:
    codec = make_codec("fp8_index", dim=128)
    rows = codec.encode(torch.from_numpy(scrambled(64, 128)))
    blocks = torch.zeros(2, 64 * 132, dtype=torch.uint8)
    scatter_rows(blocks, codec, 64, torch.arange(64, 128), rows)
    assert torch.equal(blocks[1, : 64 * 128], rows[:, :128].flatten())
    assert torch.equal(blocks[1, 64 * 128 :], rows[:, 128:].flatten())
    assert not blocks[0].any()


@pytest.mark.parametrize("name", ["fp32", "fp8_index"])
def test_pool_arguments_are_checked_before_anything_is_written(name: str) -> None:
    codec = make_codec(name, dim=8)
    blocks = torch.zeros(3, 4 * codec.entry_bytes, dtype=torch.uint8)
    rows = torch.ones(2, codec.entry_bytes, dtype=torch.uint8)
    good = torch.tensor([0, 11])
    for index in (torch.tensor([0, 12]), torch.tensor([0, -1])):
        with pytest.raises(ValueError, match=r"in \[0, 12\)"):
            scatter_rows(blocks, codec, 4, index, rows)
        with pytest.raises(ValueError, match=r"in \[0, 12\)"):
            gather_rows(blocks, codec, 4, index)
    with pytest.raises(ValueError, match="int64"):
        gather_rows(blocks, codec, 4, good.int())
    with pytest.raises(ValueError, match="rows of"):
        scatter_rows(blocks, codec, 4, good, rows[:1])
    with pytest.raises(ValueError, match="blocks must be"):
        scatter_rows(blocks, codec, 5, good, rows)
    with pytest.raises(ValueError, match="contiguous"):
        scatter_rows(blocks.T.contiguous().T, codec, 4, good, rows)
    assert not blocks.any()
