"""World: everything one rank owns, opened in order; the only module that reads the environment."""

from __future__ import annotations

import os
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..partition.codec import Codec, make_codec
from ..partition.directory import Directory, empty_directory
from ..partition.eviction import Usage
from ..partition.layout import Form, Layout
from ..partition.pool import KINDS, BlockStore, Kind
from ..partition.snapshot.record import BlockHashes
from .config import RuntimeConfig
from .cost.model import LayerFacts
from .cost.predicate import Decision, Demand, Way
from .cpu.plan import chosen_copy
from .observe.profiling import named_range
from .transport.base import Column, LoopbackTransport, Sent, Transport
from .transport.gloo import TorchTransport
from .transport.messages import Header

if TYPE_CHECKING:
    from .gpu.backend import GpuRank
    from .service.server import Service


def connect(deadline_s: float) -> Transport:
    """The transport of this process: over a gloo group of its own beside torch.distributed's default
    group (made from a launcher's environment, torchrun's, if there is none), or a world of one.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return LoopbackTransport.world(1, deadline_s=deadline_s)[0]
        dist.init_process_group("gloo", timeout=timedelta(seconds=max(deadline_s, 60.0)))
    if dist.get_world_size() == 1:
        return LoopbackTransport.world(1, deadline_s=deadline_s)[0]
    # Of its own: an engine's messages in the default group must never meet ours.
    group = dist.new_group(backend="gloo")
    return TorchTransport(group=group, deadline_s=deadline_s)


def default_group() -> object | None:
    """torch.distributed's default group, if it has more ranks than this one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


class LayerWeights(NamedTuple):
    """w_uk (G, H, nope, latent) and w_uv (G, H, value, out) of one layer, H the heads of a branch."""

    w_uk: Tensor
    w_uv: Tensor


class Push(NamedTuple):
    """Written rows on their way to a copy elsewhere: stored ids (n,) and encoded rows (n, bytes)."""

    holder: Tensor
    ids: Tensor
    rows: Tensor

    def only(self, kept: Tensor) -> Push:
        """The rows that are `kept` (n,) bool."""
        return Push(self.holder[kept], self.ids[kept], self.rows[kept])


class Life(NamedTuple):
    """Which rank of how many this one was, and what tables it had."""

    rank: int
    world_size: int
    directory: Directory


class LastStep(NamedTuple):
    """The last decision, for `explain` and replays."""

    layer: int
    unit_tokens: int
    demand: Demand
    decision: Decision
    shifted: bool


@dataclass(slots=True)
class Served:
    """What the server did for each source, over all services of a runtime; written by it alone."""

    answered: Counter[int] = field(default_factory=Counter)
    refused: Counter[int] = field(default_factory=Counter)
    busy_s: float = 0.0
    most_requests: int = 0
    most_bytes: int = 0


_NO_RANGE = nullcontext()


@dataclass(slots=True)
class Stats:
    """Counters since the runtime was opened. `ways[h, w]` counts (item, holder) decisions."""

    ways: Tensor
    steps: int = 0
    queries: int = 0
    phase_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    leases: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    profile_ranges: bool = False

    def count(self, way: Tensor, queries: int) -> None:
        """Add one attention step and its ways (N, W)."""
        self.steps += 1
        self.queries += queries
        self.ways += torch.nn.functional.one_hot(way.long(), len(Way)).sum(0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with named_range(name) if self.profile_ranges else _NO_RANGE:
                yield
        finally:
            self.phase_s[name] += time.perf_counter() - start


class World:
    """A rank's transport, directory, pool, leases and weights. Made by `Runtime.open`."""

    def __init__(
        self,
        config: RuntimeConfig,
        transport: Transport,
        sent_before: Sent | None = None,
    ) -> None:
        """`sent_before`: what `transport` had counted when opening began; None: it begins now."""
        self.config = config
        self.transport = transport
        self.rank, self.world_size = transport.rank, transport.world_size
        self._sent_before = sent_before or transport.counted()
        self.service: Service | None = None
        self.served = Served()
        self.avoided: frozenset[int] = frozenset()  # asked only where nobody else has a copy
        if config.placement.copies > self.world_size:
            raise ValueError(
                f"{config.placement.copies} copies need as many ranks, the world has {self.world_size}"
            )
        layers = config.model.layers
        branches, block_tokens = config.num_branches, config.block_tokens
        self.corpus_slots = config.slots_for(self.world_size)
        self.directory: Directory = empty_directory(
            max_blocks=config.max_blocks,
            block_tokens=block_tokens,
            num_branches=branches,
            copies=config.placement.copies,
            world_size=self.world_size,
        )
        self.settled = self.directory  # the tables of the last step of all: every rank had these
        self.gpu: GpuRank | None = None
        if config.device == "cuda":
            from .gpu.backend import open_gpu  # only here: it needs Triton

            self.gpu = open_gpu(config, transport)
        private = config.private_blocks
        self.entries = BlockStore(
            [entry_codec(layout) for layout in layers],
            num_slots=entry_slots(config, self.world_size),
            num_keys=config.max_ids,
            block_tokens=block_tokens,
            lease_entries=config.lease_entries,
            storage=None if self.gpu is None else self.gpu.pool.storage(),
        )
        self.index_slots = index_slots(config, self.world_size)
        index_codecs = [index_codec(layout) for layout in layers]
        self.has_index = any(index_codecs)
        self.index = BlockStore(
            index_codecs,
            num_slots=max(self.index_slots + private, 1) if self.has_index else 1,
            num_keys=config.max_ids // branches,
            block_tokens=block_tokens,
        )
        self.hashes: dict[Kind, BlockHashes] = {
            "entries": BlockHashes(config.max_blocks * branches),
            "index": BlockHashes(config.max_blocks if self.has_index else 0),
        }
        # On GPUs whole blocks are leased (`gpu/leases.py`).
        tables = 0 if self.gpu is not None else len(layers)
        self.leases = [self.entries.leases(layer) for layer in range(tables)]
        self.weights: list[LayerWeights | None] = [None] * len(layers)
        # What was written for copies elsewhere, by layer, until it is sent.
        self.staged: dict[Kind, list[list[Push]]] = {kind: [[] for _ in layers] for kind in KINDS}
        # What was sent with the last step, and its layer: whether it was taken, the next one shows.
        self.sent: list[tuple[int, dict[Kind, list[Push]]]] = []
        self.facts = [layer_facts(config, layout) for layout in layers]
        self.epoch = 0
        # The last exchange, if everyone was answered in it, and so had taken all writes before.
        self.answered: Header | None = None
        self._is_whole = True  # every block in use has all of its copies
        # The life before the last one, until tables change: not all may know yet that it ended.
        self.former: Life | None = None
        self._weights_mark = 0
        self._incarnation = config.fingerprint(self.world_size, transport.incarnation)
        ways = torch.zeros(self.world_size, len(Way), dtype=torch.int64)
        self.stats = Stats(ways, profile_ranges=config.profile_ranges)
        self.last: LastStep | None = None
        self.usage = Usage(config.half_life)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.config.dtype == torch.float64 else torch.float32

    def generations(self, stored_ids: Tensor) -> Tensor:
        """What the directory says of the blocks of stored ids; ids beyond the corpus give anything."""
        generations = self.directory.generations
        keys = stored_ids.long() // self.config.block_tokens
        return generations[keys.clamp(0, len(generations) - 1)]

    def askable(self) -> Tensor | None:
        """Whom a plan may ask, as `plan.chosen_copy` takes it; in the engine's thread."""
        gone = {} if self.service is None else self.service.unreachable()
        if not gone and not self.avoided and self._is_whole:
            return None
        askable = torch.full((self.world_size,), 2, dtype=torch.uint8)
        askable[list(self.avoided)] = 1
        askable[list(gone)] = 0
        return askable

    def scorers(self, blocks: Tensor, askable: Tensor | None) -> Tensor:
        """The rank that scores each block when index keys live with their blocks, for a requester that
        can ask `askable` (`plan.chosen_copy`); -1 for private blocks, and where nobody can be asked.
        """
        return chosen_copy(self._owners(blocks * self.config.num_branches), 0, askable)

    def forms(self, layer: int) -> tuple[Form, ...]:
        """Payload forms that can be executed: B with the projection weights, which headers compare."""
        return ("A",) if self.weights[layer] is None else ("A", "B")

    def header(self, kind: str, *, layer: int, unit_tokens: int = 1, top_k: int = 0) -> Header:
        return Header(
            kind=kind,
            incarnation=self._incarnation,
            channel=0,
            epoch=self.epoch,
            tables=self.directory.version ^ self._weights_mark,
            layer=layer,
            unit_tokens=unit_tokens,
            top_k=top_k,
        )

    def take_weights(self, layer: int, weights: LayerWeights) -> None:
        """Keep a layer's weights. Their mark joins the table version: ranks that differ are named."""
        self.check_not_serving()
        here = self.entries.device
        self.weights[layer] = LayerWeights(weights.w_uk.to(here), weights.w_uv.to(here))
        for weight in weights:
            raw = weight.cpu().view(torch.uint8).numpy().tobytes()
            self._weights_mark = zlib.crc32(
                raw, zlib.crc32(bytes([layer % 256]), self._weights_mark)
            )

    def adopt(self, directory: Directory, rank: int | None = None) -> None:
        """Take over another directory: give up the blocks that are gone, with their leases and what
        was written for them and not sent, and the copies that are no longer here; give the new ones
        here their slots.

        Args: rank: which of the directory's ranks this one is; None: as the transport says.
        """
        self.check_not_serving()
        rank = self.rank if rank is None else rank
        branches, before = self.config.num_branches, self.directory
        changed = (before.generations != directory.generations).view(-1, branches)[:, 0]
        unused, wanted = before.references == 0, directory.references > 0
        gone = (~unused & (changed | ~wanted)).nonzero()[:, 0]
        if self.gpu is not None and len(gone):
            self.gpu.meet(self)
        self._give_up(gone)
        here = directory.owners == rank
        self._let_go(here)
        mine, copy = here.nonzero(as_tuple=True)
        fresh = self.entries.slot_of[mine] < 0
        mine, copy = mine[fresh], copy[fresh]
        self.entries.assign(mine, directory.slots[mine, copy], directory.generations[mine])
        if self.has_index:
            fresh = wanted & (self.index.slot_of[: len(wanted)] < 0)
            if self.config.index_placement == "with-blocks":
                fresh &= here[::branches].any(1)
            blocks = fresh.nonzero()[:, 0]
            free = (self.index.key_of[: self.index_slots] < 0).nonzero()[:, 0]
            generations = directory.generations[blocks * branches]
            self.index.assign(blocks, free[: len(blocks)], generations)
        self.directory = directory
        held = (directory.owners >= 0).view(self.config.max_blocks, -1)
        self._is_whole = bool(held[wanted].all())
        self.former = None
        self.usage.keep({document.serial for document in directory.documents.values()})

    def _let_go(self, here: Tensor) -> None:
        """Free the slots of copies that are not `here` (K, R) any more."""
        keys = (self.entries.slot_of[: len(here)] >= 0) & ~here.any(1)
        self.entries.release(keys.nonzero()[:, 0])
        if self.has_index and self.config.index_placement == "with-blocks":
            firsts = here[:: self.config.num_branches].any(1)
            blocks = (self.index.slot_of[: len(firsts)] >= 0) & ~firsts
            self.index.release(blocks.nonzero()[:, 0])

    def _give_up(self, blocks: Tensor) -> None:
        """Forget all that is here of these blocks."""
        if len(blocks) == 0:
            return
        branches, block_tokens = self.config.num_branches, self.config.block_tokens
        keys = (blocks[:, None] * branches + torch.arange(branches)).reshape(-1)
        self.entries.release(keys[self.entries.slot_of[keys] >= 0])
        if self.has_index:
            self.index.release(blocks[self.index.slot_of[blocks] >= 0])
        stored = (keys[:, None] * block_tokens + torch.arange(block_tokens)).reshape(-1)
        for leases in self.leases:
            leases.forget(stored)
        of_kind: dict[Kind, Tensor] = {"entries": keys, "index": blocks}
        for kind, gone in of_kind.items():
            for staged in [*self.staged[kind], *(sent[kind] for _, sent in self.sent)]:
                left = [push.only(~torch.isin(push.ids // block_tokens, gone)) for push in staged]
                staged[:] = [push for push in left if len(push.ids)]

    def check_not_serving(self) -> None:
        """Raises: RuntimeError during a service, when no step of the whole world is taken and tables
        stay as they are.
        """
        if self.service is not None:
            raise RuntimeError(
                "documents are changed, leased, saved and verified, and weights loaded, between "
                "services: close the service on every rank"
            )

    def assign_private(self, block: int, seat: int) -> None:
        """Give a running request's block the private seat `seat` of this rank's pool."""
        branches = self.config.num_branches
        branch = torch.arange(branches)
        first = self.corpus_slots + seat * branches
        self.entries.assign(block * branches + branch, first + branch)
        if self.has_index:
            self.index.assign(torch.tensor([block]), torch.tensor([self.index_slots + seat]))

    def release_private(self, block: int) -> None:
        branches = self.config.num_branches
        self.entries.release(block * branches + torch.arange(branches))
        if self.has_index:
            self.index.release(torch.tensor([block]))

    def store(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None, *, push: bool
    ) -> None:
        """Write entries (n, G, D) and index keys (n, D) of entry ids (n,) into the copies held here.

        With `push`, copies elsewhere are staged for the layer's next step; without, other ranks are
        given the same entries and write theirs.
        """
        stored = self.stored_ids(ids)
        here = self.entries.holds(stored)
        flat = entries.flatten(0, 1)
        codec, index_codec = self.entries.codecs[layer], self.index.codecs[layer]
        assert codec is not None
        # Both are encoded before either is written: what cannot be stored changes nothing.
        rows = self._encode(codec, flat, torch.ones_like(here) if push else here)
        index_rows = None
        if index_keys is not None:
            assert index_codec is not None
            index_rows = self._encode(index_codec, index_keys, torch.ones(len(ids)).bool())
        if push:
            self.keep(layer, ids, rows, index_rows)
            return
        self.entries.write(layer, stored[here], rows)
        if index_rows is not None:
            held = self.index.holds(ids)
            self.index.write(layer, ids[held], index_rows[held])

    def stored_ids(self, ids: Tensor) -> Tensor:
        """Stored ids (n * G,) int32 of entry ids (n,), all branches of an entry together."""
        block_tokens, branches = self.config.block_tokens, self.config.num_branches
        block, offset = ids // block_tokens, ids % block_tokens
        keys = block[:, None] * branches + torch.arange(branches, dtype=torch.int32)
        return (keys * block_tokens + offset[:, None]).reshape(-1)

    def keep(self, layer: int, ids: Tensor, rows: Tensor, index_rows: Tensor | None) -> None:
        """Write encoded rows (n * G, bytes) of entry ids (n,), and index keys' (n, bytes), into the
        copies here; those elsewhere are staged for the layer's next step.
        """
        stored = self.stored_ids(ids)
        here = self.entries.holds(stored)
        self.entries.write(layer, stored[here], rows[here])
        self.stage("entries", layer, stored, rows)
        if index_rows is not None:
            here = self.index.holds(ids)
            self.index.write(layer, ids[here], index_rows[here])
            self.stage("index", layer, ids, index_rows)

    def stage(self, kind: Kind, layer: int, ids: Tensor, rows: Tensor) -> None:
        """Keep encoded rows (n, bytes) of ids (n,), stored ids or of index keys, for the copies
        elsewhere, until the layer's next step.
        """
        for copy in self._holders(kind, ids // self.config.block_tokens).unbind(1):
            away = (copy >= 0) & (copy != self.rank)
            if bool(away.any()):
                self.staged[kind][layer].append(Push(copy[away], ids[away], rows[away].cpu()))

    def _encode(self, codec: Codec, entries: Tensor, chosen: Tensor) -> Tensor:
        """Rows of the `chosen` (N,) of entries (N, D), where these are, tile by tile within the
        workspace."""
        at = chosen.nonzero()[:, 0]
        rows = entries.new_empty(len(at), codec.entry_bytes, dtype=torch.uint8)
        step = max(self.config.workspace_bytes // (16 * codec.dim), 1)
        for start in range(0, len(at), step):
            tile = slice(start, start + step)
            rows[tile] = codec.encode(entries[at[tile]])
        return rows

    def _holders(self, kind: Kind, keys: Tensor) -> Tensor:
        """Ranks (n, *) that have a copy of keys (n,) of a kind; -1 for none."""
        if kind == "entries":
            return self._owners(keys)
        if self.config.index_placement == "replicated":
            everyone = torch.arange(self.world_size, dtype=torch.int32).expand(len(keys), -1)
            return torch.where((keys < self.config.max_blocks)[:, None], everyone, -1)
        return self._owners(keys * self.config.num_branches)

    def _owners(self, keys: Tensor) -> Tensor:
        """Ranks (*, R) of the copies of keys (*); -1 for private ones, which are only here."""
        owners = self.directory.owners
        corpus = (keys >= 0) & (keys < len(owners))
        return torch.where(corpus[..., None], owners[torch.where(corpus, keys, 0).long()], -1)

    def last_step(self) -> LastStep | None:
        """The last `attend` of this rank."""
        return self.last if self.gpu is None else self.gpu.last_step(self)

    def counted(self) -> dict[str, Any]:
        """The counters as plain values."""
        stats, served = self.stats, self.served
        sent, before = self.transport.counted(), self._sent_before
        blocks, leases = self.entries.block_residence, self.entries.lease_residence
        on_gpu: Counter[str] = Counter() if self.gpu is None else self.gpu.bytes
        leased = stats.leases if self.gpu is None else self.gpu.pool.leases.counted()
        return {
            "rank": self.rank,
            "steps": stats.steps,
            "queries": stats.queries,
            "decisions": {
                rank: {way.name.lower(): int(ways[way]) for way in Way if way != Way.NONE}
                for rank, ways in enumerate(stats.ways)
            },
            "bytes_sent": dict(sent.bytes - before.bytes + on_gpu),
            "messages_sent": dict(sent.messages - before.messages),
            "bytes_to": dict(sent.bytes_to - before.bytes_to),
            "served": {
                "answered": dict(served.answered),
                "refused": dict(served.refused),
                "busy_s": served.busy_s,
                "most_requests": served.most_requests,
                "most_bytes": served.most_bytes,
            },
            "leases": {"hit": 0, "evicted": 0, **leased},
            "failures": {
                "coverage": 0,
                "failover": 0,
                "deadline": self.transport.expiries,
                "late": self.transport.late.total(),
                **stats.failures,
            },
            "lifetime": {"block": blocks.lifetime.plain(), "lease": leases.lifetime.plain()},
            "reuse_gap": {"block": blocks.reuse_gap.plain(), "lease": leases.reuse_gap.plain()},
            "phase_s": dict(stats.phase_s),
            "pool_bytes": self.entries.num_bytes + self.index.num_bytes,
            "lease_bytes": self.entries.lease_bytes,
            "block_bytes": self.entries.held_bytes + self.index.held_bytes,
        }

    def reconnect(self, transport: Transport, sent_before: Sent) -> None:
        """Speak through another transport, as another rank perhaps: what is here stays, what was
        counted by rank begins anew.
        """
        self.transport, self._sent_before = transport, sent_before
        self.rank, self.world_size = transport.rank, transport.world_size
        self._incarnation = self.config.fingerprint(self.world_size, transport.incarnation)
        self.avoided = frozenset()
        self.served, self.last = Served(), None
        self.stats.ways = torch.zeros(self.world_size, len(Way), dtype=torch.int64)

    def staged_at(self, layer: int) -> dict[Kind, list[Push]]:
        """What is staged now, for `put_back` if it turns out that nobody may have got it."""
        return {kind: staged[layer] for kind, staged in self.staged.items()}

    def put_back(self, layer: int, pushes: Mapping[Kind, list[Push]]) -> None:
        for kind, staged in self.staged.items():
            staged[layer] = pushes[kind]

    def take_pushes(self, layer: int, not_to: Collection[int] = ()) -> list[Column]:
        """The columns of what was written for other ranks at this layer, forgotten once taken; what
        is for the ranks `not_to` stays.
        """
        columns: list[Column] = []
        staying = torch.tensor(sorted(not_to), dtype=torch.int32)
        for name, staged in (
            ("push", self.staged["entries"]),
            ("push_index", self.staged["index"]),
        ):
            pushes, staged[layer] = staged[layer], []
            if len(staying):
                stays = [torch.isin(push.holder, staying) for push in pushes]
                kept = [push.only(here) for push, here in zip(pushes, stays, strict=True)]
                pushes = [push.only(~here) for push, here in zip(pushes, stays, strict=True)]
                staged[layer] = [push for push in kept if len(push.ids)]
            if any(len(push.ids) for push in pushes):
                holder = torch.cat([push.holder for push in pushes]).long()
                order = holder.argsort(stable=True)
                counts = torch.bincount(holder, minlength=self.world_size)
                ids = torch.cat([push.ids for push in pushes])
                rows = torch.cat([push.rows for push in pushes])
                columns.append(Column(f"{name}.ids", ids, counts, order))
                columns.append(Column(f"{name}.rows", rows, counts, order))
        return columns


def entry_slots(config: RuntimeConfig, world_size: int) -> int:
    """(block, branch) copies that one rank's pool has room for, the corpus's and private ones."""
    return max(config.slots_for(world_size) + config.private_blocks * config.num_branches, 1)


def index_slots(config: RuntimeConfig, world_size: int) -> int:
    """Blocks whose index keys one rank may have to hold: with copies of their first branch, or all."""
    placement, branches = config.placement, config.num_branches
    if config.index_placement == "replicated":
        return config.max_blocks
    if placement.policy == "block-cyclic":
        rounds = -(-config.max_blocks // (placement.run * world_size))
        return min(rounds * placement.run * placement.copies, config.max_blocks)
    # Elsewhere all that a rank holds may be first branches.
    per_block = 1 if placement.policy == "branch-split" else branches
    return min(-(-config.slots_for(world_size) // per_block), config.max_blocks)


def entry_codec(layout: Layout) -> Codec:
    return make_codec(layout.codec, dim=layout.entry_dim, rope_dim=layout.rope_dim)


def index_codec(layout: Layout) -> Codec | None:
    if layout.index is None:
        return None
    return make_codec(layout.index_codec, dim=layout.index.head_dim, rope_dim=layout.index.rope_dim)


def layer_facts(config: RuntimeConfig, layout: Layout) -> LayerFacts:
    """What the cost model knows of a layer."""
    return LayerFacts.of(
        layout,
        entry_bytes=entry_codec(layout).entry_bytes,
        element_bytes=config.dtype.itemsize,
    )
