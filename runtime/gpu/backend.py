"""The backend on GPUs: what the host does before and after a step on the device.

A step on GPUs needs no host. Before it written rows reach their owners over the world's transport, and
the tables of every GPU are brought up to date before any rank reads them. A rank reads the blocks of
others without asking, and its step may be over before theirs; so blocks are given up when all have met.

Letters: Q queries, H heads, D columns, W ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.coverage import to_int32
from ..backend import Ability, BackendCounts
from ..branches import absorb_items, by_item, combine
from ..cost.model import CostModel
from ..cost.predicate import Demand, Mode, decide
from ..cpu.select import select_step
from ..errors import Complaint, PeerError, coverage_error
from ..exchanger import Answer
from ..observe.decision_log import log_decisions
from ..observe.explain import LastStep
from ..scope import Scope, Selection
from ..transport.messages import Header, Message
from ..world import World
from .admit import admit
from .limits import GPU_MODES, GpuMode
from .open import OpenGpu
from .step import GpuStep

_ID_BYTES, _LSE_BYTES, _COVERED_BYTES = 4, 4, 8


class Done(NamedTuple):
    """A step that ran: which, and what it was asked."""

    step: GpuStep
    layer: int
    queries: int
    mode: GpuMode


class GpuBackend:
    """Entries in the pool of this rank's GPU; tables' truth, index keys and `select` on the host."""

    def __init__(self, world: World, opened: OpenGpu) -> None:
        self._world = world
        self.pool, self.steps, self._shared = opened
        self._bytes: Counter[str] = Counter()  # as the plans say; answers count with who gets them
        self._fetched = 0  # entries, since leases were last admitted
        self._last: Done | None = None

    @property
    def device(self) -> torch.device:
        """Where entries are."""
        return self.pool.memory.device

    def require(self, ability: Ability) -> None:
        """Raises: RuntimeError: none of them."""
        raise RuntimeError(
            f"a runtime with its entries on GPUs cannot {ability}: snapshot, and restore into a new one"
        )

    def check_attend(self, selection: Selection, mode: Mode) -> None:
        """Raises: ValueError for an `attend` that the step on GPUs does not do."""
        config = self._world.config
        queries, listed = len(selection.ids), selection.ids.shape[-1]
        if queries > config.max_queries or listed > config.max_units:
            raise ValueError(
                f"max_queries={config.max_queries} and max_units={config.max_units} bound a step on "
                f"GPUs, got {queries} queries of {listed} units"
            )
        if selection.unit_tokens != 1:
            raise ValueError(f"on GPUs a unit is one entry, got units of {selection.unit_tokens}")
        if selection.scope.offsets is not None:
            raise ValueError(
                "on GPUs documents are attended to at their own positions; `copy_document` moves one "
                "elsewhere"
            )
        if mode not in GPU_MODES:
            raise ValueError(f"mode is one of {', '.join(GPU_MODES)} on GPUs, got {mode!r}")

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None, *, push: bool
    ) -> None:
        self._world.writes.write(layer, ids, entries, index_keys, push=push)

    def select(
        self,
        layer: int,
        query: Tensor,
        weights: Tensor,
        scope: Scope,
        *,
        top_k: int,
        unit_tokens: int,
    ) -> Selection:
        return select_step(
            self._world, layer, query, weights, scope, top_k=top_k, unit_tokens=unit_tokens
        )

    def attend(
        self, layer: int, query: Tensor, selection: Selection, *, sink: Tensor | None, mode: Mode
    ) -> Tensor:
        """As `Backend.attend`; the output is where the query was.

        Straight after the layer's `select` no exchange is needed before the step: all writes
        were taken in it. Otherwise they are exchanged first.
        """
        world, queries = self._world, len(query)
        config, stats = world.config, world.stats
        layout = config.model.layers[layer]
        if not self._is_settled(layer):
            world.exchanger.exchange(
                world.header("attend", layer=layer), [], lambda _: {}, lambda: None
            )
        world.progress.forget()
        self._refresh()
        with stats.phase("send"):
            step = self._filled(layer, query, selection)
        with stats.phase("step"):
            done = Done(step, layer, queries, cast(GpuMode, mode))
            step.replay(layer, done.mode)
            self._last = done
            fault, way = self._outcome(step, queries)
        self.check_peers()
        stats.count(way, queries)
        if config.log_decisions:
            log_decisions(self.last_step(), step=stats.steps)
        complaints = [
            Complaint(item, int(fault[item]) - 1, "did not have all entries as they were asked for")
            for item in fault.nonzero()[:, 0].tolist()
        ]
        if complaints:
            stats.failures["coverage"] += 1
            raise coverage_error(layer, complaints, branches=1)
        with stats.phase("merge"):
            out = step.out[:queries].to(world.compute_dtype)
            lse = step.lse[:queries].to(world.compute_dtype)
            weights = world.weights[layer]
            if weights is not None:
                out = reference.project(out[:, None], weights.w_uv)[:, 0]
            out = combine(layout, out, lse, None if sink is None else sink.to(self.device))
            out = out.to(config.dtype).to(query.device)
        with stats.phase("lease"):
            self.keep_leases()
        return out

    def answers(self) -> Mapping[str, Answer]:
        """Not reached: a world on GPUs does not serve."""
        self.require("serve")
        return {}

    def flush(self, header: Header, visitors: Sequence[Message | None]) -> None:
        """As `Backend.flush`. A step on GPUs is of one layer: whatever a rank is asked there, it attends
        at its own."""
        transport = self._world.transport
        for rank, visitor in enumerate(visitors):
            if visitor is not None and visitor.header.layer != header.layer:
                raise transport.accuse(
                    rank,
                    f"is at layer {visitor.header.layer}, rank {transport.rank} at {header.layer}: "
                    "with entries on GPUs all ranks take the same layers in the same order",
                )
        self._refresh()

    def meet(self) -> None:
        """Wait until every rank's steps so far are over; a step of the world on the host."""
        self._world.exchanger.settle(self._world.header("meet", layer=0))

    def keep_leases(self) -> None:
        """Lease what was fetched most; straight after a step, and no step of the world.

        Each time that as many entries were fetched as all leases hold, and a block if as many of it
        were as its lease pulls: so keeping leases never pulls more than the steps before it did.
        """
        shape, slots = self.pool.map, len(self.pool.leases.key_of)
        pulled = shape.block_tokens * shape.layers
        if slots and self._fetched >= slots * pulled:
            admit(self.pool, least=pulled)
            self._fetched = 0

    def drop_leases(self) -> None:
        self.pool.leases.drop()

    def last_step(self) -> LastStep | None:
        """What the last step was asked and did, read from the device; margins and reasons are those
        of the host's predicate."""
        if self._last is None:
            return None
        step, layer, queries, mode = self._last
        plan, world = step.plan, self._world
        demand = Demand(
            pairs_units=plan.pairs_units[:queries].long().cpu(),
            unique_units=plan.unique_units.long().cpu(),
            fair_units=plan.fair_units[:queries].cpu(),
        )
        model = CostModel(
            facts=world.facts[layer],
            profile=world.config.fabric_profile,
            reuse=world.config.reuse,
        )
        decision = decide(demand, model, rank=world.rank, mode=mode)
        decision = decision._replace(way=plan.way[:queries].cpu())
        return LastStep(layer, world.rank, 1, demand, decision, model)

    def counted(self) -> BackendCounts:
        return BackendCounts(self._bytes, self.pool.leases.counted())

    def reconnect(self) -> None:
        """Not reached: a world on GPUs is not rejoined."""
        self.require("rejoin")

    def close(self) -> None:
        """End the exchange with all ranks; idempotent. Where some are lost the others cannot wait for
        them: then what was shared stays, and the process should leave by `os._exit`.
        """
        if self._shared is None:
            return
        shared, self._shared = self._shared, None
        try:
            self.meet()
        except PeerError:
            shared.close(abort=True)
        except BaseException:
            shared.close(abort=True)
            raise
        else:
            shared.close()

    def _refresh(self) -> None:
        """Bring the tables here up to date. When this returns, others may read all that was written."""
        world = self._world
        changed = self.pool.refresh(world.stores.entries, world.directory, world.askable())
        if changed and self._shared:
            version = to_int32(torch.tensor(world.directory.version))
            self._shared.ends().tables.copy_(version)
            torch.cuda.current_stream(self.device).synchronize()

    def _is_settled(self, layer: int) -> bool:
        """Whether the last exchange was this layer's `select`, with the tables of now; on all ranks
        alike."""
        last, now = self._world.progress.answered, self._world.header("select", layer=layer)
        if last is None:
            return False
        return (last.kind, last.layer, last.tables) == (now.kind, now.layer, now.tables)

    def step_of(self, queries: int) -> GpuStep:
        """The smallest step that holds so many; the sizes of other ranks need not be the same."""
        return next(step for step in self.steps if queries <= len(step.query))

    def _filled(self, layer: int, query: Tensor, selection: Selection) -> GpuStep:
        """The step of these queries, with them in its buffers."""
        world, queries = self._world, len(query)
        step = self.step_of(queries)
        rows = by_item(query.to(self.device), world.config.model.layers[layer])
        units = selection.ids.flatten(1)  # with one branch an entry's id is its stored id
        step.query[:queries] = absorb_items(world, layer, rows)
        step.units.fill_(-1)
        step.units[:queries, : units.shape[1]] = units.to(self.device)
        step.hidden[:queries] = selection.scope.hidden.to(self.device)
        return step

    def _outcome(self, step: GpuStep, queries: int) -> tuple[Tensor, Tensor]:
        """Faults (Q,) int32 and ways (Q, W) int8 of the step; counts its bytes and what was fetched.

        This waits for the step, and for nothing but it.
        """
        world, plan = self._world, step.plan
        config, layout = world.config, world.config.model.layers[0]
        parts = (
            step.fault[:queries],
            plan.way[:queries],
            plan.pairs[0],
            plan.listed[0],
            plan.counts,
        )
        read = torch.cat([part.flatten().to(torch.int32) for part in parts]).cpu()
        fault, way, pairs, listed, fetched = read.split([part.numel() for part in parts])
        count, element = int(pairs.sum()), config.dtype.itemsize
        asked = count * layout.heads * layout.key_dim * element + int(listed.sum()) * _ID_BYTES
        answer = layout.heads * (layout.value_dim * element + _LSE_BYTES) + _COVERED_BYTES
        fetched_bytes = int(fetched.sum()) * self.pool.map.entry_bytes
        self._fetched += int(fetched.sum())
        self._bytes.update({"attend": asked, "attend-answer": count * answer + fetched_bytes})
        return fault, way.view(queries, world.world_size).to(torch.int8)

    def check_peers(self) -> None:
        """Raises: PeerError naming a rank that was silent, or sent an invalid message, in a step.
        All ranks are informed, those that wait elsewhere too."""
        if self._shared is None:
            return
        try:
            self._shared.check()
        except PeerError as error:
            raise self._world.transport.accuse(error.culprits[0], error.reason) from error
