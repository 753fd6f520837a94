"""Bounds of names and numbers: what passes is an int in the bounds, all else is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qroam.partition.bounds import MAX_NAME_CHARS, is_name, is_whole, whole


@pytest.mark.parametrize("value", [0, 5, np.int64(3), np.uint8(4), torch.tensor(2)], ids=str)
def test_integers_of_any_kind_are_whole(value: object) -> None:
    number = whole(value, "tokens", 0, 5)
    assert type(number) is int
    assert number == int(value)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        1.0,
        np.float64(1),
        float("inf"),
        "1",
        None,
        -1,
        6,
        2**63,
        torch.tensor([1, 2]),
    ],
    ids=str,
)
def test_all_else_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"tokens must be a whole number in \[0, 5\], got "):
        whole(value, "tokens", 0, 5)
    assert not is_whole(value, 0, 5)


def test_names_are_what_utf_8_can_carry() -> None:
    assert all(map(is_name, ("", "a", "x" * MAX_NAME_CHARS, "\u4e2d/\n", "\x00")))
    assert not any(map(is_name, ("x" * (MAX_NAME_CHARS + 1), "\ud800", "a\udfffb", b"a", None, 1)))
