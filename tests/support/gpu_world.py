"""A short life of a world that has its entries on GPUs, or on CPUs: both must give the same outputs.

The numbers of a life, and so what it selects, are the same in any dtype: one in bf16 is held to what an
eager computation errs.

`StandIn` is the step on a device in plain torch, over the pools of one process: with it all that the
host does around a step runs where there is no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from ranks import run_loopback
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.decide import FETCH, LOCAL, ROUTE
from qroam.kernels.fetch import fetch
from qroam.kernels.limits import DTYPES
from qroam.kernels.plan import Plan
from qroam.kernels.pool_layout import PoolLayout
from qroam.partition.directory import Directory, empty_directory, with_document
from qroam.partition.layout import IndexLayout, Layout
from qroam.partition.pool import BlockStore
from qroam.partition.presets import mla, uniform_model
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.cost.predicate import Mode
from qroam.runtime.gpu import backend as gpu_rank
from qroam.runtime.gpu import leases
from qroam.runtime.gpu.backend import GpuRank
from qroam.runtime.gpu.pool import GpuPool
from qroam.runtime.transport.base import Transport
from qroam.runtime.world import entry_codec, entry_slots

B, LAYERS, HEADS, TOP_K = 8, 2, 4, 16
LAYOUT = mla(
    name="small",
    heads=HEADS,
    latent=128,
    rope=64,
    nope=32,
    value=32,
    softmax_scale=96**-0.5,
    codec="fp32",
    index=IndexLayout(heads=4, head_dim=64, rope_dim=64, pairing="half", top_k=TOP_K),
    index_codec="fp32",
)
WIDE = mla(
    name="wide",
    heads=16,
    latent=512,
    rope=64,
    nope=32,
    value=32,
    softmax_scale=96**-0.5,
    codec="fp8_v32",
    index=LAYOUT.index,
    index_codec="fp32",
)
MODES: tuple[Mode, ...] = ("auto", "always-route", "always-fetch")
BF16 = torch.bfloat16


def config(device: str = "cuda", layout: Layout = LAYOUT, **changes: Any) -> RuntimeConfig:
    sizes: dict[str, Any] = {
        "model": uniform_model(layout, LAYERS),
        "max_blocks": 24,
        "block_tokens": B,
        "private_blocks": 4,
        "request_blocks": 2,
        "deadline_s": 20.0,
        "device": device,
        "max_queries": 8,
        "max_units": 24,
    }
    return RuntimeConfig(**(sizes | changes))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def eighths(x: Tensor) -> Tensor:
    """The nearest eighths: sums of their products are exact in fp32, in any order."""
    return (x * 8).round() / 8


def pool_of(config: RuntimeConfig, rank: int, world_size: int, *, staged: int = 64) -> GpuPool:
    """A pool in memory of the host."""
    codec, lease_slots = entry_codec(config.model.layers[0]), config.lease_entries // B
    pool_map = PoolLayout(
        layers=len(config.model.layers),
        keys=config.max_ids,
        slots=entry_slots(config, world_size) + lease_slots,
        block_tokens=config.block_tokens,
        entry_bytes=codec.entry_bytes,
        staged=staged,
    )
    memory = torch.full((pool_map.num_bytes,), 0x7F, dtype=torch.uint8)
    return GpuPool(memory, pool_map, codec, rank=rank, lease_slots=lease_slots)


def pools_of(config: RuntimeConfig, world_size: int, *, staged: int = 64) -> list[GpuPool]:
    """Of all ranks, each of which can read all of them."""
    pools = [pool_of(config, rank, world_size, staged=staged) for rank in range(world_size)]
    peers = torch.tensor([pool.memory.data_ptr() for pool in pools])
    for pool in pools:
        pool.peers = peers
    return pools


class Part(NamedTuple):
    """What a rank has of `corpus`: its pool, and the host's truth about it."""

    pool: GpuPool
    store: BlockStore
    directory: Directory

    def rows(self, layer: int, key: int) -> Tensor:
        """Encoded rows (B, bytes) of a block of this rank."""
        index, _ = self.store.resolve(layer, torch.arange(B) + key * B)
        return self.store.rows(layer, index)

    def leased(self, layer: int, slot: int) -> Tensor:
        """Encoded rows (B, bytes) in a lease slot, counted from the first."""
        shape = self.pool.map
        rows = self.pool.storage()[layer].view(shape.slots, B, shape.entry_bytes)
        return rows[self.pool.leases.first + slot]


def corpus(config: RuntimeConfig, world_size: int, tokens: int, *, staged: int = 64) -> list[Part]:
    """One document of random entries, block by block in turn at each rank; all tables are up to date."""
    coder, blocks = entry_codec(config.model.layers[0]), -(-tokens // B)
    ranks = (torch.arange(blocks) % world_size).int()[:, None, None]
    directory = with_document(
        empty_directory(
            max_blocks=config.max_blocks,
            block_tokens=B,
            num_branches=1,
            copies=1,
            world_size=world_size,
        ),
        "a", tokens=tokens, position=0, ranks=ranks, capacity=config.slots_for(world_size),
    )  # fmt: skip
    parts = []
    for rank, pool in enumerate(pools_of(config, world_size, staged=staged)):
        store = BlockStore(
            [coder] * LAYERS,
            num_slots=entry_slots(config, world_size),
            num_keys=config.max_ids,
            block_tokens=B,
            lease_entries=config.lease_entries,
            storage=pool.storage(),
        )
        keys, copy = (directory.owners == rank).nonzero(as_tuple=True)
        store.assign(keys, directory.slots[keys, copy])
        ids = torch.arange(tokens, dtype=torch.int32)
        ids = ids[store.holds(ids)]
        for layer in range(LAYERS):
            rows = coder.encode(numbers(tokens, coder.dim, seed=layer)[ids.long()])
            store.write(layer, ids, rows)
        pool.refresh(store, directory)
        parts.append(Part(pool, store, directory))
    return parts


class StandIn:
    """`GpuStep` by definition: every listed entry is read at whoever has it."""

    def __init__(
        self,
        config: RuntimeConfig,
        rank: int,
        pools: list[GpuPool],
        rows: int,
        taken: list[tuple[int, int]],
        meeting: threading.Barrier,
    ) -> None:
        layout, world, dtype = config.model.layers[0], len(pools), config.dtype
        self._config, self._rank, self._pools = config, rank, pools
        self._taken, self._meeting = taken, meeting
        self.query = torch.zeros(rows, layout.heads, layout.key_dim, dtype=dtype)
        self.units = torch.full((rows, config.max_units), -1, dtype=torch.int32)
        self.hidden = torch.zeros(rows, 2, dtype=torch.int32)
        self.out = torch.empty(rows, layout.heads, layout.value_dim, dtype=dtype)
        self.lse = torch.empty(rows, layout.heads)
        self.fault = torch.zeros(rows, dtype=torch.int32)
        self.plan = Plan.make(
            num_items=rows,
            num_listed=config.max_units,
            world_size=world,
            num_forms=1,
            device="cpu",
        )

    def replay(self, layer: int, mode: Mode) -> None:
        self._meeting.wait()  # all tables are up to date
        self._taken.append((layer, len(self.query)))
        layout = self._config.model.layers[layer]
        codec = entry_codec(layout)
        self.plan.way.zero_()
        came = set[int]()  # from others, as if all of it was fetched
        pool = self._pools[self._rank]
        kept = pool.leases
        asked = self.plan.pairs_units.zero_()
        self.fault.zero_()
        for item, (query, listed) in enumerate(zip(self.query, self.units, strict=True)):
            rows = []
            for unit in listed[listed >= 0].tolist():
                begin, end = self.hidden[item].tolist()
                if not begin <= unit < end:
                    row, holder = self._read(layer, unit)
                    asked[item, holder] += 1
                    if row is None:
                        self.fault[item] = holder + 1
                        continue
                    rows.append(row)
                    slot = int(pool.slot_of[unit // B])
                    if holder != self._rank:
                        came.add(unit)
                    elif kept.read is not None and slot >= kept.first:
                        kept.read[slot - kept.first] += 1
            nothing = torch.zeros(0, codec.entry_bytes, dtype=torch.uint8)
            stored = torch.stack(rows).view(torch.uint8) if rows else nothing
            entries = codec.decode(stored, torch.float32)
            out, lse = reference.attend(
                query[None],
                entries[None],
                torch.ones(1, len(rows), dtype=torch.bool),
                value_dim=layout.value_dim,
                scale=layout.softmax_scale,
            )
            self.out[item], self.lse[item] = out[0], lse[0]
        remote = FETCH if mode == "always-fetch" else ROUTE
        if kept.fetched is not None and remote == FETCH:
            keys = torch.tensor(sorted(came), dtype=torch.int64) // B
            kept.fetched += torch.bincount(keys, minlength=len(kept.fetched)).int()
        own = torch.arange(len(self._pools)) == self._rank
        self.plan.way[:] = torch.where(asked == 0, 0, torch.where(own, LOCAL, remote))
        away = torch.where(own, 0, asked)
        routed = away * (remote == ROUTE)
        self.plan.pairs[0] = (routed > 0).sum(0)
        self.plan.listed[0] = routed.sum(0)
        self.plan.counts[:] = (away - routed).sum(0)
        self.plan.unique_units[:] = away.sum(0)
        self.plan.fair_units[:] = away.double()
        self._meeting.wait()  # nobody reads any more

    def _read(self, layer: int, unit: int) -> tuple[Tensor | None, int]:
        """The entry, None if it is not there as this rank's directory says; and who was asked."""
        block_tokens = self._config.block_tokens
        key, offset = divmod(unit, block_tokens)
        owner, slot, generation, tokens = self._pools[self._rank].directory.records[key].tolist()
        holder = self._rank if slot >= 0 else owner
        pool = self._pools[holder]
        at = int(pool.slot_of[key])
        there = at >= 0 and offset < min(int(pool.fill[layer, at]), tokens)
        if not there or int(pool.generation[at]) != generation:
            return None, holder
        return pool.entries(layer)[at * block_tokens + offset], holder


_INTERPRETING = threading.Lock()


def one_at_a_time(*args: Any, **named: Any) -> None:
    """`fetch`, where the interpreter has room for one thread."""
    with _INTERPRETING:
        fetch(*args, **named)


class StandIns:
    """GPUs of a world in this process, as `open_gpu` would give them; a context."""

    def __init__(self, config: RuntimeConfig, world_size: int) -> None:
        self.pools = pools_of(config, world_size)
        meeting = threading.Barrier(world_size, timeout=20.0)
        sizes = (*config.buckets, config.max_queries)
        # Of each rank the layer and size of the steps that it took.
        self.taken = [list[tuple[int, int]]() for _ in range(world_size)]
        self.steps = [
            [StandIn(config, rank, self.pools, rows, taken, meeting) for rows in sizes]
            for rank, taken in enumerate(self.taken)
        ]
        self._stack = ExitStack()

    def __enter__(self) -> StandIns:
        def opened(config: RuntimeConfig, transport: Transport) -> GpuRank:
            at = transport.rank
            return GpuRank(self.pools[at], self.steps[at], None)  # type: ignore[arg-type]

        self._stack.enter_context(patch.object(gpu_rank, "open_gpu", opened))
        self._stack.enter_context(patch.object(leases, "fetch", one_at_a_time))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()


class Life:
    """One rank's part; `outs` are its outputs, in order. Queries differ by rank, documents do not.

    All numbers are rounded to what GPUs take with the layout's codec, whatever the dtype here.
    """

    def __init__(self, runtime: Runtime, *, weights: bool = True) -> None:
        self.runtime, self.outs = runtime, list[Tensor]()
        self.layout, self.dtype = runtime.config.model.layers[0], runtime.config.dtype
        self._given = DTYPES[self.layout.codec]
        self._seed = 0
        self.weights = weights
        heads, latent = self.layout.heads, self.layout.value_dim
        for layer in range(LAYERS) if weights else ():
            w_uk = numbers(1, heads, 32, latent, seed=700 + layer) / 8
            w_uv = numbers(1, heads, latent, 32, seed=800 + layer) / 8
            runtime.load_weights(layer, w_uk.to(self._given), w_uv.to(self._given))

    def numbers(self, *shape: int) -> Tensor:
        """Others at every rank and call."""
        self._seed += 1
        drawn = numbers(*shape, seed=1000 * self.runtime.rank + self._seed)
        return drawn.to(self._given).to(self.dtype)

    def index_numbers(self, *shape: int) -> Tensor:
        """As `numbers`, in eighths."""
        return eighths(self.numbers(*shape))

    def add(self, name: str, tokens: int, seed: int) -> None:
        self.runtime.add_document(name, tokens=tokens)
        for layer in range(LAYERS):
            entries = numbers(tokens, self.layout.entry_dim, seed=seed + layer)
            entries = entries.to(self._given).to(self.dtype)
            keys = eighths(numbers(tokens, 64, seed=seed + layer + 50))
            self.runtime.load_document(name, layer, entries, keys)

    def query(self, count: int) -> Tensor:
        dim = self.layout.query_dim if self.weights else self.layout.key_dim
        return self.numbers(count, self.layout.heads, dim)

    def selected(self, layer: int, count: int, mode: Mode, **seen: Any) -> None:
        """Select and attend, or both idly."""
        if count == 0:
            self.runtime.idle_select(layer)
            self.runtime.idle_attend(layer)
            return
        chosen = self.runtime.select(
            layer, self.index_numbers(count, 4, 64), self.index_numbers(count, 4).abs(), **seen
        )
        sink = self.numbers(self.layout.heads) if layer else None
        self.outs.append(
            self.runtime.attend(layer, self.query(count), chosen, sink=sink, mode=mode)
        )

    def drawn(self, layer: int, count: int, mode: Mode, documents: Sequence[str]) -> None:
        """Attend to entries drawn by chance, without a select before it."""
        runtime = self.runtime
        if count == 0:
            runtime.idle_attend(layer)
            return
        known = {document.name: document for document in runtime.documents()}
        ids = torch.cat([known[name].ids() for name in documents])
        self._seed += 1
        generator = torch.Generator().manual_seed(1000 * runtime.rank + self._seed)
        listed = [ids[torch.randperm(len(ids), generator=generator)[:20]] for _ in range(count)]
        chosen = torch.stack(listed)
        chosen[:, ::7] = -1
        scope = runtime.scope(documents=documents, queries=count)
        selection = runtime.selection(chosen, scope)
        self.outs.append(runtime.attend(layer, self.query(count), selection, mode=mode))


def live(runtime: Runtime, *, weights: bool = True) -> list[Tensor]:
    """Documents loaded, prefilled, attended to, removed and added again; private tokens; idle ranks."""
    life, rank = Life(runtime, weights=weights), runtime.rank
    life.add("a", 5 * B + 3, seed=1)
    life.add("b", 3 * B, seed=11)
    for turn, mode in enumerate(MODES):
        for layer in range(LAYERS):
            life.selected(layer, (rank + turn) % 3, mode, documents=["a", "b"])
    for turn, mode in enumerate(MODES):
        life.drawn(turn % LAYERS, (rank + turn + 1) % 3, mode, ["b", "a"])

    # The first rank prefills a document whose blocks are everywhere; all see it grow.
    runtime.add_document("p", tokens=3 * B)
    writer = runtime.request(["a"], into="p") if rank == 0 else None
    for turn in range(3):
        ids = None if writer is None else runtime.append(writer, B)
        for layer in range(LAYERS):
            if writer is not None and ids is not None:
                entries = life.numbers(B, life.layout.entry_dim)
                runtime.write(layer, ids, entries, life.index_numbers(B, 64))
            documents = ["a"] if turn == 0 else ["a", "b"]
            if writer is not None and ids is not None:
                scope = runtime.scope(requests=[(writer, ids)])
                life.selected(layer, B, MODES[turn], scope=scope)
            else:
                life.selected(layer, 2, MODES[turn], documents=documents)
    if writer is not None:
        runtime.release(writer)

    # Removed and added again: the same blocks in another generation, with other entries.
    runtime.remove_document("a")
    life.add("c", 6 * B, seed=21)
    for mode in MODES:
        life.drawn(1, 3, mode, ["c", "p"])

    # Tokens of requests, which stay at home.
    request = runtime.request(["c"])
    ids = runtime.append(request, 3)
    for layer in range(LAYERS):
        runtime.write(layer, ids, life.numbers(3, life.layout.entry_dim), life.index_numbers(3, 64))
        life.selected(layer, 3, "auto", scope=runtime.scope(requests=[(request, ids)]))
    runtime.release(request)
    for layer in range(LAYERS):
        life.selected(layer, 2, "auto", documents=["c"])
    return life.outs


# Two steps fetch as much as leases hold; then it is here, until it is dropped, or given up.
_AWAY, _HERE = "0:LOCAL 1:FETCH", "0:LOCAL"
WAYS_OF_LEASING = [_AWAY, _AWAY, _HERE, _HERE, _AWAY, _AWAY, _HERE, _AWAY, _AWAY, _HERE]


def leasing(runtime: Runtime) -> tuple[list[Tensor], list[str]]:
    """The first of two ranks reads two blocks of the other again and again, with leases for two: its
    outputs and, on GPUs, the ways of each step.
    """
    life, ways = Life(runtime, weights=False), list[str]()
    on_gpu = runtime.config.device == "cuda"

    def attend(name: str, layer: int) -> None:
        if runtime.rank == 1:
            runtime.idle_attend(layer)
            return
        own = next(document for document in runtime.documents() if document.name == name).ids()
        ids = torch.cat([own[B : 2 * B], own[3 * B :], own[:3]])[None]
        chosen = runtime.selection(ids, runtime.scope(documents=[name], queries=1))
        life.outs.append(runtime.attend(layer, life.query(1), chosen, mode="always-fetch"))
        if on_gpu:
            ways.append(" ".join(f"{line.holder}:{line.way}" for line in runtime.explain()))

    life.add("a", 4 * B, seed=1)
    for turn in range(4):
        attend("a", turn % LAYERS)
    if on_gpu and runtime.rank == 0:
        stats = runtime.stats()
        assert stats["lease_bytes"] == LAYERS * 2 * B * entry_codec(life.layout).entry_bytes
        assert stats["leases"] == {"hit": 2 * 2 * B, "evicted": 0}
    runtime.drop_leases()
    for turn in range(3):
        attend("a", turn % LAYERS)
    runtime.remove_document("a")
    life.add("c", 4 * B, seed=31)  # the same blocks, other entries
    for turn in range(3):
        attend("c", turn % LAYERS)
    return life.outs, ways


def on_cpus(
    world_size: int, given: RuntimeConfig, life: Callable[[Runtime], list[Tensor]], **changes: Any
) -> list[list[Tensor]]:
    """The outputs of every rank of a life on CPUs."""

    def work(end: Transport) -> list[Tensor]:
        with Runtime.open(replace(given, device="cpu", **changes), end) as runtime:
            return life(runtime)

    return run_loopback(world_size, work)


def eager_attend(
    query: Tensor, entries: Tensor, valid: Tensor, *, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.attend` as eager torch computes it in bf16, softmax in fp32."""
    query, entries = query.to(BF16), torch.where(valid[..., None], entries, 0.0).to(BF16)
    scores = query.float() @ entries.float().mT * scale
    scores = scores.masked_fill(~valid[:, None], -torch.inf)
    lse = scores.logsumexp(-1)
    shares = torch.where(lse[..., None] == -torch.inf, 0.0, scores.softmax(-1))
    return (shares.to(BF16) @ entries[..., :value_dim]).float(), lse


def in_bf16(verb: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda rows, weight: verb(rows.to(BF16), weight.to(BF16)).float()


def eagerly() -> Any:
    """A context in which CPUs, which compute in fp32, do so in bf16."""
    return patch.multiple(
        reference,
        attend=eager_attend,
        absorb=in_bf16(reference.absorb),
        project=in_bf16(reference.project),
    )


def assert_right(
    ours: list[list[Tensor]], given: RuntimeConfig, life: Callable[[Runtime], list[Tensor]]
) -> None:
    """Outputs of every rank in fp32 are those on CPUs to 1e-5. Those in bf16 err, against fp64 and head
    by head, at most twice what eager torch errs, plus one rounding.
    """
    if given.dtype == torch.float32:
        torch.testing.assert_close(ours, on_cpus(len(ours), given, life), rtol=1e-5, atol=1e-5)
        return
    exact = on_cpus(len(ours), given, life, dtype=torch.float64)
    with eagerly():
        eager = on_cpus(len(ours), given, life)
    for rank, outs in enumerate(zip(ours, eager, exact, strict=True)):
        for number, (out, theirs, right) in enumerate(zip(*outs, strict=True)):
            assert (out.dtype, out.shape) == (theirs.dtype, theirs.shape)
            error, eagers = ((x.double() - right).abs().amax(-1) for x in (out, theirs))
            allowed = 2 * eagers + torch.finfo(BF16).eps * right.abs().amax(-1)
            most = float((error / allowed).max())
            said = f"output {number} of rank {rank} errs {most:.2f} times what is allowed"
            assert bool((error <= allowed).all()), said
