"""The select step of a rank: index here, ask those who hold other index keys, merge their top-k.

Letters: Q queries, M candidates, W ranks.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...indexer import merge_topk
from ..errors import CoverageError
from ..lockstep import broadcast
from ..scope import Scope, Selection, units_visible
from ..transport.messages import Message
from ..world import World
from .answer import answer_select
from .index import BestUnits, best_units
from .recipients import whom_to_ask


def select_step(
    world: World,
    layer: int,
    query: Tensor,
    weights: Tensor,
    scope: Scope,
    *,
    top_k: int,
    unit_tokens: int,
) -> Selection:
    """The exact global top-k units of each query, scored where the index keys live.

    Raises: CoverageError unless every entry in a query's scope was scored, once; PeerError.
    """
    askable = world.askable()

    def score_own() -> BestUnits:
        return best_units(
            world,
            layer,
            query,
            weights,
            scope.runs,
            top_k=top_k,
            unit_tokens=unit_tokens,
            offsets=scope.offsets,
            askable=askable,
        )

    header = world.header("select", layer=layer, unit_tokens=unit_tokens, top_k=top_k)
    if world.config.index_placement == "replicated":
        world.exchanger.settle(header)
        own = score_own()
        answers: list[Message | None] = []
    else:
        to, replaceable = whom_to_ask(world, scope, askable)
        columns = [
            broadcast("index.query", query, world, to),
            broadcast("index.weights", weights, world, to),
            broadcast("index.runs", scope.runs, world, to),
        ]
        if scope.offsets is not None:
            columns.append(broadcast("index.offsets", scope.offsets, world, to))
        if askable is not None:
            columns.append(broadcast("index.askable", askable, world, to))
        answer = partial(answer_select, world)
        own, answers = world.exchanger.exchange(header, columns, answer, score_own, replaceable)
    scores, ids = _candidates(world, layer, own, answers, scope, unit_tokens, askable)
    return Selection(merge_topk(scores, ids, top_k)[1], unit_tokens, scope)


def _candidates(
    world: World,
    layer: int,
    own: BestUnits,
    answers: list[Message | None],
    scope: Scope,
    unit_tokens: int,
    askable: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores (Q, M) and unit ids (Q, M) of every rank's best units, own ones first.

    Raises: CoverageError unless every entry in a query's scope was scored, once.
    """
    found = [own]
    queries = len(own.score)
    visible = scope.runs[..., 1].sum(1)
    for rank, message in enumerate(answers):
        if message is None or queries == 0:
            continue
        score, ids = message.columns.get("score"), message.columns.get("id")
        seen = message.columns.get("seen")
        if (
            score is None
            or ids is None
            or seen is None
            or seen.shape != own.seen.shape
            or score.shape != ids.shape
            or len(score) % queries
        ):
            raise world.transport.accuse(rank, f"sent malformed candidates for {queries} queries")
        best = BestUnits(score.view(queries, -1), ids.view(queries, -1), seen)
        listed = best.id >= 0
        ordered = best.id.sort(1).values
        repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        foreign = listed & ~units_visible(best.id, scope.runs, unit_tokens)
        block = best.id.long() * unit_tokens // world.config.block_tokens
        foreign |= listed & (world.tables.scorers(block, askable) != rank)
        if bool(repeats.any() | foreign.any() | (listed & ~best.score.isfinite()).any()):
            raise world.transport.accuse(
                rank,
                "sent invalid candidates: each must be of its own blocks, in sight, finite and named once",
            )
        found.append(best)
    scored = torch.stack([best.seen for best in found])
    wrong = (scored.sum(0) != visible).nonzero()[:, 0]
    if len(wrong):
        query = int(wrong[0])
        world.stats.failures["coverage"] += 1
        raise CoverageError(
            f"layer {layer}: query {query} sees {int(visible[query])} entries, index keys of "
            f"{int(scored[:, query].sum())} were scored ({scored[:, query].tolist()} by rank, "
            f"rank {world.rank} first); {len(wrong)} queries in all",
            tuple(range(world.world_size)),
        )
    return torch.cat([b.score for b in found], dim=1), torch.cat([b.id for b in found], dim=1)
