"""One layer-step of a rank, in the order the data travels: index, decide, move, attend, merge.

Letters: Q queries, H heads, G branches, N = Q * G items, h heads of a branch, K units of an item.
Every rank of a world issues the same sequence of steps, idle ones with no queries: in a step each
rank asks every other (with an empty message where it wants nothing) and answers everyone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...indexer import merge_topk
from ..cost.predicate import Mode, Way, decide, way_of
from ..observe.decision_log import log_decisions
from ..scope import Scope, unit_offsets, units_visible
from ..transport.base import Column
from ..world import LastStep, World
from . import plan
from .answer import answer_attend, answer_select
from .attend import (
    absorb_items,
    attend_fetched,
    attend_local,
    by_item,
    combine,
    keep_leases,
    merge_parts,
)
from .copies import check_askable, stand_ins, whom_to_ask
from .index import BestUnits, best_units
from .move import (
    broadcast,
    candidates,
    check_fetched,
    coverage_error,
    exchange,
    fetched_answers,
    local_complaints,
    route_columns,
    routed_answers,
    settle,
)


class Selection(NamedTuple):
    """Unit ids (Q, K) or (Q, G, K) int32, distinct, -1 padding anywhere; and what each query sees."""

    ids: Tensor
    unit_tokens: int
    scope: Scope


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
    """INDEX: the exact global top-k units of each query, scored where the index keys live."""

    def own_units() -> BestUnits:
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

    askable = world.askable()
    header = world.header("select", layer=layer, unit_tokens=unit_tokens, top_k=top_k)
    if world.config.index_placement == "replicated":
        settle(world, header)
        scores, ids = candidates(world, layer, own_units(), [], scope, unit_tokens, askable)
        return Selection(merge_topk(scores, ids, top_k)[1], unit_tokens, scope)

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
    own, answers = exchange(world, header, columns, answer_select, own_units, replaceable)
    scores, ids = candidates(world, layer, own, answers, scope, unit_tokens, askable)
    return Selection(merge_topk(scores, ids, top_k)[1], unit_tokens, scope)


def attend_step(
    world: World,
    layer: int,
    query: Tensor,
    selection: Selection,
    *,
    sink: Tensor | None,
    mode: Mode,
) -> Tensor:
    """Attention of `query` (Q, H, D) over the selected units, wherever they are: (Q, H, out)."""
    config, stats = world.config, world.stats
    layout = config.model.layers[layer]
    with stats.phase("decide"):
        askable = world.askable()
        wanted = _wanted(world, layer, selection, askable)
        check_askable(world, wanted, askable)
        unit_tokens = wanted.entries.shape[2]
        decision = decide(
            wanted.demand,
            world.facts[layer],
            config.fabric,
            rank=world.rank,
            unit_tokens=unit_tokens,
            reuse=config.reuse,
            mode=mode,
            forms=world.forms(layer),
            seed=config.seed,
            step=world.epoch,
            shifted=wanted.offsets is not None,
        )
        routes = {
            form: plan.route(
                wanted,
                decision.way,
                way_of(form),
                world.directory.generations,
                block_tokens=config.block_tokens,
            )
            for form in world.forms(layer)
        }
        fetch = plan.fetch(wanted, decision.way, Way.FETCH)

    # MOVE and ATTEND: ask everyone, attend for the others, attend here, hear the answers.
    rows = by_item(query, layout)
    absorbed = absorb_items(world, layer, rows)
    hidden = selection.scope.hidden.repeat_interleave(layout.num_branches, 0)
    columns = [Column("fetch", fetch.units, fetch.counts)]
    for form, lists in routes.items():
        payload = (absorbed if form == "A" else rows).to(config.dtype)
        columns += route_columns(form, lists, payload, hidden, unit_tokens)
    (own, lacking), answers = exchange(
        world,
        world.header("attend", layer=layer, unit_tokens=unit_tokens),
        columns,
        answer_attend,
        lambda: attend_local(world, layer, absorbed, wanted),
        stand_ins(world, wanted, askable),
    )
    fetched, complaints = fetched_answers(world, layer, wanted, fetch, answers)
    complaints += local_complaints(world, lacking)
    parts = {"A": [own]}
    if len(fetched.rows):
        with stats.phase("attend fetched"):
            part = attend_fetched(world, layer, absorbed, wanted, fetch, fetched.rows)
            check_fetched(world, layer, part, fetch, fetched.rows)
            parts["A"].append(part)
            keep_leases(world, layer, fetched.ids, fetched.came, fetched.rows)
    for form, lists in routes.items():
        part, wrong = routed_answers(world, layer, form, lists, answers)
        parts.setdefault(form, []).append(part)
        complaints += wrong

    # MERGE within each branch by log-sum-exp, then combine the branches by their constants.
    with stats.phase("merge"):
        out = combine(layout, *merge_parts(world, layer, parts, len(rows)), sink)
    stats.count(decision.way, len(query))
    world.last = LastStep(layer, unit_tokens, wanted.demand, decision, wanted.offsets is not None)
    if config.log_decisions:
        log_decisions(world)
    if complaints:
        raise coverage_error(world, layer, complaints)
    return out.to(config.dtype)


def _wanted(world: World, layer: int, selection: Selection, askable: Tensor | None) -> plan.Wanted:
    """The units of every item, which of their entries exist, and who holds them."""
    config, branches = world.config, world.config.num_branches
    sizes = {"block_tokens": config.block_tokens, "num_branches": branches}
    units, unit_tokens = plan.stored_units(
        selection.ids, unit_tokens=selection.unit_tokens, **sizes
    )
    if selection.unit_tokens > config.block_tokens:  # of its blocks, those that the query may see
        runs = selection.scope.runs.repeat_interleave(branches, 0)
        block = units // (config.block_tokens * branches)
        units = torch.where(units_visible(block, runs, config.block_tokens), units, -1)
    hidden = selection.scope.hidden.repeat_interleave(branches, 0)
    entries, visible = plan.unit_entries(units, hidden, unit_tokens=unit_tokens, **sizes)
    exists = plan.existing(entries, visible, world.directory.tokens, **sizes)
    local = world.entries.holds(units)
    if config.lease_entries:
        _, leased = world.leases[layer].find(entries, world.generations(entries))
        local |= (leased | ~exists).all(-1) & exists.any(-1)
    offsets = None
    if selection.scope.offsets is not None:
        block = units // (config.block_tokens * branches)
        unit = (block * config.block_tokens + units % config.block_tokens) // unit_tokens
        offsets = unit_offsets(
            torch.where(units >= 0, unit, -1),
            selection.scope.runs.repeat_interleave(branches, 0),
            selection.scope.offsets.repeat_interleave(branches, 0),
            unit_tokens,
        )
    return plan.want(
        units,
        entries,
        visible,
        exists,
        local,
        world.directory.owners,
        rank=world.rank,
        world_size=world.world_size,
        block_tokens=config.block_tokens,
        offsets=offsets,
        askable=askable,
    )
