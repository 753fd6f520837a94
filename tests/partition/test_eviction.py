"""Which documents make room: by last use or by heat, within a quota, and never pinned ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from directories import B, added, empty

from qroam.partition.directory import Directory, with_pin, with_quota
from qroam.partition.eviction import Usage, Use, evicted, ranked


def four() -> Directory:
    """Documents a to d of one block each, added in this order; the directory is full."""
    directory = empty(max_blocks=4)
    for name in "abcd":
        directory = added(directory, name, B)
    return directory


def lacks(blocks: int) -> Callable[[Directory], str | None]:
    """What is lacking until so many blocks are free."""

    def lacking(directory: Directory) -> str | None:
        free = directory.max_blocks - directory.num_blocks
        return None if free >= blocks else f"{blocks - free} blocks"

    return lacking


def test_the_least_recently_used_goes_first_and_heat_may_say_otherwise() -> None:
    uses = {"a": Use(9, 1.0), "b": Use(2, 8.0), "c": Use(2, 3.0), "d": Use(-1, 0.0)}
    assert ranked(four(), uses, "lru") == ["d", "c", "b", "a"]
    assert ranked(four(), uses, "reuse") == ["d", "a", "c", "b"]


def test_ties_go_to_the_older_document() -> None:
    uses = dict.fromkeys("abcd", Use(1, 1.0))
    assert ranked(four(), uses, "lru") == ranked(four(), uses, "reuse") == ["a", "b", "c", "d"]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown policy 'fifo'; known: lru, reuse"):
        ranked(four(), {}, "fifo")  # type: ignore[arg-type]


def test_no_more_go_than_it_takes() -> None:
    directory = four()
    left, gone = evicted(directory, list("cabd"), frozenset(), lacking=lacks(2), group="", blocks=2)
    assert gone == ["c", "a"]
    assert list(left.documents) == ["b", "d"]
    assert list(directory.documents) == ["a", "b", "c", "d"]
    same, none = evicted(left, list("bd"), frozenset(), lacking=lacks(2), group="", blocks=2)
    assert (same, none) == (left, [])


def test_pinned_and_kept_documents_stay() -> None:
    directory = with_pin(four(), "a", True)
    kept = frozenset({"b"})
    _, gone = evicted(directory, list("abcd"), kept, lacking=lacks(2), group="", blocks=2)
    assert gone == ["c", "d"]
    with pytest.raises(ValueError, match="the rest is pinned or in use: 1 blocks"):
        evicted(directory, list("abcd"), kept, lacking=lacks(3), group="", blocks=3)


def test_beyond_its_quota_a_group_evicts_only_its_own() -> None:
    directory = with_quota(four(), "", 4)
    _, gone = evicted(directory, list("abcd"), frozenset(), lacking=lacks(1), group="", blocks=1)
    assert gone == ["a"]
    # Group g has nothing: not even one block more is within a quota of none.
    closed = with_quota(four(), "g", 0)
    with pytest.raises(ValueError, match="nothing more can be evicted"):
        evicted(closed, list("abcd"), frozenset(), lacking=lacks(1), group="g", blocks=1)


def test_heat_halves_once_per_half_life_and_every_use_adds_one() -> None:
    usage = Usage(half_life=10)
    assert usage.of(1, 0) == Use(last=-1, heat=0.0)
    usage.touch([1, 2], 0)
    usage.touch([1], 10)
    assert usage.of(1, 10) == Use(last=10, heat=1.5)
    assert usage.of(1, 20) == Use(last=10, heat=0.75)
    assert usage.of(2, 20) == Use(last=0, heat=0.25)
    usage.keep({2})
    assert usage.of(1, 20) == Use(last=-1, heat=0.0)
    assert usage.of(2, 20).last == 0
