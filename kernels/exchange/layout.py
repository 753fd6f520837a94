"""Where messages lie in the memory that every rank can write to: pure arithmetic, no device.

Letters: W ranks, N rows that one rank can send to another, H heads, C value columns, D query
columns, E units of a list, S rows of a chunk.

Every rank has one arena of the same layout. In it, for both parities and every other rank: the
inbox, chunks of queries that it asks; the window, its answers; a signal for each chunk in both
directions; and one abort word. A chunk is one contiguous piece, so that one put can carry it:

    inbox chunk    list S-1 .. list 1, list 0, head | query 0, query 1 .. query S-1
    window chunk   S records: out (H, C), lse (H,) fp32, covered (2,) int32

The head is the version of the tables, a list is its length and then its units. Heads end at a
multiple of a query's words, so a query is a row of the inbox seen as (rows, H, D); and what a chunk
uses of its S rows is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..limits import MAX_CHUNK, MAX_MESSAGE_HEADS, MAX_MESSAGE_ROWS, MAX_RANKS, MAX_UNITS

HEAD = 4  # words, as many as keep the queries aligned
LIST_HEAD = 4
_LINE = 32  # words of 128 bytes: regions begin at multiples of it


def chunk_of(rows: int) -> int:
    """Queries of a chunk where the largest bucket has `rows`: a quarter, so that four can be under way."""
    return min(max(rows // 4, 1), MAX_CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """Sizes of all messages, in 4-byte words; equal on every rank.

    rows: N, the world's largest bucket. query_words: of H * D elements. answer_words: of H * C.
    staged: with room to put a message together before it leaves, for peers that cannot be stored to.
    """

    world_size: int
    rows: int
    heads: int
    query_words: int
    answer_words: int
    units: int
    chunk: int = MAX_CHUNK
    staged: bool = False

    def __post_init__(self) -> None:
        limits = (
            ("world_size", self.world_size, 2, MAX_RANKS),
            ("rows", self.rows, 1, MAX_MESSAGE_ROWS),
            ("chunk", self.chunk, 1, MAX_CHUNK),
            ("heads", self.heads, 1, MAX_MESSAGE_HEADS),
            ("units", self.units, 1, MAX_UNITS),
        )
        for name, value, least, most in limits:
            if not least <= value <= most:
                raise ValueError(f"{name} must be {least} to {most}, got {value}")
        for name in ("query_words", "answer_words"):
            value = getattr(self, name)
            if value < 4 or value % 4:
                raise ValueError(f"{name} must be a positive multiple of 4, got {value}")

    @property
    def chunks(self) -> int:
        """Of a message of N rows."""
        return -(-self.rows // self.chunk)

    @property
    def chunk_rows(self) -> int:
        """The most rows that a chunk can have."""
        return min(self.rows, self.chunk)

    @property
    def list_words(self) -> int:
        return LIST_HEAD + _up(self.units, 4)

    @property
    def list_rows(self) -> int:
        """How many queries' room the lists of a chunk take."""
        return -(-(HEAD + self.chunk * self.list_words) // self.query_words)

    @property
    def inbox_chunk(self) -> int:
        """Words of a chunk of queries."""
        return (self.list_rows + self.chunk) * self.query_words

    @property
    def record(self) -> int:
        """Of an answer."""
        return _up(self.answer_words + self.heads + 2, 4)

    @property
    def window_chunk(self) -> int:
        return self.chunk * self.record

    @property
    def _messages(self) -> int:
        return 2 * self.world_size * self.chunks

    @property
    def window(self) -> int:
        """The inbox begins at 0, so that queries are rows of the arena."""
        return _up(self._messages * self.inbox_chunk, _LINE)

    @property
    def query_signals(self) -> int:
        """(2, W, chunks) int64."""
        return _up(self.window + self._messages * self.window_chunk, _LINE)

    @property
    def answer_signals(self) -> int:
        return _up(self.query_signals + 2 * self._messages, _LINE)

    @property
    def abort(self) -> int:
        """One int64."""
        return _up(self.answer_signals + 2 * self._messages, _LINE)

    @property
    def outbox(self) -> int:
        """Messages to other ranks before they leave, laid out as the inbox; only if `staged`."""
        return self.abort + _LINE

    @property
    def outgoing(self) -> int:
        """Answers before they leave, laid out as the window; only if `staged`."""
        return _up(self.outbox + self._messages * self.inbox_chunk, _LINE)

    @property
    def words(self) -> int:
        """Of the arena."""
        if not self.staged:
            return self.outbox
        return _up(self.outgoing + self._messages * self.window_chunk, _LINE)

    @property
    def num_bytes(self) -> int:
        return 4 * self.words

    @property
    def query_rows(self) -> int:
        """Of the inbox, seen as (rows, H, D)."""
        return self._messages * (self.list_rows + self.chunk)

    def query_row(self, *, parity: int, source: int, seat: int) -> int:
        """Which row of the inbox is the query that `source` sent as its `seat`-th."""
        message = (parity * self.world_size + source) * self.chunks + seat // self.chunk
        return message * (self.list_rows + self.chunk) + self.list_rows + seat % self.chunk


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
