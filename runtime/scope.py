"""What a query may see: attached documents, and the tail its own tokens grow.

Letters: Q queries, R runs, B tokens of a block. A run is [start, start + count) of entry ids. The
tail of a running request is private (ids beyond the corpus, at home only); the tail of a prefill is
a document. An offset is how far a document is attached from its canonical position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..partition.directory import Document

MAX_TOP_K = 1 << 20  # units that one query selects
MAX_OFFSETS = 64  # different ones of a request; a query is rotated once for each
_NO_RUN = 2**31 - 1


class Attached(NamedTuple):
    """A document, attached `offset` positions behind where its entries were computed."""

    document: Document
    offset: int

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.document.position + self.offset + self.document.tokens


class Scope(NamedTuple):
    """Per query: runs (Q, R, 2) int32 (start, count), sorted by start and padded; hidden (Q, 2)
    int32, the entry ids [from, to) that share a block with visible ones but lie ahead; offsets
    (Q, R) int32 of the runs, None if all are 0. `sources` is whose entries they are: a scope is
    refused once one of them is gone."""

    runs: Tensor
    hidden: Tensor
    offsets: Tensor | None = None
    sources: tuple[Document | Request, ...] = ()


class Selection(NamedTuple):
    """Unit ids (Q, K) or (Q, G, K) int32, distinct, -1 padding anywhere; and what each query sees."""

    ids: Tensor
    unit_tokens: int
    scope: Scope


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A reader of documents, whose own tokens fill the blocks `tail` in their order.

    `into` is the document being written, None for private tokens. `blocks` are the seats of private
    blocks in this rank's pool. Made by `Runtime.request`.
    """

    attached: tuple[Attached, ...]
    tail: tuple[int, ...]
    capacity: int
    block_tokens: int
    into: Document | None = None
    length: int = 0
    blocks: list[int] = field(default_factory=list)
    is_open: bool = True

    @property
    def documents(self) -> tuple[Document, ...]:
        return tuple(attached.document for attached in self.attached)

    @property
    def tail_start(self) -> int:
        """The entry id of its first own token."""
        return self.tail[0] * self.block_tokens

    @property
    def corpus_tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def position(self) -> int:
        """Position of the next token: a prefill's document knows it, private tokens follow the corpus."""
        if self.into is not None:
            return self.into.position + self.length
        return max((attached.end for attached in self.attached), default=0) + self.length

    @property
    def sources(self) -> tuple[Document | Request, ...]:
        """Everything whose entries it sees, itself included."""
        into = () if self.into is None else (self.into,)
        return (*self.documents, *into, self)

    def ids(self, first: int, end: int) -> Tensor:
        """Entry ids (n,) int32 of its own tokens [first, end)."""
        at = torch.arange(first, end, dtype=torch.int32)
        blocks = torch.tensor(self.tail, dtype=torch.int32)
        return blocks[at // self.block_tokens] * self.block_tokens + at % self.block_tokens

    def indices(self, ids: Tensor) -> Tensor:
        """Which of its own tokens entry ids (n,) are, int64; -1 for those that are none of them."""
        blocks = torch.tensor(self.tail)
        ordered, order = blocks.sort()
        block = ids.long() // self.block_tokens
        at = torch.searchsorted(ordered, block).clamp(max=len(blocks) - 1)
        index = order[at] * self.block_tokens + ids % self.block_tokens
        return torch.where((ordered[at] == block) & (index < self.length), index, -1)


def scope_of(
    attached: Sequence[Attached], request: Request | None, at: Tensor, *, block_tokens: int
) -> Scope:
    """The scope of queries that share documents and a tail.

    Args:
        at: (Q,) int32, the entry id of each query itself, which it sees together with its request's
        tail before it; ignored without a request.
    """
    spans = [
        (first * block_tokens, count, offset)
        for document, offset in attached
        for first, count in _segments(document.blocks, document.tokens, block_tokens)
    ]
    spans = _joined(sorted(spans))
    runs = torch.tensor([span[:2] for span in spans], dtype=torch.int32).reshape(1, -1, 2)
    runs = runs.repeat(len(at), 1, 1)
    offsets = torch.tensor([span[2] for span in spans], dtype=torch.int32).repeat(len(at), 1)
    hidden = torch.zeros(len(at), 2, dtype=torch.int32)
    sources: tuple[Document | Request, ...] = tuple(document for document, _ in attached)
    if request is not None:
        tail = _tail_runs(request, at, block_tokens)
        runs = torch.cat((runs, tail), dim=1)
        offsets = torch.nn.functional.pad(offsets, (0, tail.shape[1]))
        order = runs[..., 0].argsort(dim=1, stable=True)
        runs = runs.gather(1, order[..., None].expand_as(runs))
        offsets = offsets.gather(1, order)
        hidden[:, 0] = at + 1
        hidden[:, 1] = (at + block_tokens) // block_tokens * block_tokens
        sources = request.sources
    shifted = any(offset for _, offset in attached)
    return Scope(runs, hidden, offsets if shifted else None, sources)


def stacked(scopes: Sequence[Scope]) -> Scope:
    """The scopes of several groups of queries, one after another."""
    width = max((scope.runs.shape[1] for scope in scopes), default=0)
    padded = [_widened(scope.runs, width) for scope in scopes]
    offsets = None
    if any(scope.offsets is not None for scope in scopes):
        offsets = torch.cat([_widened_offsets(scope, width) for scope in scopes])
    sources = {id(source): source for scope in scopes for source in scope.sources}
    hidden = torch.cat([scope.hidden for scope in scopes])
    return Scope(torch.cat(padded), hidden, offsets, tuple(sources.values()))


def units_visible(ids: Tensor, runs: Tensor, unit_tokens: int) -> Tensor:
    """Which units (Q, K) have an entry in their query's runs (Q, R, 2)."""
    if runs.shape[1] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    at, known = _run_of(ids, runs, unit_tokens)
    ends = (runs[..., 0].long() + runs[..., 1]).gather(1, at)
    return (ids >= 0) & known & (ends > ids.long() * unit_tokens)


def unit_offsets(ids: Tensor, runs: Tensor, offsets: Tensor, unit_tokens: int) -> Tensor:
    """The offset (Q, K) int32 of each unit, which lies in one block; 0 for padding.

    Args: runs (Q, R, 2) and their offsets (Q, R).
    """
    if runs.shape[1] == 0:
        return torch.zeros_like(ids)
    at, known = _run_of(ids, runs, unit_tokens)
    return torch.where((ids >= 0) & known, offsets.gather(1, at), 0)


def only_runs(runs: Tensor, kept: Tensor) -> Tensor:
    """The runs (Q, R, 2) that are `kept` (Q, R); the others become empty."""
    nothing = torch.tensor([_NO_RUN, 0], dtype=torch.int32)
    return torch.where(kept[..., None], runs, nothing)


def _run_of(ids: Tensor, runs: Tensor, unit_tokens: int) -> tuple[Tensor, Tensor]:
    """The last run (Q, K) that starts before the end of each unit, and whether there is one."""
    starts = runs[..., 0].long().contiguous()
    run = torch.searchsorted(starts, (ids.long() + 1) * unit_tokens - 1, right=True) - 1
    return run.clamp(min=0), run >= 0


def _segments(blocks: Sequence[int], tokens: int, block_tokens: int) -> list[tuple[int, int]]:
    """Neighbouring blocks put together: (first block, entries), in the order of the document."""
    segments: list[tuple[int, int]] = []
    for number, block in enumerate(blocks):
        count = min(tokens - number * block_tokens, block_tokens)
        if segments and segments[-1][0] * block_tokens + segments[-1][1] == block * block_tokens:
            segments[-1] = (segments[-1][0], segments[-1][1] + count)
        else:
            segments.append((block, count))
    return segments


def _tail_runs(request: Request, at: Tensor, block_tokens: int) -> Tensor:
    """Runs (Q, R, 2) of a request's own tokens up to each query; empty ones are padding."""
    index, runs, before = request.indices(at), [], 0
    for first, capacity in _segments(request.tail, len(request.tail) * block_tokens, block_tokens):
        count = (index + 1 - before).clamp(0, capacity)
        start = torch.where(count > 0, first * block_tokens, _NO_RUN)
        runs.append(torch.stack((start, count), dim=1))
        before += capacity
    return torch.stack(runs, dim=1).to(torch.int32)


def _joined(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Sorted (start, count, offset), neighbours of the same offset joined."""
    runs: list[tuple[int, int, int]] = []
    for start, count, offset in spans:
        if runs and runs[-1][0] + runs[-1][1] == start and runs[-1][2] == offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + count, offset)
        else:
            runs.append((start, count, offset))
    return runs


def _widened(runs: Tensor, width: int) -> Tensor:
    padding = torch.tensor([_NO_RUN, 0], dtype=torch.int32)
    missing = width - runs.shape[1]
    return torch.cat((runs, padding.expand(len(runs), missing, 2)), dim=1)


def _widened_offsets(scope: Scope, width: int) -> Tensor:
    queries, runs = scope.runs.shape[:2]
    offsets = torch.zeros(queries, width, dtype=torch.int32)
    if scope.offsets is not None:
        offsets[:, :runs] = scope.offsets
    return offsets
