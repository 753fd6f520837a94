"""Check blocks where they live: every copy's hash against the other copies' and its own past one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...partition.pool import KINDS, Kind
from ...partition.snapshot.record import (
    BATCH_BYTES,
    HASH_BYTES,
    closed,
    hash_records,
    record_bytes,
    rows_within,
    take_records,
)
from ..world import World
from .collective import in_thread, send_staged, share, together
from .snapshot_parts import column_of, owner_of


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCheck:
    """What the holders of one closed block (of a document, the oldest that has it) say its hash is.

    hashes: (rank, hash in hex) of every rank that should hold it, "" where it is missing or not
    closed. changed: ranks whose copy no longer has the hash that it had in a snapshot or a check.
    """

    kind: Kind
    document: str
    block: int
    branch: int
    hashes: tuple[tuple[int, str], ...]
    changed: tuple[int, ...]

    @property
    def is_sound(self) -> bool:
        return len({name for _, name in self.hashes}) == 1 and not self.changed


class _Hashed(NamedTuple):
    """What a holder sent of keys (n,): at (n,) places in the sample, hashes (n, 16), changed (n,) bool."""

    at: Tensor
    hashes: Tensor
    changed: Tensor


def check_blocks(world: World, sample: int | None) -> list[BlockCheck]:
    """Hash a sample of the corpus's blocks (`None`: all) at every holder and compare; a step.

    Returns: a check for each of them that is closed at any holder, the same list on every rank.
    """
    send_staged(world, "verify")
    blocks = _sampled(world, sample)
    checks: list[BlockCheck] = []
    for kind in KINDS:
        keys = _keys(world, kind, blocks)
        work = in_thread(partial(_hashed, world, kind, keys), "qroam-verify")
        own = together(world, "verify", "verify", work)
        columns = {"at": own.at, "hashes": own.hashes, "changed": own.changed.to(torch.uint8)}
        received = [
            own if rank == world.rank else _received(world, rank, theirs, len(keys))
            for rank, theirs in enumerate(share(world, "verify", columns))
        ]
        checks += _compared(world, kind, keys, received)
    return checks


def _sampled(world: World, sample: int | None) -> Tensor:
    """Blocks of the corpus (n,), ascending, the same on every rank, others at every call."""
    used = (owner_of(world.directory, "index") >= 0).nonzero()[:, 0]
    if sample is None or sample >= len(used):
        return used
    generator = torch.Generator().manual_seed(world.progress.epoch)
    return used[torch.randperm(len(used), generator=generator)[:sample]].sort().values


def _keys(world: World, kind: Kind, blocks: Tensor) -> Tensor:
    if kind == "entries":
        branches = world.config.num_branches
        return (blocks[:, None] * branches + torch.arange(branches)).reshape(-1)
    return blocks if world.stores.has_index else blocks[:0]


def _hashed(world: World, kind: Kind, keys: Tensor) -> _Hashed:
    """The hashes of those blocks of keys that are closed here."""
    store = world.stores.of(kind)
    blocks = keys // (world.config.num_branches if kind == "entries" else 1)
    tokens = world.directory.tokens[blocks]
    at = closed(store, keys, tokens).nonzero()[:, 0]
    slots = store.slot_of[keys[at]].long()
    batch = rows_within(BATCH_BYTES, record_bytes(store))
    parts = [torch.empty(0, HASH_BYTES, dtype=torch.uint8)]
    for tile in torch.arange(len(at)).split(batch):
        counts = tokens[at[tile]]
        parts.append(hash_records(take_records(store, slots[tile], counts), counts))
    hashes = torch.cat(parts)
    past, known = world.stores.hashes[kind].find(keys[at], store.generation[slots])
    changed = known & (past != hashes).any(1)
    world.stores.hashes[kind].keep(
        keys[at][~known], store.generation[slots][~known], hashes[~known]
    )
    return _Hashed(at.to(torch.int32), hashes, changed)


def _received(world: World, rank: int, columns: Mapping[str, Tensor], most: int) -> _Hashed:
    try:
        at = column_of(columns, "at", torch.int32, ())
        hashes = column_of(columns, "hashes", torch.uint8, (HASH_BYTES,))
        changed = column_of(columns, "changed", torch.uint8, ())
        outside = bool(((at < 0) | (at >= most)).any()) or len(at.unique()) != len(at)
        if outside or not len(at) == len(hashes) == len(changed):
            raise ValueError("places outside the sample, repeated, or not as many as hashes")
    except ValueError as error:
        raise world.transport.accuse(rank, f"sent malformed hashes: {error}") from error
    return _Hashed(at, hashes, changed != 0)


def _compared(world: World, kind: Kind, keys: Tensor, received: list[_Hashed]) -> list[BlockCheck]:
    names: dict[int, dict[int, str]] = {}
    changed: dict[int, list[int]] = {}
    for rank, theirs in enumerate(received):
        for at, name, differs in zip(
            theirs.at.tolist(), theirs.hashes.numpy(), theirs.changed.tolist(), strict=True
        ):
            names.setdefault(at, {})[rank] = name.tobytes().hex()
            if differs:
                changed.setdefault(at, []).append(rank)
    branches = world.config.num_branches if kind == "entries" else 1
    place: dict[int, tuple[str, int]] = {}
    for document in world.directory.documents.values():
        for number, block in enumerate(document.blocks):
            place.setdefault(block, (document.name, number))
    checks = []
    for at in sorted(names):
        block, branch = divmod(int(keys[at]), branches)
        holders = sorted({*_holders(world, kind, block, branch), *names[at]})
        checks.append(
            BlockCheck(
                kind=kind,
                document=place[block][0],
                block=place[block][1],
                branch=branch,
                hashes=tuple((rank, names[at].get(rank, "")) for rank in holders),
                changed=tuple(changed.get(at, ())),
            )
        )
    return checks


def _holders(world: World, kind: Kind, block: int, branch: int) -> list[int]:
    """The ranks that should hold a copy."""
    if kind == "index" and world.config.index_placement == "replicated":
        return list(range(world.world_size))
    copies = world.directory.owners[block * world.config.num_branches + branch]
    return copies[copies >= 0].tolist()
