"""A world goes on: with the ranks that are left, with ranks that were started again, or with both.

A world in which a rank died takes no more steps. Its survivors keep what they have, make a transport
of those who are there now, and open the world again in a new incarnation (`Runtime.rejoin`); a rank that
was started again, or is new, opens it for the first time (`Runtime.open`). It is a step of them all:

    facts    Each sends which rank of the former world it was, if any. Survivors must have had the same
             tables, at the latest in the last step that each saw through: who changed documents since
             and is alone with it goes back. The first of them gives these tables to who has none.
    repair   Everyone computes where blocks are now (`partition/repair.py`): copies of ranks that are gone
             are made anew where there is room, which a rank that was started again has.
    refill   Each sends how far the blocks that it holds are written. Of every block that some copies
             have less of, the fullest (of the lowest rank) is sent to these, in rounds of bounded size.
             So a copy that is new, and one that missed a write, are as good as the best one afterwards.

What survivors wrote and nobody is known to have taken is kept for those who hold it now. Requests and
their private tokens stay where they are. Of a block that nobody has left nothing is invented: it has no
copy, `Runtime.lost_blocks` names it, and a snapshot brings it back (`restore`). Messages of the
former incarnation are refused by the carriers (`Transport.begin`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...partition.codec import Codec
from ...partition.directory import Directory
from ...partition.directory_codec import directory_columns, directory_of
from ...partition.pool import KINDS, Kind
from ...partition.repair import repaired
from ...partition.snapshot.record import BATCH_BYTES
from ..errors import PeerError
from ..lockstep import broadcast, settle
from ..tables import PastWorld
from ..transport.messages import Header, Message
from ..world import World
from ..writes import Push, Staged

_OWN = 3  # facts of a rank itself; those of its incarnations follow, as `_Facts`
_CANDIDATES = 3


@dataclass(slots=True)
class Former:
    """The last incarnation of a survivor that goes on, how many steps it saw, and what it had written
    for others and not seen taken; `settled` has the tables of the last step that it saw through. It
    stands until the rejoining succeeds, which may take more than one attempt.
    """

    last: PastWorld
    settled: PastWorld
    epoch: int
    staged: Staged

    @classmethod
    def of(cls, world: World, before: Former | None) -> Former:
        """Of a world that lost its transport, or of `before` if it lost it while it was rejoining."""
        staged = world.writes.take_unconfirmed()
        if before is None:
            last = PastWorld(world.rank, world.world_size, world.directory)
            settled = last._replace(directory=world.tables.settled)
            return cls(last, settled, world.progress.epoch, staged)
        for kind, layers in before.staged.items():
            for layer, pushes in enumerate(layers):
                staged[kind][layer] = [*pushes, *staged[kind][layer]]
        return cls(before.last, before.settled, before.epoch, staged)

    def candidates(self, world: World) -> tuple[PastWorld | None, ...]:
        """The incarnations that may go on, the last one first: all ranks have one of them in common."""
        return self.last, self.settled, world.tables.former

    def go_back(self, world: World, to: _Facts) -> None:
        """Take the tables of an earlier incarnation; what was written for blocks that it does not have
        is given up with them."""
        self.last = next(one for one in self.candidates(world) if one and _Facts.of(one) == to)
        self.staged = world.writes.swap(self.staged)
        world.adopt(self.last.directory, rank=self.last.rank)
        self.staged = world.writes.swap(self.staged)


class _Facts(NamedTuple):
    """An incarnation in numbers; a rank that comes with nothing has none, and sends rank -1."""

    rank: int
    world_size: int
    version: int
    serial: int

    @classmethod
    def of(cls, one: PastWorld | None) -> _Facts:
        if one is None:
            return cls(-1, 0, 0, 0)
        return cls(one.rank, one.world_size, one.directory.version, one.directory.serial)

    @classmethod
    def several(cls, numbers: Sequence[int]) -> list[_Facts]:
        """All that a rank sent, its last incarnation first."""
        size = len(cls._fields)
        return [cls(*numbers[at : at + size]) for at in range(0, len(numbers), size)]

    @property
    def tables(self) -> tuple[int, ...]:
        """What ranks of one world have in common."""
        return self[1:]


# More is no fact of any world, and would end this one: in memory, or in headers that cannot be sent.
_MOST_STEPS, _MOST_SLOTS = 1 << 62, 1 << 62
_MOST_FACTS = _Facts(rank=1 << 16, world_size=1 << 16, version=(1 << 32) - 1, serial=1 << 62)


class _Progress(NamedTuple):
    """How far the blocks of a kind are written: `keys` (n,) and `fill` (L, n) of each rank; the `most`
    (L, K) that any has, and the lowest rank that has it, `source` (L, K)."""

    keys: list[Tensor]
    fill: list[Tensor]
    most: Tensor
    source: Tensor


def rejoin(world: World, former: Former | None) -> None:
    """Take part in the beginning of an incarnation; `former` is None for a rank that comes with nothing.

    Raises: PeerError on every rank if the survivors are not of one world, or the pools differ in size.
    """
    were, serial = _introduced(world, former)
    survivors = [rank for rank, was in enumerate(were) if was.rank >= 0]
    if not survivors:
        return
    size = were[survivors[0]].world_size
    if former is not None and were[world.rank] != _Facts.of(former.last):
        former.go_back(world, were[world.rank])
    directory = _shared_tables(world, former, survivors[0], size)
    directory = replace(directory, serial=serial)
    now = {were[rank].rank: rank for rank in survivors}
    world.adopt(
        repaired(
            directory,
            [now.get(rank, -1) for rank in range(size)],
            world_size=world.world_size,
            capacity=world.stores.corpus_slots,
            index_capacity=world.stores.index_slots,
        )
    )
    if former is not None:
        former.settled = former.last
        world.tables.remember(former.last)
        former.last = PastWorld(world.rank, world.world_size, world.directory)
    world.tables.settle()
    for kind in KINDS:
        progress = _progress(world, kind)
        _refill(world, kind, progress)
        if former is not None:
            _keep_staged(world, kind, former.staged[kind], progress.most)


def _header(world: World, layer: int = 0) -> Header:
    """Tables are not compared: who is new has none yet, and loads its weights later."""
    return replace(world.header("rejoin", layer=layer), tables=0)


def _introduced(world: World, former: Former | None) -> tuple[list[_Facts], int]:
    """Which incarnation of every rank goes on, by rank, and the last serial that any gave to a
    document; `world.progress.epoch` is then how many steps the world has seen."""
    candidates = (None,) * _CANDIDATES if former is None else former.candidates(world)
    own = [
        0 if former is None else former.epoch,
        world.stores.corpus_slots,
        world.stores.index_slots,
    ]
    ours = torch.tensor(own + [fact for one in candidates for fact in _Facts.of(one)])
    limits = torch.tensor([_MOST_STEPS, *[_MOST_SLOTS] * 2, *_MOST_FACTS * _CANDIDATES])
    world.progress.restart(0)  # of the step in which they meet
    visitors = settle(world, _header(world), [broadcast("facts", ours, world)])
    received: list[list[int]] = []
    for rank, message in enumerate(visitors):
        facts = ours if message is None else message.columns.get("facts", ours[:0])
        well_formed = facts.dtype == torch.int64 and facts.shape == ours.shape
        if not well_formed or not bool(((facts >= -1) & (facts <= limits)).all()):
            raise world.transport.accuse(rank, "sent invalid facts about its former incarnation")
        received.append(facts.tolist())
    world.progress.restart(max(max(facts[0] for facts in received), 0))
    candidates_of = [_Facts.several(facts[_OWN:]) for facts in received]
    serial = max(one.serial for candidates in candidates_of for one in candidates)
    return _one_world(world, [tuple(f[1:_OWN]) for f in received], candidates_of), serial


def _one_world(
    world: World, pools: Sequence[tuple[int, ...]], candidates: Sequence[Sequence[_Facts]]
) -> list[_Facts]:
    """The incarnation of each rank that goes on: its last one whose tables all survivors had.

    Who saw the last step through may have changed documents since, and who did not has those of that
    step. Who loses a rank while rejoining may have taken new tables before or after the others did.
    So a survivor is one of the world of its last incarnation, or of one before. Every rank
    comes to the same judgement by itself.
    """
    survivors = [rank for rank, its in enumerate(candidates) if its[0].rank >= 0]
    worlds = [{one.tables for one in candidates[rank] if one.rank >= 0} for rank in survivors]
    shared = [one.tables for one in candidates[survivors[0]]] if survivors else []
    shared = [tables for tables in shared if all(tables in its for its in worlds)]
    wrong = _odd_ones(range(len(pools)), pools)
    reason = "has a pool of another size: name corpus_slots in the configuration"
    if not wrong and survivors and not shared:
        wrong = _odd_ones(survivors, [candidates[rank][0].tables for rank in survivors])
        reason = "has other documents than the other survivors: restore a snapshot in a new world"
    were = [
        next((one for one in its if one.tables in shared[:1]), _Facts.of(None))
        for its in candidates
    ]
    ranks = [was.rank for was in were if was.rank >= 0]
    if not wrong and survivors:
        size = shared[0][0]
        if len(set(ranks)) != len(ranks) or max(ranks) >= size:
            wrong, reason = tuple(survivors), f"say that they were ranks {ranks} of {size}"
    if wrong:
        world.transport.give_up(wrong, reason)
        raise PeerError(wrong, reason)
    return were


def _odd_ones(ranks: Sequence[int], facts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ranks whose facts are not the commonest."""
    common = max(facts, key=facts.count)
    return tuple(rank for rank, its in zip(ranks, facts, strict=True) if its != common)


def _shared_tables(world: World, former: Former | None, giver: int, former_size: int) -> Directory:
    """The directory of the former world, given by its first survivor to those who are new."""
    columns: Mapping[str, Tensor] = {}
    if world.rank == giver:
        columns = directory_columns(world.directory)
    rows = [broadcast(name, table, world) for name, table in columns.items()]
    message = settle(world, _header(world), rows)[giver]
    if former is not None:
        return world.directory
    assert message is not None
    try:
        return directory_of(
            message.columns,
            world.directory,
            world_size=former_size,
            capacity=world.stores.corpus_slots,
        )
    except ValueError as error:
        raise world.transport.accuse(giver, f"gave malformed tables: {error}") from error


def _progress(world: World, kind: Kind) -> _Progress:
    """What all ranks say of the blocks that they hold."""
    store = world.stores.of(kind)
    keys = [_held(world, kind, rank) for rank in range(world.world_size)]
    slots = store.slot_of[keys[world.rank]].long()
    ours = store.fill[:, slots]
    received = settle(world, _header(world), [broadcast("fill", ours, world)])
    fill = []
    for rank, message in enumerate(received):
        fill.append(ours if message is None else _fills(world, kind, rank, message, keys[rank]))
    branches = world.config.num_branches if kind == "entries" else 1
    shape = (len(store.codecs), world.config.max_blocks * branches)
    most, source = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int64)
    for rank, (held, theirs) in enumerate(zip(keys, fill, strict=True)):
        more = theirs > most[:, held]
        source[:, held] = torch.where(more, rank, source[:, held])
        most[:, held] = most[:, held].maximum(theirs)
    return _Progress(keys, fill, most, source)


def _held(world: World, kind: Kind, rank: int) -> Tensor:
    """The keys of a kind that a rank has a copy of, ascending."""
    directory = world.directory
    if kind == "entries":
        return (directory.owners == rank).any(1).nonzero()[:, 0]
    if not world.stores.has_index:
        return torch.empty(0, dtype=torch.int64)
    if world.config.index_placement == "replicated":
        return (directory.references > 0).nonzero()[:, 0]
    return (directory.owners[:: directory.num_branches] == rank).any(1).nonzero()[:, 0]


def _fills(world: World, kind: Kind, rank: int, message: Message, keys: Tensor) -> Tensor:
    """How far a peer says that its blocks `keys` (n,) are written, (L, n)."""
    layers = len(world.config.model.layers)
    blocks = keys // (world.config.num_branches if kind == "entries" else 1)
    fill = message.columns.get("fill", torch.empty(layers, 0, dtype=torch.int32))
    well_formed = fill.dtype == torch.int32 and fill.shape == (layers, len(keys))
    if not well_formed or bool(((fill < 0) | (fill > world.directory.tokens[blocks])).any()):
        raise world.transport.accuse(rank, "sent invalid fills of the blocks that it holds")
    return fill


def _refill(world: World, kind: Kind, progress: _Progress) -> None:
    """Send what others lack and this rank is the source of, and take what it lacks itself."""
    store = world.stores.of(kind)
    for layer, codec in enumerate(store.codecs):
        if codec is None:
            continue
        batch = max(BATCH_BYTES // codec.entry_bytes, 1)
        missing = [_missing(progress, layer, to) for to in range(world.world_size)]
        sent = torch.zeros(world.world_size, dtype=torch.int64)
        for keys, first, end in missing:
            sent.index_add_(0, progress.source[layer, keys], end - first)
        parts = [_rows_for(world, progress, layer, part) for part in missing]
        holder = torch.cat([torch.full((len(ids),), to) for to, ids in enumerate(parts)])
        ids = torch.cat(parts)
        for start in range(0, int(sent.max()), batch):
            some = slice(start, start + batch)
            _stage(world, kind, layer, codec, holder[some], ids[some])
            settle(world, _header(world, layer))
        _check_full(world, kind, layer, progress)


def _missing(progress: _Progress, layer: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys (n,) that a rank has less of than another, from where (n,) and up to where (n,)."""
    keys, fill = progress.keys[rank], progress.fill[rank][layer]
    most = progress.most[layer, keys]
    less = fill < most
    return keys[less], fill[less].long(), most[less].long()


def _rows_for(
    world: World, progress: _Progress, layer: int, missing: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """The stored ids (n,) of what is `missing` somewhere that this rank sends there."""
    keys, first, end = missing
    ours = progress.source[layer, keys] == world.rank
    keys, first, count = keys[ours], first[ours], (end - first)[ours]
    start = (keys * world.config.block_tokens + first).repeat_interleave(count)
    at = torch.arange(len(start)) - (count.cumsum(0) - count).repeat_interleave(count)
    return (start + at).to(torch.int32)


def _stage(world: World, kind: Kind, layer: int, codec: Codec, holder: Tensor, ids: Tensor) -> None:
    store = world.stores.of(kind)
    if len(ids):
        rows = store.rows(layer, store.resolve(layer, ids)[0])
        world.writes.stage_for(kind, layer, Push(holder.to(torch.int32), ids, rows))


def _check_full(world: World, kind: Kind, layer: int, progress: _Progress) -> None:
    """Accuse whoever did not send what this rank lacked."""
    store = world.stores.of(kind)
    keys = progress.keys[world.rank]
    short = store.fill[layer, store.slot_of[keys].long()] < progress.most[layer, keys]
    if bool(short.any()):
        culprit = int(progress.source[layer, keys[short][0]])
        raise world.transport.accuse(culprit, f"did not send its blocks of layer {layer}")


def _keep_staged(world: World, kind: Kind, staged: Sequence[Sequence[Push]], most: Tensor) -> None:
    """What was written for other ranks and is with none of those that hold it now waits for these, and
    is written if this rank is one of them."""
    store = world.stores.of(kind)
    for layer, pushes in enumerate(staged):
        if not pushes:
            continue
        ids = torch.cat([push.ids for push in pushes])
        rows = torch.cat([push.rows for push in pushes])
        order = ids.argsort(stable=True)
        ids, rows = ids[order], rows[order]
        block_tokens = world.config.block_tokens
        left = ids % block_tokens >= most[layer, ids.long() // block_tokens]
        left[1:] &= ids[1:] != ids[:-1]
        ids, rows = ids[left], rows[left]
        here = store.holds(ids)
        store.write(layer, ids[here], rows[here])
        world.writes.stage(kind, layer, ids, rows)
