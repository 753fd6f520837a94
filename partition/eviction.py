"""How much documents are used, and which of them make room for another.

The choice is a pure function of the directory and of facts that all ranks agree on; `Usage` is what one
rank sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple, get_args

from .directory import Directory, without_document

Policy = Literal["lru", "reuse"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


class Use(NamedTuple):
    """When a document was last used, and how often: uses, each halved once per half-life."""

    last: int
    heat: float


class Usage:
    """Uses of documents by serial number, as one rank sees them: last use, and uses with an aging weight.

    Time is the number of the exchange, equal on all ranks.
    """

    def __init__(self, half_life: int) -> None:
        self._half_life = half_life
        self._uses: dict[int, Use] = {}

    def touch(self, serials: Iterable[int], now: int) -> None:
        """Count a use of each document."""
        for serial in serials:
            use = self.of(serial, now)
            self._uses[serial] = Use(last=now, heat=use.heat + 1.0)

    def of(self, serial: int, now: int) -> Use:
        """The last use of a document (-1: never) and its heat, as it has cooled until now."""
        use = self._uses.get(serial)
        if use is None:
            return Use(last=-1, heat=0.0)
        return Use(last=use.last, heat=use.heat * 0.5 ** ((now - use.last) / self._half_life))

    def keep(self, serials: set[int]) -> None:
        """Forget all documents but these."""
        self._uses = {serial: use for serial, use in self._uses.items() if serial in serials}


def ranked(directory: Directory, uses: Mapping[str, Use], policy: Policy) -> list[str]:
    """All documents, the one to be evicted first in front.

    `lru` goes by the last use. `reuse` goes by the heat: a document that is read again and again
    outlives one that was read once, however lately (LRFU, Lee et al. 2001). Sizes do not matter:
    what a larger document frees, its prefill would cost again. Ties go to the older document.

    Raises: ValueError for another policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")

    def worth(name: str) -> tuple[float, float, int]:
        last, heat = uses[name]
        serial = directory.documents[name].serial
        return (last, heat, serial) if policy == "lru" else (heat, last, serial)

    return sorted(directory.documents, key=worth)


def evicted(
    directory: Directory,
    order: list[str],
    kept: frozenset[str],
    *,
    lacking: Callable[[Directory], str | None],
    group: str,
    blocks: int,
) -> tuple[Directory, list[str]]:
    """The directory without as many documents, in `order`, as it takes until nothing is lacking.

    Pinned documents and those in `kept` stay. While `blocks` more are beyond the quota of `group`,
    only its documents go.

    Args:
        lacking: what keeps the next document out of a directory, None if it fits.
    Raises: ValueError if the others do not make enough room.
    """
    candidates = [name for name in order if name not in directory.pinned | kept]
    removed: list[str] = []
    while (lack := lacking(directory)) is not None:
        choice = candidates
        if directory.group_blocks(group) + blocks > directory.quotas.get(group, math.inf):
            choice = [name for name in choice if directory.documents[name].group == group]
        if not choice:
            raise ValueError(f"nothing more can be evicted, the rest is pinned or in use: {lack}")
        name = choice[0]
        candidates.remove(name)
        removed.append(name)
        directory = without_document(directory, name)
    return directory, removed
