"""`attend` with the entries on GPUs: what the host does before and after a step on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import reference
from ..cost.predicate import Mode
from ..cpu.attend import absorb_items, by_item, combine
from ..cpu.move import Complaint, coverage_error, exchange
from ..cpu.step import Selection
from ..errors import PeerError
from ..observe.decision_log import log_decisions
from ..transport.messages import Message
from ..world import World

if TYPE_CHECKING:
    from .step import GpuStep

_ID_BYTES, _LSE_BYTES, _COVERED_BYTES = 4, 4, 8


def attend_on_gpu(
    world: World,
    layer: int,
    query: Tensor,
    selection: Selection,
    *,
    sink: Tensor | None,
    mode: Mode,
) -> Tensor:
    """As `step.attend_step`; the output is where the query was.

    Straight after the layer's `select` no rank has to be heard before the step: in it, all writes
    were taken. Otherwise they are exchanged first.
    """
    gpu, config, stats = world.gpu, world.config, world.stats
    assert gpu is not None
    assert mode != "random"
    step, layout = gpu.step_of(len(query)), config.model.layers[layer]
    if not _is_settled(world, layer):
        exchange(world, world.header("attend", layer=layer), [], _nothing, lambda: None)
    world.answered = None
    gpu.flush(world)
    with stats.phase("send"):
        queries = len(query)
        rows = by_item(query.to(gpu.device), layout)
        units = selection.ids.flatten(1)  # with one branch an entry's id is its stored id
        step.query[:queries] = absorb_items(world, layer, rows)
        step.units.fill_(-1)
        step.units[:queries, : units.shape[1]] = units.to(gpu.device)
        step.hidden[:queries] = selection.scope.hidden.to(gpu.device)
    with stats.phase("step"):
        gpu.replay(step, layer, queries, mode)
        fault, way = _told(world, step, queries)
    try:
        gpu.check()
    except PeerError as error:  # said to all, so that who waits elsewhere hears of it
        raise world.transport.accuse(error.culprits[0], error.reason) from error
    stats.count(way, queries)
    if config.log_decisions:
        log_decisions(world)
    complaints = [
        Complaint(item, int(fault[item]) - 1, "did not have all entries as they were asked for")
        for item in fault.nonzero()[:, 0].tolist()
    ]
    if complaints:
        raise coverage_error(world, layer, complaints)
    with stats.phase("merge"):
        out = step.out[:queries].to(world.compute_dtype)
        lse = step.lse[:queries].to(world.compute_dtype)
        weights = world.weights[layer]
        if weights is not None:
            out = reference.project(out[:, None], weights.w_uv)[:, 0]
        out = combine(layout, out, lse, None if sink is None else sink.to(gpu.device))
        out = out.to(config.dtype).to(query.device)
    with stats.phase("lease"):
        gpu.keep_leases()
    return out


def _is_settled(world: World, layer: int) -> bool:
    """Whether the last exchange was this layer's `select`, with the tables of now; on all ranks alike."""
    last, now = world.answered, world.header("select", layer=layer)
    if last is None:
        return False
    return (last.kind, last.layer, last.tables) == (now.kind, now.layer, now.tables)


def _nothing(_world: World, _message: Message) -> Mapping[str, Tensor]:
    return {}


def _told(world: World, step: GpuStep, queries: int) -> tuple[Tensor, Tensor]:
    """What the step says of the queries: faults (Q,) int32 and ways (Q, W) int8, and counts its bytes
    and what was fetched.

    This waits for the step, and for nothing but it.
    """
    gpu, config = world.gpu, world.config
    assert gpu is not None
    plan, layout = step.plan, config.model.layers[0]
    parts = (
        step.fault[:queries],
        plan.way[:queries],
        plan.pairs[0],
        plan.listed[0],
        plan.counts,
    )
    told = torch.cat([part.flatten().to(torch.int32) for part in parts]).cpu()
    fault, way, pairs, listed, fetched = told.split([part.numel() for part in parts])
    count, element = int(pairs.sum()), config.dtype.itemsize
    asked = count * layout.heads * layout.key_dim * element + int(listed.sum()) * _ID_BYTES
    answer = layout.heads * (layout.value_dim * element + _LSE_BYTES) + _COVERED_BYTES
    fetched_bytes = int(fetched.sum()) * gpu.pool.map.entry_bytes
    gpu.fetched += int(fetched.sum())
    gpu.bytes.update({"attend": asked, "attend-answer": count * answer + fetched_bytes})
    return fault, way.view(queries, world.world_size).to(torch.int8)
