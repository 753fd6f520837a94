"""Where a rank's blocks and their tables lie in memory that every rank can read: pure arithmetic.

Every rank has one region of the same layout, so a rank that knows where another's region begins can
find an entry there without a message:

    slot_of (keys,) | generation (slots,) | fill (layers, slots)        int32
    entries of layer 0, of layer 1, ...                                 slots * block_tokens rows each
    staged rows                                                         entries fetched from others

Rows follow one another without gaps, through all layers up to the last staged row: an entry index
that counts from a layer's first row reaches the staged rows as well.
"""

from __future__ import annotations

from dataclasses import dataclass

_LINE = 128  # bytes: the tables and the entries begin at multiples of it


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLayout:
    """Sizes and byte offsets of a region; equal on every rank.

    keys: of the directory, stored ids are below keys * block_tokens. entry_bytes: of a row, a
    multiple of 16. staged: rows for entries that a step may fetch.
    """

    layers: int
    keys: int
    slots: int
    block_tokens: int
    entry_bytes: int
    staged: int

    def __post_init__(self) -> None:
        for name in ("layers", "keys", "slots", "block_tokens", "staged"):
            value, least = getattr(self, name), 0 if name == "staged" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.entry_bytes < 16 or self.entry_bytes % 16:
            raise ValueError(
                f"entry_bytes must be a positive multiple of 16, got {self.entry_bytes}"
            )
        ids, rows = self.keys * self.block_tokens, self.first_staged(0) + self.staged
        if ids >= 2**31 or rows >= 2**31:
            raise ValueError(f"ids and rows must be below 2**31, got {ids} ids and {rows} rows")

    @property
    def slot_of(self) -> int:
        """Of (keys,) int32, -1 where a block is not there."""
        return 0

    @property
    def generation(self) -> int:
        """Of (slots,) int32."""
        return _up(4 * self.keys)

    @property
    def fill(self) -> int:
        """Of (layers, slots) int32, how many entries of a slot's block are written."""
        return self.generation + _up(4 * self.slots)

    def entries_of(self, layer: int) -> int:
        """Of a layer's first row; `layers` gives that of the staged rows."""
        first = self.fill + _up(4 * self.layers * self.slots)
        return first + layer * self.slots * self.block_tokens * self.entry_bytes

    def first_staged(self, layer: int) -> int:
        """Entry index, counted from the layer's first row, of the first staged row."""
        return (self.layers - layer) * self.slots * self.block_tokens

    @property
    def num_bytes(self) -> int:
        """Of the region; it ends with the last staged row."""
        return self.entries_of(self.layers) + self.staged * self.entry_bytes


def _up(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE
