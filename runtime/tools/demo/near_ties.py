"""Selections that rounding can change, and how a comparison with another engine treats them.

Where the k-th and the (k+1)-th index score of a row are closer than `NEAR_TIE`, either entry is a right
choice, and which one an engine takes depends on the order of its floating-point sums. `TopkRecorder`
notes such rows of transformers' own model; `TieReview` lets them, and only them, be taken from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ...adapters.hf import Batch
from ...scope import Request, Selection

NEAR_TIE = 1e-5
CORPUS = -1


class NearTies(NamedTuple):
    """Rows whose selection is arbitrary: keys (n, 3) int64 (sequence, layer, position), and the
    positions that the reference chose (n, K) int32. Sequence -1 is the corpus, others are agents."""

    keys: Tensor
    chosen: Tensor


class TopkRecorder(TorchFunctionMode):
    """Looks at the scores that go into an indexer's `topk`; batch size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.sequence, self.layer, self.position, self.rows = CORPUS, 0, 0, 0
        self._keys: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.topk:
            self._note(args[0], result.values, result.indices)
        return result

    def ties(self, top_k: int) -> NearTies:
        return NearTies(
            torch.cat([torch.empty(0, 3, dtype=torch.int64), *self._keys]),
            torch.cat([torch.empty(0, top_k, dtype=torch.int32), *self._chosen]),
        )

    def _note(self, scores: Tensor, best: Tensor, chosen: Tensor) -> None:
        queries, entries = scores.shape[1:]
        self.rows += queries
        if entries <= chosen.shape[-1]:
            return
        following = scores[0].scatter(1, chosen[0], -torch.inf).amax(1)
        visible = following > torch.finfo(scores.dtype).min / 2
        at = ((best[0].amin(1) - following < NEAR_TIE) & visible).nonzero()[:, 0]
        key = torch.tensor([self.sequence, self.layer, 0]).repeat(len(at), 1)
        key[:, 2] = self.position + at
        self._keys.append(key)
        self._chosen.append(chosen[0, at].to(torch.int32))


@contextmanager
def recording(model: PreTrainedModel, recorder: TopkRecorder) -> Iterator[None]:
    """Run every indexer of the model under the recorder."""
    blocks: Any = model.model.layers
    indexers = {
        layer: block.self_attn.indexer
        for layer, block in enumerate(blocks)
        if block.self_attn.indexer is not None
    }

    def watched(layer: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            recorder.layer = layer
            with recorder:
                return forward(*args, **kwargs)

        return run

    for layer, indexer in indexers.items():
        indexer.forward = watched(layer, indexer.forward)
    try:
        yield
    finally:
        for indexer in indexers.values():
            del indexer.forward


class TieReview:
    """A `Review` for `HFEngine`: substitutes the reference's selection in its near-ties, and counts.

    Args:
        ties: of the reference, which saw corpus and agent as one sequence.
        sequence_of: the agent of each running request, by `id`; others prefill the corpus.
    """

    def __init__(self, ties: NearTies, sequence_of: Mapping[int, int]) -> None:
        self.rows = 0
        self.substituted = 0
        self._sequence_of = sequence_of
        self._chosen: dict[tuple[int, int], dict[int, Tensor]] = {}
        for (sequence, layer, position), chosen in zip(
            ties.keys.tolist(), ties.chosen, strict=True
        ):
            self._chosen.setdefault((sequence, layer), {})[position] = chosen

    def __call__(self, layer: int, batch: Batch, selection: Selection) -> Selection:
        ids = selection.ids.clone()
        length = batch.ids.shape[1]
        for b, request in enumerate(batch.requests):
            chosen = self._chosen.get((self._sequence_of.get(id(request), CORPUS), layer), {})
            first = int(batch.positions[b, 0])
            self.rows += length
            for position in chosen.keys() & range(first, first + length):
                row = b * length + position - first
                wanted = entry_ids(request, chosen[position])
                if not torch.equal(wanted, ids[row].sort().values):
                    ids[row] = wanted
                    self.substituted += 1
        return selection._replace(ids=ids)


def entry_ids(request: Request, positions: Tensor) -> Tensor:
    """Entry ids, ascending, of positions in the sequence of the request's documents and its tail."""
    documents = [*request.documents, *([request.into] if request.into else [])]
    ids = positions - (request.position - request.length) + request.tail_start
    for document in documents:
        offset = positions - document.position
        inside = (offset >= 0) & (offset < document.tokens)
        own = document.ids()[offset.clamp(0, document.tokens - 1)]
        ids = torch.where(inside, own, ids)
    return ids.sort().values.to(torch.int32)
