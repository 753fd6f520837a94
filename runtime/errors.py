"""The errors that name a rank or a query. A bad argument is a plain `ValueError`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class PeerError(RuntimeError):
    """A rank died, stalled, broke the protocol or raised. `culprits` are the ranks to look at."""

    def __init__(self, culprits: tuple[int, ...], reason: str) -> None:
        named = ", ".join(f"rank {rank}" for rank in culprits)
        super().__init__(f"{named}: {reason}" if named else reason)
        self.culprits = culprits
        self.reason = reason


class BlocksLostError(PeerError):
    """What was asked needs blocks of which no rank that can be asked has a copy.

    `blocks`: by document, the runs of its blocks, counted from its first. `culprits` had copies.
    """

    def __init__(
        self, culprits: tuple[int, ...], reason: str, blocks: Mapping[str, tuple[range, ...]]
    ) -> None:
        where = in_words(blocks)
        super().__init__(culprits, f"{reason}; nobody else has a copy of blocks {where}")
        self.blocks = blocks


class CoverageError(RuntimeError):
    """An answer did not cover exactly what was asked, so there is no output. `holders` gave it."""

    def __init__(self, message: str, holders: tuple[int, ...]) -> None:
        super().__init__(message)
        self.holders = holders


class Complaint(NamedTuple):
    """An item, one (query, branch), that was not served as asked, by whom, and how."""

    item: int
    holder: int
    what: str


def coverage_error(layer: int, complaints: Sequence[Complaint], *, branches: int) -> CoverageError:
    """The error that names layer, queries and holders; the first few in words."""
    listed = [
        f"query {item // branches} at rank {holder} {what}" for item, holder, what in complaints[:4]
    ]
    more = f"; and {len(complaints) - 4} more" if len(complaints) > 4 else ""
    holders = tuple(sorted({complaint.holder for complaint in complaints}))
    return CoverageError(f"layer {layer}: {'; '.join(listed)}{more}", holders)


class SnapshotError(ValueError):
    """A snapshot that some rank could not write or read. Every rank raises it, with the same words."""


def in_words(blocks: Mapping[str, tuple[range, ...]]) -> str:
    """Runs of blocks by document, as errors name them."""
    return "; ".join(
        f"{', '.join(map(_in_words, runs))} of {name!r}" for name, runs in blocks.items()
    )


def _in_words(run: range) -> str:
    return f"{run.start}-{run.stop - 1}" if len(run) > 1 else f"{run.start}"
