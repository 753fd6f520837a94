"""One attention step of a rank, in the order the data travels.

    plan      who is asked for what, by which way                          (plan.py, cost/predicate.py)
    send      queries with their unit lists, and units to fetch            (the world's exchanger)
    attend    the others' rows over what is here, then own rows            (answer.py, attend.py)
    receive   the answers: checked, and fetched rows attended and kept     (merge.py)
    merge     partials within each branch, then the branches               (merge.py, branches.py)

Letters: Q queries, H heads, G branches, N = Q * G items, h heads of a branch, K units of an item.
`gpu/step.py` has the same verbs on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...partition.layout import Form
from ..branches import absorb_items, by_item, combine
from ..cost.model import CostModel
from ..cost.predicate import Decision, Mode, Way, all_local, decide, way_of
from ..errors import Complaint
from ..observe.explain import LastStep
from ..scope import Selection, unit_offsets, units_visible
from ..transport.base import Column
from ..transport.messages import Message
from ..world import World
from . import plan
from .answer import answer_attend
from .attend import Partial, attend_fetched, attend_local, keep_leases
from .merge import check_fetched, fetched_answers, local_complaints, merge_parts, routed_answers
from .recipients import check_askable, stand_ins


class Planned(NamedTuple):
    """Who is asked for what: units wanted, the model and its decision, routed pairs by form, fetches."""

    wanted: plan.Wanted
    model: CostModel
    decision: Decision
    routes: Mapping[Form, plan.RouteLists]
    fetch: plan.FetchList


class StepResult(NamedTuple):
    """The output (Q, H, D), what was decided, and every item that was not served as asked."""

    out: Tensor
    last: LastStep
    complaints: list[Complaint]


def attend_step(
    world: World,
    layer: int,
    query: Tensor,
    selection: Selection,
    *,
    sink: Tensor | None,
    mode: Mode,
) -> StepResult:
    """Attention of `query` (Q, H, D) over the selected units, wherever they are.

    Raises: BlocksLostError if there is nobody to ask for a unit; PeerError.
    """
    layout, stats, askable = world.config.model.layers[layer], world.stats, world.askable()
    with stats.phase("plan"):
        planned = _plan(world, layer, selection, mode, askable)
    wanted = planned.wanted
    rows = by_item(query, layout)
    absorbed = absorb_items(world, layer, rows)

    (own, lacking), answers = world.exchanger.exchange(
        world.header("attend", layer=layer, unit_tokens=planned.model.unit_tokens),
        _sent(world, planned, selection, rows, absorbed),
        answer=partial(answer_attend, world),
        own_work=lambda: attend_local(world, layer, absorbed, wanted),
        replaceable=stand_ins(world, wanted, askable),
    )

    parts, complaints = _received(world, layer, planned, absorbed, answers)
    complaints += local_complaints(world, lacking)
    with stats.phase("merge"):
        parts["A"].insert(0, own)
        out = combine(layout, *merge_parts(world, layer, parts, len(rows)), sink)
    stats.count(planned.decision.way, len(query))
    demand, decision = wanted.demand, planned.decision
    branches = layout.num_branches
    last = LastStep(layer, world.rank, branches, demand, decision, planned.model)
    return StepResult(out.to(world.config.dtype), last, complaints)


def _plan(
    world: World, layer: int, selection: Selection, mode: Mode, askable: Tensor | None
) -> Planned:
    """Who is asked for what."""
    config = world.config
    wanted = _wanted(world, layer, selection, askable)
    check_askable(world, wanted, askable)
    model = CostModel(
        facts=world.facts[layer],
        profile=config.fabric_profile,
        unit_tokens=wanted.entries.shape[2],
        reuse=config.reuse,
        shifted=wanted.offsets is not None,
    )
    remote = (wanted.holder != world.rank) & (wanted.holder < world.world_size)
    if world.world_size == 1 or not bool(remote.any()):
        nothing = plan.no_fetch(wanted, world.world_size)
        return Planned(wanted, model, all_local(wanted.demand), {}, nothing)
    forms = world.forms(layer)
    decision = decide(
        wanted.demand,
        model,
        rank=world.rank,
        mode=mode,
        forms=forms,
        seed=config.seed,
        step=world.progress.epoch,
    )
    routes = {
        form: plan.route(
            wanted,
            decision.way,
            way_of(form),
            world.directory.generations,
            block_tokens=config.block_tokens,
        )
        for form in forms
    }
    return Planned(wanted, model, decision, routes, plan.fetch(wanted, decision.way, Way.FETCH))


def _sent(
    world: World, planned: Planned, selection: Selection, rows: Tensor, absorbed: Tensor
) -> list[Column]:
    """What travels: units to fetch, and of routed pairs their rows and who and what they are."""
    hidden = selection.scope.hidden.repeat_interleave(world.config.num_branches, 0)
    columns = [Column("fetch", planned.fetch.units, planned.fetch.counts)]
    for form, lists in planned.routes.items():
        payload = (absorbed if form == "A" else rows).to(world.config.dtype)
        columns += [
            Column(f"{form}.query", payload, lists.pairs, lists.items),
            Column(f"{form}.item", lists.items.to(torch.int32), lists.pairs),
            Column(f"{form}.count", lists.units_of.to(torch.int32), lists.pairs),
            Column(f"{form}.units", lists.units, lists.listed),
        ]
        if planned.model.unit_tokens > 1:
            columns.append(Column(f"{form}.hidden", hidden, lists.pairs, lists.items))
        if lists.offsets is not None:
            columns.append(Column(f"{form}.offsets", lists.offsets, lists.listed))
    return columns


def _received(
    world: World, layer: int, planned: Planned, absorbed: Tensor, answers: list[Message | None]
) -> tuple[dict[str, list[Partial]], list[Complaint]]:
    """The partials of all answers by payload form, fetched rows attended and kept as leases, and a
    complaint for each item whose coverage is not as asked."""
    wanted, fetch = planned.wanted, planned.fetch
    fetched, complaints = fetched_answers(world, layer, wanted, fetch, answers)
    parts: dict[str, list[Partial]] = {"A": []}
    if len(fetched.rows):
        with world.stats.phase("attend fetched"):
            part = attend_fetched(world, layer, absorbed, wanted, fetch, fetched.rows)
            check_fetched(world, layer, part, fetch, fetched.rows)
            parts["A"].append(part)
            keep_leases(world, layer, fetched.ids, fetched.came, fetched.rows)
    for form, lists in planned.routes.items():
        part, uncovered = routed_answers(world, layer, form, lists, answers)
        parts.setdefault(form, []).append(part)
        complaints += uncovered
    return parts, complaints


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
    local = world.stores.entries.holds(units)
    if config.lease_entries:
        _, leased = world.stores.leases[layer].find(entries, world.tables.generations(entries))
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
