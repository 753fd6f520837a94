"""Columns of messages: only those of a kind's table, with its dtype and dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qroam.runtime.transport.messages import Header, Message
from qroam.runtime.transport.schema import check_columns, column

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def message(kind: str, **columns: Tensor) -> Message:
    header = Header(kind=kind, incarnation=0, channel=0, epoch=1, tables=0)
    return Message(header, {name.replace("__", "."): rows for name, rows in columns.items()})


def test_columns_of_the_table_pass_and_may_be_absent() -> None:
    query, weights = torch.zeros(1, 2, 3, dtype=BF16), torch.zeros(1, 2)
    select = message("select", index__query=query, index__weights=weights)
    check_columns(select, payload=BF16, compute=F32)
    check_columns(message("select"), payload=BF16, compute=F32)
    assert column(select, "index.query") is query
    with pytest.raises(ValueError, match=r"column 'index\.runs' is missing"):
        column(select, "index.runs")


def test_any_step_carries_writes_and_an_answer_none() -> None:
    ids = torch.zeros(2, dtype=torch.int32)
    check_columns(message("attend", push__ids=ids), payload=F32, compute=F32)
    with pytest.raises(ValueError, match=r"'attend-answer' messages have no column push\.ids"):
        check_columns(message("attend-answer", push__ids=ids), payload=F32, compute=F32)


@pytest.mark.parametrize(
    ("kind", "rows", "says"),
    [
        ("attend", torch.zeros(2, dtype=torch.int64), "must be torch.int32 with 1 dimensions"),
        ("attend", torch.zeros(2, 1, dtype=torch.int32), r"got torch.int32 \(2, 1\)"),
        ("select", torch.zeros(2, dtype=torch.int32), "'select' messages have no column fetch"),
        ("steal", torch.zeros(2, dtype=torch.int32), "no messages of kind 'steal'"),
    ],
    ids=["dtype", "dimensions", "another kind", "no kind"],
)
def test_other_columns_are_refused(kind: str, rows: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_columns(message(kind, fetch=rows), payload=F32, compute=F32)


def test_payload_and_compute_follow_the_runtime() -> None:
    answer = message("attend-answer", A__out=torch.zeros(1, 2, 3, dtype=BF16))
    check_columns(answer, payload=BF16, compute=F32)
    with pytest.raises(ValueError, match=r"'A\.out' must be torch.float64"):
        check_columns(answer, payload=F64, compute=F64)
