"""GpuRank: what a rank has on its GPU, opened with its world and closed with its runtime.

A step on GPUs needs no host. The host's part is what comes before it: written rows reach their owners
over the world's transport, and tables are brought up to date on every GPU before any rank reads them.
A rank reads the blocks of others without asking, and its step may be over before theirs; so blocks are
given up when all have met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from ...kernels.coverage import to_int32
from ...kernels.exchange.layout import Wire, chunk_of
from ...kernels.exchange.types import Ends
from ...kernels.pool_layout import PoolLayout
from ..config import RuntimeConfig
from ..corpus.collective import said, text
from ..cost.model import CostModel
from ..cost.predicate import Demand, decide
from ..cost.prices import prices_of
from ..cpu.move import settle
from ..errors import PeerError
from ..transport.base import Transport
from ..transport.gloo import TorchTransport
from ..transport.messages import Header
from ..world import LastStep, entry_codec, entry_slots, layer_facts
from .leases import admit
from .limits import GPU_MODES, GpuMode, check_machine
from .pool import GpuPool
from .step import GpuStep
from .symmetric_memory import NvshmemTransport

if TYPE_CHECKING:
    from ..world import World

_COMPILING_S = 120.0  # that ranks may be apart while they compile
_MAX_REASON_BYTES = 400


class Done(NamedTuple):
    """A step that ran: which, and what it was asked."""

    step: GpuStep
    layer: int
    queries: int
    mode: GpuMode


class GpuRank:
    """A rank's pool, its steps by ascending size, and its end of the exchange; None where it is alone in
    its world."""

    def __init__(
        self, pool: GpuPool, steps: Sequence[GpuStep], peers: NvshmemTransport | None
    ) -> None:
        self.pool, self.steps, self.peers = pool, steps, peers
        self.bytes: Counter[str] = Counter()  # as the plans say; answers count with who gets them
        self.fetched = 0  # entries, since leases were last admitted
        self.last: Done | None = None

    @property
    def device(self) -> torch.device:
        return self.pool.memory.device

    def step_of(self, queries: int) -> GpuStep:
        """The smallest that holds so many; the others' sizes need not be the same."""
        return next(step for step in self.steps if queries <= len(step.query))

    def replay(self, step: GpuStep, layer: int, queries: int, mode: GpuMode) -> None:
        """One step, with what its buffers hold; it is the last one now."""
        step.replay(layer, mode)
        self.last = Done(step, layer, queries, mode)

    def flush(self, world: World) -> None:
        """Bring the tables here up to date. When this returns, others may read all that was written."""
        if self.pool.refresh(world.entries, world.directory, world.askable()) and self.peers:
            version = to_int32(torch.tensor(world.directory.version))
            self.peers.ends().tables.copy_(version)
            torch.cuda.current_stream(self.device).synchronize()

    def meet(self, world: World) -> None:
        """Wait until every rank's steps so far are over; a step of the world on the host."""
        settle(world, world.header("meet", layer=0))

    def keep_leases(self) -> None:
        """Lease what was fetched most; straight after a step, and no step of the world.

        Each time that as many entries were fetched as all leases hold, and a block if as many of it
        were as its lease pulls: so keeping leases never pulls more than the steps before it did.
        """
        shape, slots = self.pool.map, len(self.pool.leases.key_of)
        pulled = shape.block_tokens * shape.layers
        if slots and self.fetched >= slots * pulled:
            admit(self.pool, least=pulled)
            self.fetched = 0

    def check(self) -> None:
        """Raises: PeerError naming a rank that was silent, or sent what cannot be, in a step."""
        if self.peers is not None:
            self.peers.check()

    def last_step(self, world: World) -> LastStep | None:
        """What the last step was asked and did, read from the device; margins and reasons are those
        of the host's predicate."""
        if self.last is None:
            return None
        step, layer, queries, mode = self.last
        plan, config = step.plan, world.config
        demand = Demand(
            pairs_units=plan.pairs_units[:queries].long().cpu(),
            unique_units=plan.unique_units.long().cpu(),
            fair_units=plan.fair_units[:queries].cpu(),
        )
        decision = decide(
            demand,
            world.facts[layer],
            config.fabric,
            rank=world.rank,
            unit_tokens=1,
            reuse=config.reuse,
            mode=mode,
        )
        return LastStep(layer, 1, demand, decision._replace(way=plan.way[:queries].cpu()), False)

    def close(self, world: World) -> None:
        """End the exchange with all ranks; idempotent. Where some are lost the others cannot wait for
        them: then what was shared stays, and the process should leave by `os._exit`.
        """
        if self.peers is None:
            return
        peers, self.peers = self.peers, None
        try:
            self.meet(world)
        except PeerError:
            peers.close(abort=True)
        except BaseException:
            peers.close(abort=True)
            raise
        else:
            peers.close()


def open_gpu(config: RuntimeConfig, transport: Transport) -> GpuRank:
    """Open the GPUs of a world, all ranks together, each with torch's current device.

    All kernels are compiled, and have run, when this returns.

    Raises: ValueError on every rank if one has no GPU, or has the same as another, or a package is
    missing, or they cannot reach one another's memory. PeerError if a rank is lost meanwhile.
    """
    world_size, layouts = transport.world_size, config.model.layers
    layout, codec = layouts[0], entry_codec(layouts[0])
    if world_size > 1 and not isinstance(transport, TorchTransport):
        raise ValueError(
            "entries on GPUs need a process per rank, over torch.distributed and without lanes "
            f"(`heads`); the transport is a {type(transport).__name__}"
        )
    device = _agreed_device(transport)
    lease_slots = config.lease_entries // config.block_tokens
    pool_map = PoolLayout(
        layers=len(layouts),
        keys=config.max_ids,
        slots=entry_slots(config, world_size) + lease_slots,
        block_tokens=config.block_tokens,
        entry_bytes=codec.entry_bytes,
        staged=config.max_queries * config.max_units if world_size > 1 else 0,
    )
    peers = None
    if isinstance(transport, TorchTransport) and world_size > 1:
        word = 4 // config.dtype.itemsize
        wire = Wire(
            world_size=world_size,
            rows=config.max_queries,
            heads=layout.heads,
            query_words=layout.heads * layout.key_dim // word,
            answer_words=layout.heads * layout.value_dim // word,
            units=config.max_units,
            chunk=chunk_of(config.max_queries),
        )
        peers = NvshmemTransport(
            [wire],
            group=transport.group,
            device=device,
            incarnation=transport.incarnation + 1,
            deadline_s=config.deadline_s,
            heap=pool_map.num_bytes,
        )
    try:
        memory, heaps = (None, None) if peers is None else (peers.heap, peers.heaps)
        if memory is None:
            memory = torch.zeros(pool_map.num_bytes, dtype=torch.uint8, device=device)
        pool = GpuPool(
            memory, pool_map, codec, rank=transport.rank, peers=heaps, lease_slots=lease_slots
        )
        return GpuRank(pool, _compiled_steps(config, transport, pool, peers), peers)
    except BaseException:
        if peers is not None:
            peers.close(abort=True)
        raise


def _compiled_steps(
    config: RuntimeConfig, transport: Transport, pool: GpuPool, peers: NvshmemTransport | None
) -> list[GpuStep]:
    """The steps by size, after others of their sizes have run at all layers in all modes, with nothing
    to do and with patience: ranks compile at the same time, but not equally fast."""
    prices = prices_of(
        CostModel(
            facts=layer_facts(config, config.model.layers[0]),
            profile=config.fabric,
            reuse=config.reuse,
        ),
        world=transport.world_size,
        device=pool.memory.device,
    )

    def step(rows: int, ends: Ends | None, larger: GpuStep | None = None) -> GpuStep:
        return GpuStep(
            pool,
            config.model.layers,
            prices=prices,
            ends=ends,
            rank=transport.rank,
            world_size=transport.world_size,
            rows=rows,
            listed=config.max_units,
            dtype=config.dtype,
            larger=larger,
        )

    sizes = (*config.buckets, config.max_queries)
    ends = None if peers is None else peers.ends()
    patient = None if ends is None else ends._replace(budget_ns=int(_COMPILING_S * 1e9))
    for rows in sizes:
        first = step(rows, patient)
        for layer in range(len(config.model.layers)):
            for mode in GPU_MODES:
                first.run(layer, mode)
        torch.cuda.synchronize(pool.memory.device)
        if peers is not None:
            peers.check()
        del first
    largest = step(config.max_queries, ends)
    return [*(step(rows, ends, largest) for rows in config.buckets), largest]


def _agreed_device(transport: Transport) -> torch.device:
    """The GPU of this rank, if every rank has one of its own. Raises: ValueError on every rank."""
    device, reason, uuid = torch.device("cpu"), b"", b""
    try:
        device = check_machine(transport.world_size)
        uuid = str(torch.cuda.get_device_properties(device).uuid).encode()
    except ValueError as error:
        reason = str(error).encode()[:_MAX_REASON_BYTES]
    columns = {"reason": text(reason), "device": text(uuid)}
    header = Header(kind="device", incarnation=transport.incarnation, channel=0, epoch=0, tables=0)
    transport.post_shares(header, [columns] * transport.world_size)
    heard = [columns if m is None else m.columns for m in transport.collect(header)]
    devices = [said(theirs, "device") for theirs in heard]
    for rank, theirs in enumerate(heard):
        if why := said(theirs, "reason"):
            raise ValueError(f"rank {rank}: {why.decode(errors='replace')[:_MAX_REASON_BYTES]}")
        if devices[rank] in devices[:rank]:
            raise ValueError(
                f"ranks {devices.index(devices[rank])} and {rank} have the same GPU: each sets its "
                "own by torch.cuda.set_device before it opens"
            )
    return device
