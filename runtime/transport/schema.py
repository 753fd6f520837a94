"""Every message that ranks exchange: its kind, its columns, and the dtype and dimensions of each.

A new message, or a new column of one, is added here and nowhere else: whoever sends it takes the name
from its table, and `check_columns` refuses what no table has. What the numbers mean is checked where
they are read. Any step may carry rows written for copies elsewhere (`WRITES`).

Letters: n rows of a column, Q queries, h heads of a branch, D columns, L layers, R copies of a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ...partition.layout import Form
from .messages import Message

FORMS: tuple[Form, ...] = get_args(Form)


class Field(NamedTuple):
    """A column: `payload` is the dtype of queries and outputs, `compute` that of the arithmetic."""

    dtype: torch.dtype | Literal["payload", "compute"]
    dims: int


_BYTES, _BYTE_ROWS = Field(torch.uint8, 1), Field(torch.uint8, 2)
_INTS, _INT_ROWS, _INT_RUNS = (Field(torch.int32, dims) for dims in (1, 2, 3))
_LONGS, _DOUBLES = Field(torch.int64, 1), Field(torch.float64, 1)

Columns = dict[str, Field]

# Rows written for copies at other ranks: stored ids (n,) and encoded rows (n, bytes).
WRITES: Columns = {
    "push.ids": _INTS,
    "push.rows": _BYTE_ROWS,
    "push_index.ids": _INTS,
    "push_index.rows": _BYTE_ROWS,
}
# Opening a world: what ranks compare, and on GPUs which device each has.
OPEN: Columns = {"config": _BYTES, "heads": _INTS}
DEVICE: Columns = {"reason": _BYTES, "device": _BYTES}
# Index queries (Q, Hi, D), head weights (Q, Hi), what they see, and whom the requester can ask (W,).
SELECT: Columns = {
    "index.query": Field("payload", 3),
    "index.weights": Field("compute", 2),
    "index.runs": _INT_RUNS,
    "index.offsets": _INT_ROWS,
    "index.askable": _BYTES,
}
SELECT_ANSWER: Columns = {"score": Field("compute", 1), "id": _INTS, "seen": _INTS}
# Units to fetch; of each payload form its routed pairs (n): who, how many units, and rows (n, h, D).
ATTEND: Columns = {"fetch": _INTS} | {
    f"{form}.{part}": field
    for form in FORMS
    for part, field in {
        "item": _INTS,
        "count": _INTS,
        "units": _INTS,
        "query": Field("payload", 3),
        "hidden": _INT_ROWS,
        "offsets": _INTS,
    }.items()
}
ATTEND_ANSWER: Columns = {"fetch.rows": _BYTE_ROWS, "fetch.mark": _INTS} | {
    f"{form}.{part}": field
    for form in FORMS
    for part, field in {
        "out": Field("payload", 3),
        "lse": Field("compute", 2),
        "covered": _INT_ROWS,
    }.items()
}
# Copying a whole document: keys (n,) of blocks; rows of all layers side by side, marks (n, L).
COPY: Columns = {"copy": _INTS, "copy_index": _INTS}
COPY_ANSWER: Columns = {
    f"{name}.{part}": field
    for name in COPY
    for part, field in {"rows": _BYTE_ROWS, "marks": _INT_ROWS}.items()
}
# Documents: (tokens, position) and content hashes; how much each is used, and whether it is in use.
PUBLISH: Columns = {"publish": _LONGS, "hashes": _BYTES}
EVICT: Columns = {"last": _LONGS, "heat": _DOUBLES, "held": _INTS}
# Snapshots: what ranks found, how their work goes, and the part that each wrote.
AGREE: Columns = {"reason": _BYTES, "digest": _BYTES, "token": _BYTES}
STATE: Columns = {"state": _BYTES}
SNAPSHOT_PARTS: Columns = {
    "files.kind": _INTS,
    "files.rows": _INTS,
    "files.hashes": _BYTE_ROWS,
    "entries.keys": _INTS,
    "entries.hashes": _BYTE_ROWS,
    "index.keys": _INTS,
    "index.hashes": _BYTE_ROWS,
}
RESTORE: Columns = {**AGREE, **STATE, "open": _INTS}
VERIFY: Columns = {**STATE, "at": _INTS, "hashes": _BYTE_ROWS, "changed": _BYTES}
# Going on in a new incarnation: facts, how far blocks are written (L, n), and the tables.
REJOIN: Columns = {
    "facts": _LONGS,
    "fill": _INT_ROWS,
    "documents": _BYTES,
    "blocks": _INTS,
    "owners": _INT_ROWS,
    "slots": _INT_ROWS,
    "generations": _INTS,
}

REFUSED = "refused"
_BY_KIND: Mapping[str, Columns] = {
    "open": OPEN,
    "device": DEVICE,
    "serve": {},
    "select": SELECT | WRITES,
    "select-answer": SELECT_ANSWER,
    "attend": ATTEND | WRITES,
    "attend-answer": ATTEND_ANSWER,
    "copy": COPY | WRITES,
    "copy-answer": COPY_ANSWER,
    "publish": PUBLISH | WRITES,
    "evict": EVICT | WRITES,
    "snapshot-begin": AGREE | WRITES,
    "snapshot-write": STATE | WRITES,
    "snapshot-parts": SNAPSHOT_PARTS | WRITES,
    "snapshot-commit": STATE | WRITES,
    "restore": RESTORE | WRITES,
    "verify": VERIFY | WRITES,
    "meet": WRITES,
    "rejoin": REJOIN | WRITES,
    REFUSED: {"reason": _BYTES},
}


def check_columns(message: Message, *, payload: torch.dtype, compute: torch.dtype) -> None:
    """Raise ValueError for a column that messages of this kind do not have, or of another dtype or
    number of dimensions than its table says."""
    kind = message.header.kind
    if kind not in _BY_KIND:
        raise ValueError(f"there are no messages of kind {kind!r}")
    table = _BY_KIND[kind]
    unknown = sorted(message.columns.keys() - table.keys())
    if unknown:
        raise ValueError(f"{kind!r} messages have no column {', '.join(unknown)[:80]}")
    for name, column in message.columns.items():
        dtype = table[name].dtype
        wanted = (
            dtype
            if isinstance(dtype, torch.dtype)
            else {"payload": payload, "compute": compute}[dtype]
        )
        if column.dtype != wanted or column.dim() != table[name].dims:
            raise ValueError(
                f"column {name!r} must be {wanted} with {table[name].dims} dimensions, "
                f"got {column.dtype} {tuple(column.shape)}"
            )


def column(message: Message, name: str) -> Tensor:
    """A column that has to be there, of a message that `check_columns` passed."""
    if name not in message.columns:
        raise ValueError(f"column {name!r} is missing")
    return message.columns[name]
