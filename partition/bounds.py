"""Bounds of names and numbers: what a writer accepts is what every reader takes back.

Documents, groups and quotas go through the directory, messages and snapshots. All of them read this
table, so nothing is acknowledged here and refused there. Upper bounds are inclusive.
"""

from __future__ import annotations

import operator
from typing import Final, TypeGuard

MAX_NAME_CHARS: Final = 256  # of a document or a group
MAX_DOCUMENTS: Final = 1 << 20
MAX_TOKENS: Final = (1 << 31) - 1  # of a document
MAX_POSITION: Final = (1 << 31) - 1  # of a token
MAX_QUOTA: Final = (1 << 31) - 1  # blocks
MAX_BLOCK_TOKENS: Final = 1 << 20
MAX_BRANCHES: Final = 1 << 10
MAX_LAYERS: Final = 1 << 12
MAX_ENTRY_BYTES: Final = 1 << 24
MAX_SERIAL: Final = (1 << 62) - 1


def is_name(value: object) -> TypeGuard[str]:
    """Whether it is a text of at most `MAX_NAME_CHARS` characters that UTF-8 can encode."""
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)


def is_whole(value: object, low: int, high: int) -> TypeGuard[int]:
    """Whether it is an int, and no bool, in [low, high]."""
    return type(value) is int and low <= value <= high


def whole(value: object, name: str, low: int, high: int) -> int:
    """The number as an int; an integer of numpy, or a tensor of one, is one too.

    Raises: ValueError that gives its name and the bounds, for bools, floats, and what lies outside.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError):
        number = None
    if number is None or not low <= number <= high:
        raise ValueError(f"{name} must be a whole number in [{low}, {high}], got {value!r}")
    return number
