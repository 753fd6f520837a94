"""Opening the GPUs of a world: memory, the pool in it, and steps that are compiled and have run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...kernels.exchange.layout import Wire, chunk_of
from ...kernels.exchange.types import Ends
from ...kernels.pool_layout import PoolLayout
from ..config import RuntimeConfig
from ..cost.model import CostModel, LayerFacts
from ..cost.prices import prices_of
from ..stores import entry_codec, entry_slots
from ..transport.base import Transport
from ..transport.gloo import TorchTransport
from ..transport.messages import Header, bytes_of, text
from ..transport.schema import check_columns
from .limits import GPU_MODES, check_machine
from .pool import GpuPool
from .step import GpuStep
from .symmetric_memory import SymmetricMemory

_COMPILING_S = 120.0  # that ranks may be apart while they compile
_MAX_REASON_BYTES = 400


class OpenGpu(NamedTuple):
    """A rank's pool, its steps by ascending size, and the memory that ranks share; None where it is
    alone in its world."""

    pool: GpuPool
    steps: Sequence[GpuStep]
    shared: SymmetricMemory | None


def open_gpu(config: RuntimeConfig, transport: Transport) -> OpenGpu:
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
    pool_layout = PoolLayout(
        layers=len(layouts),
        keys=config.max_ids,
        slots=entry_slots(config, world_size) + lease_slots,
        block_tokens=config.block_tokens,
        entry_bytes=codec.entry_bytes,
        staged=config.max_queries * config.max_units if world_size > 1 else 0,
    )
    shared = None
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
        shared = SymmetricMemory(
            [wire],
            group=transport.group,
            device=device,
            incarnation=transport.incarnation + 1,
            deadline_s=config.deadline_s,
            heap=pool_layout.num_bytes,
        )
    try:
        memory, heaps = (None, None) if shared is None else (shared.heap, shared.heaps)
        if memory is None:
            memory = torch.zeros(pool_layout.num_bytes, dtype=torch.uint8, device=device)
        pool = GpuPool(
            memory, pool_layout, codec, rank=transport.rank, peers=heaps, lease_slots=lease_slots
        )
        return OpenGpu(pool, _compiled_steps(config, transport, pool, shared), shared)
    except BaseException:
        if shared is not None:
            shared.close(abort=True)
        raise


def _compiled_steps(
    config: RuntimeConfig, transport: Transport, pool: GpuPool, shared: SymmetricMemory | None
) -> list[GpuStep]:
    """The steps by size, after others of their sizes have run at all layers in all modes, with nothing
    to do and with patience: ranks compile at the same time, but not equally fast."""
    prices = prices_of(
        CostModel(
            facts=LayerFacts.of(
                config.model.layers[0],
                entry_bytes=entry_codec(config.model.layers[0]).entry_bytes,
                element_bytes=config.dtype.itemsize,
            ),
            profile=config.fabric_profile,
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
    ends = None if shared is None else shared.ends()
    patient = None if ends is None else ends._replace(budget_ns=int(_COMPILING_S * 1e9))
    for rows in sizes:
        first = step(rows, patient)
        for layer in range(len(config.model.layers)):
            for mode in GPU_MODES:
                first.run(layer, mode)
        torch.cuda.synchronize(pool.memory.device)
        if shared is not None:
            shared.check()
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
    received = []
    for rank, message in enumerate(transport.collect(header)):
        if message is not None:
            with transport.blaming(rank):
                check_columns(message, payload=torch.float32, compute=torch.float32)
        received.append(columns if message is None else message.columns)
    devices = [bytes_of(theirs, "device") for theirs in received]
    for rank, theirs in enumerate(received):
        if why := bytes_of(theirs, "reason"):
            raise ValueError(f"rank {rank}: {why.decode(errors='replace')[:_MAX_REASON_BYTES]}")
        if devices[rank] in devices[:rank]:
            raise ValueError(
                f"ranks {devices.index(devices[rank])} and {rank} have the same GPU: each sets its "
                "own by torch.cuda.set_device before it opens"
            )
    return device
