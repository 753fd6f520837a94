"""How much the documents are used, as one rank sees it: last use, and uses with an aging weight."""

from __future__ import annotations

from collections.abc import Iterable

from ..partition.eviction import Use


class Usage:
    """Uses of documents by serial number. Time is the number of the exchange, equal on all ranks."""

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
