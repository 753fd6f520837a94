"""The errors that name a rank or a query. Bad input is a plain `ValueError` at the door."""

from __future__ import annotations


class PeerError(RuntimeError):
    """A rank died, stalled, broke the protocol or raised. `culprits` are the ranks to look at."""

    def __init__(self, culprits: tuple[int, ...], reason: str) -> None:
        named = ", ".join(f"rank {rank}" for rank in culprits)
        super().__init__(f"{named}: {reason}")
        self.culprits = culprits
        self.reason = reason


class CoverageError(RuntimeError):
    """An answer did not cover exactly what was asked, so there is no output. `holders` gave it."""

    def __init__(self, message: str, holders: tuple[int, ...]) -> None:
        super().__init__(message)
        self.holders = holders


class SnapshotError(ValueError):
    """A snapshot that some rank could not write or read. Every rank raises it, with the same words."""
