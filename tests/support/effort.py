"""How much a run of the tests does: the quick ones of `make test`, or all of `make test-all`.

`pytest` runs the quick tests; `pytest --full` adds the tests marked `slow` and draws as many examples
of each property as it is given for a full run. `conftest.py` reads the option before any test module
is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

full = False


def examples(count: int, *, quick: int) -> int:
    """`max_examples` of a property: `count` in a full run, `quick` otherwise."""
    return count if full else quick


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """`values` for `parametrize`, of which all but the first `count` are slow.

    With several arguments each value is a tuple of them.
    """
    return [v if number < count else _slow(v) for number, v in enumerate(values)]


def slow_between(step: int, values: Iterable[Any]) -> list[Any]:
    """`values` for `parametrize`, of which all but each `step`-th, from the first on, are slow."""
    return [_slow(v) if number % step else v for number, v in enumerate(values)]


def _slow(value: Any) -> Any:
    values = value if type(value) is tuple else (value,)
    return pytest.param(*values, marks=pytest.mark.slow)
