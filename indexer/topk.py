"""Which units a query selects: visibility, exact local and merged top-k, selection blocks.

Dimension letters: Q queries, E entries, M candidates, K selected, R runs, U units. A higher score
wins and among equal scores the lower id (zeros of either sign are equal), so a selection does not depend
on how entries are sharded, as far as their scores do not (`dsa.scores`).
A score of -inf means "not visible" and is never selected. Selections are int32, ids ascending, then
-1 (score -inf) as padding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def visible(ids: Tensor, runs: Tensor) -> Tensor:
    """Which entries each query may see, (Q, E) bool.

    Args:
        ids: (E,) int32, ascending, not negative.
        runs: (Q, R, 2) int32, a query's intervals of ids as (start, count); rows that a query
            does not need are padded with (2**31 - 1, 0).
    """
    _check_ids(ids)
    if runs.dim() != 3 or runs.shape[2] != 2 or runs.dtype != torch.int32:
        raise ValueError(f"runs must be (Q, R, 2) int32, got {tuple(runs.shape)} {runs.dtype}")
    starts, counts = runs.long().unbind(-1)
    bounds = ids.long()
    first = torch.searchsorted(bounds, starts.contiguous())
    past = torch.searchsorted(bounds, starts + counts)
    depth = torch.zeros(len(runs), len(ids) + 1, dtype=torch.int32, device=ids.device)
    one = depth.new_ones(()).expand_as(first)
    depth.scatter_add_(1, first, one).scatter_add_(1, past, -one)
    return depth.cumsum(dim=1, dtype=torch.int32)[:, :-1] > 0


def local_topk(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact top-k of a holder's entries.

    Args:
        scores: (Q, E) floats, -inf where the query does not see the entry.
        ids: (E,) int32, ascending.
        k: how many to select; short selections are padded.
    Returns:
        scores: (Q, k), -inf where padded.
        ids: (Q, k) int32, ascending, -1 where padded.
    Raises:
        ValueError: on wrong shapes or if a NaN would be selected.
    """
    _check_ids(ids)
    if scores.dim() != 2 or scores.shape[1] != len(ids):
        raise ValueError(f"scores must be (Q, {len(ids)}), got {tuple(scores.shape)}")
    return _select(scores, ids.expand(scores.shape), k)


def merge_topk(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The exact top-k of candidate lists put side by side in any order; returns as `local_topk`.

    The top-k of a union of shards is the top-k of the union of the shards' top-k.

    Args:
        scores: (Q, M) floats.
        ids: (Q, M) int32, -1 where a list was padded, otherwise unique within a query.
    Raises:
        ValueError: on wrong shapes, if a query's candidates repeat an id, or on a selected NaN.
    """
    if scores.dim() != 2 or scores.shape != ids.shape or ids.dtype != torch.int32:
        raise ValueError(
            f"candidates must be (Q, M) scores and (Q, M) int32 ids, "
            f"got {tuple(scores.shape)} and {tuple(ids.shape)} {ids.dtype}"
        )
    scores = scores.masked_fill(ids < 0, -torch.inf)
    ids, order = ids.sort(dim=1)
    if ((ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)).any():
        raise ValueError("candidates repeat an id: two holders answered for the same unit")
    return _select(scores.gather(1, order), ids, k)


def unit_scores(scores: Tensor, ids: Tensor, unit_tokens: int) -> tuple[Tensor, Tensor]:
    """Scores of selection blocks: the maximum over a unit's entries that are here and visible.

    Args:
        scores: (Q, E) floats, -inf where not visible.
        ids: (E,) int32, ascending.
        unit_tokens: entries per unit; unit id = entry id // unit_tokens.
    Returns:
        scores: (Q, U), -inf where no entry is visible.
        ids: (U,) int32, ascending: the units that have an entry here.
    """
    _check_ids(ids)
    if scores.dim() != 2 or scores.shape[1] != len(ids):
        raise ValueError(f"scores must be (Q, {len(ids)}), got {tuple(scores.shape)}")
    if unit_tokens <= 0:
        raise ValueError(f"unit_tokens must be positive, got {unit_tokens}")
    units, unit_of = torch.unique_consecutive(ids // unit_tokens, return_inverse=True)
    best = scores.new_full((len(scores), len(units)), -torch.inf)
    best.scatter_reduce_(1, unit_of.expand(scores.shape), scores, "amax")
    return best, units


def select_blocks(scores: Tensor, ids: Tensor, unit_tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """The top-k selection blocks of a holder: `local_topk` of `unit_scores`, ids are unit ids."""
    return local_topk(*unit_scores(scores, ids, unit_tokens), k)


def _select(scores: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Top-k columns of (Q, E) scores and ids, the lower column winning a tie; ids ascend."""
    if k <= 0:
        raise ValueError(f"k must be positive, got {k}")
    keep = min(k, scores.shape[1])
    columns = _top_columns(scores, keep)
    kept = scores.gather(1, columns)
    # torch ranks NaN above everything, so a NaN anywhere is among the selected.
    if kept.isnan().any():
        raise ValueError("index scores hold NaN")
    # What is not visible moves behind the last column, so that one sort leaves it as padding.
    num_columns = scores.shape[1]
    columns = columns.masked_fill(kept == -torch.inf, num_columns).sort(dim=1).values
    absent = columns == num_columns
    columns = columns.clamp(max=num_columns - 1)
    scores = scores.gather(1, columns).masked_fill(absent, -torch.inf)
    ids = ids.gather(1, columns).masked_fill(absent, -1)
    return F.pad(scores, (0, k - keep), value=-torch.inf), F.pad(ids, (0, k - keep), value=-1)


def _top_columns(scores: Tensor, k: int) -> Tensor:
    """Columns (Q, k) of the k highest scores, in any order; the lower column wins a tie."""
    if k == scores.shape[1]:
        return torch.arange(k, device=scores.device).expand(scores.shape)
    values, columns = scores.topk(k + 1, dim=1)
    columns = columns[:, :k]
    # torch breaks ties as it likes. That matters only where equal scores lie on both sides of the
    # cut, and not where the cut is at -inf.
    cut = values[:, k - 1]
    tied = ((cut == values[:, k]) & (cut > -torch.inf)).nonzero().squeeze(1)
    if len(tied):
        rows, cut = scores[tied], cut[tied, None]
        above, equal = rows > cut, rows == cut
        room = k - above.sum(dim=1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))
        columns[tied] = chosen.nonzero()[:, 1].view(-1, k)
    return columns


def _check_ids(ids: Tensor) -> None:
    if ids.dim() != 1 or ids.dtype != torch.int32:
        raise ValueError(f"ids must be (E,) int32, got {tuple(ids.shape)} {ids.dtype}")
