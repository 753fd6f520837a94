"""What crosses ranks: a msgpack header and named columns of tensor rows, in one buffer.

    u32 magic | u32 header bytes | header (msgpack) | columns, each padded to 16 bytes

Nothing received is trusted: `decode` bounds every size before it looks at a column. A message has
one encoding and `decode` takes no other, so nothing in a buffer can be read in two ways, or ignored.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, cast

import msgpack
import torch
from torch import Tensor

MAGIC = 0x716F6101  # "qoa", and the wire version in the lowest byte
MAX_HEADER_BYTES = 1 << 16
MAX_COLUMNS = 32
MAX_NAME_CHARS = 64
MAX_FIELD = 1 << 63
_PREFIX = struct.Struct("<II")
_ALIGN = 16
_DTYPES = {
    "u1": torch.uint8,
    "i4": torch.int32,
    "i8": torch.int64,
    "bf2": torch.bfloat16,
    "f4": torch.float32,
    "f8": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """Who sends what. Equality of `kind`, `epoch` and `tables` is checked on arrival."""

    kind: str
    incarnation: int
    channel: int
    epoch: int
    tables: int
    layer: int = 0
    unit_tokens: int = 1
    top_k: int = 0


class Message(NamedTuple):
    header: Header
    columns: Mapping[str, Tensor]


def encode(header: Header, columns: Mapping[str, Tensor]) -> Tensor:
    """One uint8 buffer; column rows are copied once."""
    described = [[name, _NAMES[rows.dtype], list(rows.shape)] for name, rows in columns.items()]
    head = msgpack.packb({**asdict(header), "columns": described})
    offset = _PREFIX.size + len(head)
    total = offset + sum(_padded(rows.numel() * rows.element_size()) for rows in columns.values())
    buffer = torch.zeros(total, dtype=torch.uint8)
    start = _PREFIX.pack(MAGIC, len(head)) + head
    buffer[:offset] = torch.frombuffer(bytearray(start), dtype=torch.uint8)
    for rows in columns.values():
        raw = rows.contiguous().view(-1).view(torch.uint8)
        buffer[offset : offset + len(raw)] = raw
        offset += _padded(len(raw))
    return buffer


def decode(buffer: Tensor) -> Message:
    """The message in a received buffer.

    Raises: ValueError that says what is wrong with it; columns are copies, safe to keep.
    """
    if len(buffer) < _PREFIX.size:
        raise ValueError(f"message of {len(buffer)} bytes is shorter than its prefix")
    magic, head_bytes = _PREFIX.unpack(buffer[: _PREFIX.size].numpy().tobytes())
    if magic != MAGIC:
        skew = f" (wire version {magic & 0xFF})" if magic >> 8 == MAGIC >> 8 else ""
        raise ValueError(f"message starts with {magic:#x}{skew}, expected {MAGIC:#x}")
    if head_bytes > min(MAX_HEADER_BYTES, len(buffer) - _PREFIX.size):
        raise ValueError(f"message header of {head_bytes} bytes does not fit the message")
    offset = _PREFIX.size + head_bytes
    head = _unpack(buffer[_PREFIX.size : offset].numpy().tobytes())
    described = head.pop("columns")
    header = Header(**cast(Any, head))
    if not isinstance(described, list) or len(described) > MAX_COLUMNS:
        raise ValueError(f"message columns must be a list of at most {MAX_COLUMNS}")
    columns: dict[str, Tensor] = {}
    for entry in described:
        name, dtype, shape = _column(entry)
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(buffer) - offset or name in columns:
            raise ValueError(f"column {name!r} of shape {shape} repeats or exceeds the message")
        columns[name] = buffer[offset : offset + num_bytes].clone().view(dtype).view(shape)
        padding = buffer[offset + num_bytes : offset + _padded(num_bytes)]
        if len(padding) and bool(padding.any()):
            raise ValueError(f"column {name!r} is followed by padding that is not zero")
        offset += _padded(num_bytes)
    if offset != len(buffer):
        raise ValueError(f"message has {len(buffer)} bytes, its columns end at {offset}")
    return Message(header, columns)


def text(raw: bytes) -> Tensor:
    """Bytes as a column (n,) uint8; an empty one is not sent."""
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0).byte()


def bytes_of(columns: Mapping[str, Tensor], name: str) -> bytes:
    """The bytes of such a column; no column is no bytes."""
    column = columns.get(name)
    return b"" if column is None else column.contiguous().view(torch.uint8).numpy().tobytes()


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _unpack(raw: bytes) -> dict[str, object]:
    try:
        head = msgpack.unpackb(raw, max_array_len=MAX_COLUMNS, max_map_len=MAX_COLUMNS)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"message header is not valid msgpack: {error}") from error
    expected = {field.name: field.type for field in fields(Header)} | {"columns": "list"}
    if not isinstance(head, dict) or head.keys() != expected.keys():
        raise ValueError(f"message header must have the fields {sorted(expected)}")
    for name, kind in expected.items():
        value = head[name]
        if type(value).__name__ != kind:
            raise ValueError(f"message header field {name!r} must be {kind}, got {_cut(value)}")
        if isinstance(value, int) and not 0 <= value < MAX_FIELD:
            raise ValueError(f"message header field {name!r} must be in [0, 2**63), got {value}")
        if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
            raise ValueError(f"message header field {name!r} has over {MAX_NAME_CHARS} characters")
    if list(head) != list(expected) or msgpack.packb(head) != raw:
        raise ValueError("message header is not encoded as this version encodes it")
    return head


def _column(entry: object) -> tuple[str, torch.dtype, list[int]]:
    match entry:
        case [str(name), str(dtype), [*sizes]] if (
            dtype in _DTYPES and len(sizes) <= 4 and len(name) <= MAX_NAME_CHARS
        ):
            shape = [size for size in sizes if type(size) is int and 0 <= size < 2**31]
            if len(shape) == len(sizes):
                return name, _DTYPES[dtype], shape
    raise ValueError(f"malformed column description {_cut(entry)}")


def _cut(value: object) -> str:
    """What a peer wrote, short enough for an error."""
    return repr(value)[:80]
