"""What crosses ranks: bitwise round trips, and malformed messages refused with ValueError only."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import asdict, replace

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qroam.runtime.transport.messages import (
    MAGIC,
    MAX_COLUMNS,
    MAX_HEADER_BYTES,
    Header,
    decode,
    encode,
)

HEADER = Header(kind="attend", incarnation=7, channel=0, epoch=3, tables=99, layer=2, unit_tokens=4)
DTYPES = (
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def bits(rows: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return rows.dtype, rows.shape, rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def random_rows(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bits, so that NaNs with payloads and infinities are among the floats."""
    g = torch.Generator().manual_seed(seed)
    count = dtype.itemsize
    for size in shape:
        count *= size
    raw = torch.randint(0, 256, (count,), generator=g, dtype=torch.int64).to(torch.uint8)
    return raw.view(dtype).view(shape)


columns_of = st.dictionaries(
    st.text("ab.é✓", min_size=1, max_size=8),
    st.tuples(
        st.lists(st.integers(0, 5), min_size=1, max_size=4),
        st.sampled_from(DTYPES),
        st.integers(0, 10**6),
    ),
    max_size=6,
)


@given(described=columns_of)
def test_messages_come_back_bitwise(
    described: dict[str, tuple[list[int], torch.dtype, int]],
) -> None:
    columns = {name: random_rows(*rows) for name, rows in described.items()}
    message = decode(encode(HEADER, columns))
    assert message.header == HEADER
    assert list(message.columns) == list(columns)
    for name, rows in columns.items():
        assert bits(message.columns[name]) == bits(rows)


def test_rows_that_are_not_contiguous_are_sent_as_they_read() -> None:
    rows = torch.arange(24).view(4, 6).T[::2]
    assert bits(decode(encode(HEADER, {"rows": rows})).columns["rows"]) == bits(rows)


def test_columns_do_not_share_the_buffer() -> None:
    buffer = encode(HEADER, {"rows": torch.arange(4)})
    message = decode(buffer)
    buffer.zero_()
    assert message.columns["rows"].tolist() == [0, 1, 2, 3]


def test_columns_are_padded_to_sixteen_bytes() -> None:
    empty = len(encode(HEADER, {}))
    one, three = (len(encode(HEADER, {"r": torch.zeros(n)})) for n in (1, 3))
    assert one == three > empty


def packed(head: object, body: bytes = b"") -> Tensor:
    raw = msgpack.packb(head)
    start = struct.pack("<II", MAGIC, len(raw))
    return torch.frombuffer(bytearray(start + raw + body), dtype=torch.uint8)


def with_head(body: bytes = b"", **changes: object) -> Callable[[], Tensor]:
    return lambda: packed({**asdict(HEADER), "columns": [], **changes}, body)


def without(field: str) -> Callable[[], Tensor]:
    head = {**asdict(HEADER), "columns": []}
    return lambda: packed({name: value for name, value in head.items() if name != field})


def good() -> Tensor:
    return encode(HEADER, {"a": torch.arange(6, dtype=torch.int32), "b": torch.ones(2, 3)})


def patched(at: int, raw: bytes) -> Callable[[], Tensor]:
    def patch() -> Tensor:
        buffer = good()
        buffer[at : at + len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        return buffer

    return patch


def raw_header(raw: bytes) -> Callable[[], Tensor]:
    whole = struct.pack("<II", MAGIC, len(raw)) + raw
    return lambda: torch.frombuffer(bytearray(whole), dtype=torch.uint8)


SIXTEEN = bytes(16)
MALFORMED: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "empty": ("shorter than its prefix", lambda: torch.zeros(0, dtype=torch.uint8)),
    "half-a-prefix": ("shorter than its prefix", lambda: good()[:7]),
    "cut-in-the-header": ("does not fit", lambda: good()[:40]),
    "cut-in-a-column": ("exceeds", lambda: good()[:-30]),
    "cut-in-the-padding": ("columns end at", lambda: good()[:-1]),
    "trailing-bytes": ("columns end at", lambda: torch.cat((good(), torch.zeros(16).byte()))),
    "wrong-magic": ("expected 0x716f6101", patched(0, b"qoa2")),
    "huge-header": ("does not fit", patched(4, struct.pack("<I", 2**32 - 1))),
    "header-over-the-bound": (
        "does not fit",
        raw_header(msgpack.packb("x" * (MAX_HEADER_BYTES + 1))),
    ),
    "not-msgpack": ("not valid msgpack", raw_header(b"\xc1\xc1\xc1")),
    "two-msgpack-values": ("not valid msgpack", raw_header(b"\x80\x80")),
    "deep-nesting": ("not valid msgpack", raw_header(b"\x91" * 5000)),
    "list-as-a-key": ("not valid msgpack", raw_header(b"\x81\x90\x01")),
    "bad-utf8": ("not valid msgpack", raw_header(b"\xa2\xff\xff")),
    "bad-timestamp": ("not valid msgpack", raw_header(b"\xd7\xff" + b"\xff" * 8)),
    "header-is-a-list": ("must have the fields", lambda: packed([1, 2])),
    "extra-field": ("must have the fields", with_head(pickle="x")),
    "missing-field": ("must have the fields", without("epoch")),
    "missing-columns": ("must have the fields", without("columns")),
    "epoch-is-a-float": ("'epoch' must be int", with_head(epoch=3.0)),
    "epoch-is-a-bool": ("'epoch' must be int", with_head(epoch=True)),
    "kind-is-bytes": ("'kind' must be str", with_head(kind=b"attend")),
    "columns-is-a-map": ("'columns' must be list", with_head(columns={})),
    "too-many-columns": (
        "msgpack",
        with_head(columns=[[str(n), "u1", [0]] for n in range(MAX_COLUMNS + 1)]),
    ),
    "column-is-a-string": ("malformed column", with_head(columns=["a"])),
    "column-too-short": ("malformed column", with_head(columns=[["a", "u1"]])),
    "column-too-long": ("malformed column", with_head(columns=[["a", "u1", [0], 0]])),
    "column-name-is-a-number": ("malformed column", with_head(columns=[[1, "u1", [0]]])),
    "unknown-dtype": ("malformed column", with_head(columns=[["a", "O8", [0]]])),
    "shape-is-a-number": ("malformed column", with_head(columns=[["a", "u1", 16]], body=SIXTEEN)),
    "negative-size": ("malformed column", with_head(columns=[["a", "u1", [-16]]], body=SIXTEEN)),
    "fractional-size": ("malformed column", with_head(columns=[["a", "u1", [1.0]]], body=SIXTEEN)),
    "bool-size": ("malformed column", with_head(columns=[["a", "u1", [True]]], body=SIXTEEN)),
    "five-dimensions": (
        "malformed column",
        with_head(columns=[["a", "u1", [1] * 5]], body=SIXTEEN),
    ),
    "size-over-int32": ("malformed column", with_head(columns=[["a", "u1", [2**31]]])),
    "huge-count": ("exceeds", with_head(columns=[["a", "u1", [2**31 - 1]]], body=SIXTEEN)),
    "product-overflows-int64": (
        "exceeds",
        with_head(columns=[["a", "f8", [2**31 - 1] * 4]], body=SIXTEEN),
    ),
    "columns-overlap": (
        "exceeds",
        with_head(columns=[["a", "u1", [16]], ["b", "u1", [16]]], body=SIXTEEN),
    ),
    "name-twice": (
        "repeats",
        with_head(columns=[["a", "u1", [16]], ["a", "u1", [16]]], body=2 * SIXTEEN),
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_messages_are_refused(case: str) -> None:
    message, build = MALFORMED[case]
    with pytest.raises(ValueError, match=message):
        decode(build())


def test_every_truncation_is_refused() -> None:
    buffer = good()
    for length in range(len(buffer)):
        with pytest.raises(ValueError, match=r"message|column"):
            decode(buffer[:length])


def test_mutated_bytes_give_a_value_error_or_a_sound_message() -> None:
    """What is accepted says no more than its bytes hold: its columns fit into the buffer."""
    draw = random.Random(20)
    originals = [good(), encode(replace(HEADER, kind="select", top_k=8), {}), with_head()()]
    refused = accepted = 0
    for _ in range(6000):
        buffer = draw.choice(originals).clone()
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(min(len(buffer), 200))
            match draw.randrange(4):
                case 0:
                    buffer[at] = draw.randrange(256)
                case 1:
                    buffer[at] ^= 1 << draw.randrange(8)
                case 2:
                    buffer = torch.cat((buffer[:at], buffer[at + 1 :]))
                case _:
                    buffer = torch.cat((buffer[:at], buffer[at : at + 3], buffer[at:]))
        try:
            message = decode(buffer)
        except ValueError:
            refused += 1
            continue
        accepted += 1
        held = sum(rows.numel() * rows.element_size() for rows in message.columns.values())
        assert held <= len(buffer)
        assert isinstance(message.header.kind, str)
        again = decode(encode(message.header, message.columns))
        assert again.header == message.header
        assert {n: bits(r) for n, r in again.columns.items()} == {
            n: bits(r) for n, r in message.columns.items()
        }
    assert refused > 1000
    assert accepted > 100
