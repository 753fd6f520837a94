"""What a query may see: attached documents, and the tail its own tokens grow.

Letters: Q queries, R runs. A run is [start, start + count) of entry ids. The tail of a running
request is private (ids beyond the corpus, at home only); the tail of a prefill is a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..partition.directory import Document

_NO_RUN = 2**31 - 1


class Scope(NamedTuple):
    """Per query: runs (Q, R, 2) int32 (start, count), sorted by start and padded; hidden (Q, 2)
    int32, the entry ids [from, to) that share a block with visible ones but lie ahead."""

    runs: Tensor
    hidden: Tensor


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """A reader of `documents` whose own tokens are entry ids `tail_start`, `tail_start` + 1, ...

    `into` is the document being written, None for private tokens. Made by `Runtime.request`.
    """

    documents: tuple[Document, ...]
    tail_start: int
    tail_limit: int
    into: Document | None = None
    length: int = 0
    blocks: list[int] = field(default_factory=list)
    is_open: bool = True

    @property
    def corpus_tokens(self) -> int:
        return sum(document.tokens for document in self.documents)

    @property
    def position(self) -> int:
        """Position of the next token: a prefill's document knows it, private tokens follow the corpus."""
        if self.into is not None:
            return self.into.position + self.length
        ends = [document.position + document.tokens for document in self.documents]
        return max(ends, default=0) + self.length


def scope_of(
    documents: Sequence[Document], tail_start: int | None, at: Tensor, *, block_tokens: int
) -> Scope:
    """The scope of queries that share documents and a tail.

    Args:
        at: (Q,) int32, the entry id of each query itself, which it sees together with the tail
        before it; ignored without a tail.
    """
    spans = sorted((document.start, document.tokens) for document in documents)
    runs, tail = _joined(spans, tail_start)
    per_query = torch.tensor(runs, dtype=torch.int32).reshape(1, len(runs), 2).repeat(len(at), 1, 1)
    hidden = torch.zeros(len(at), 2, dtype=torch.int32)
    if tail_start is not None:
        per_query[:, tail, 1] += at - tail_start + 1
        hidden[:, 0] = at + 1
        hidden[:, 1] = (at + block_tokens) // block_tokens * block_tokens
    return Scope(per_query, hidden)


def stacked(scopes: Sequence[Scope]) -> Scope:
    """The scopes of several groups of queries, one after another."""
    width = max((scope.runs.shape[1] for scope in scopes), default=0)
    padded = [_widened(scope.runs, width) for scope in scopes]
    return Scope(torch.cat(padded), torch.cat([scope.hidden for scope in scopes]))


def units_visible(ids: Tensor, runs: Tensor, unit_tokens: int) -> Tensor:
    """Which units (Q, K) have an entry in their query's runs (Q, R, 2)."""
    if runs.shape[1] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    first = ids.long() * unit_tokens
    starts = runs[..., 0].long().contiguous()
    run = torch.searchsorted(starts, first + unit_tokens - 1, right=True) - 1
    at = run.clamp(min=0)
    ends = (runs[..., 0].long() + runs[..., 1]).gather(1, at)
    return (ids >= 0) & (run >= 0) & (ends > first)


def _joined(
    spans: list[tuple[int, int]], tail_start: int | None
) -> tuple[list[tuple[int, int]], int]:
    """Sorted runs with neighbours joined, the still empty tail among them, and the tail's index."""
    if tail_start is not None:
        spans = sorted([*spans, (tail_start, 0)])
    runs: list[tuple[int, int]] = []
    tail = 0
    for start, count in spans:
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + count)
        else:
            runs.append((start, count))
        if start == tail_start:
            tail = len(runs) - 1
    return runs, tail


def _widened(runs: Tensor, width: int) -> Tensor:
    padding = torch.tensor([_NO_RUN, 0], dtype=torch.int32)
    missing = width - runs.shape[1]
    return torch.cat((runs, padding.expand(len(runs), missing, 2)), dim=1)
