"""Exchanges of several ranks for tests: ends over one process's memory, random routes, what is due."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.exchange.layout import Wire
from qroam.kernels.exchange.roles import STAMPS
from qroam.kernels.exchange.types import Accepted, Ends, Merge, Partials, Routes


def connected(
    wire: Wire,
    devices: list[torch.device] | None = None,
    *,
    channel_tag: int = 1,
    budget_s: float = 10.0,
    ring: int = 0,
) -> list[Ends]:
    """An end for each rank, all in this process."""
    devices = devices or [torch.device("cpu")] * wire.world_size
    arenas = [torch.zeros(wire.words, dtype=torch.int32, device=device) for device in devices]
    addresses = torch.tensor([arena.data_ptr() for arena in arenas])
    return [
        Ends(
            wire=wire,
            rank=rank,
            channel_tag=channel_tag,
            arena=arena,
            peers=addresses.to(arena.device),
            epoch=torch.zeros(1, dtype=torch.int64, device=arena.device),
            counters=torch.zeros(
                2 * wire.world_size * wire.chunks + 1, dtype=torch.int32, device=arena.device
            ),
            tables=torch.ones(1, dtype=torch.int32, device=arena.device),
            status=torch.zeros(1, dtype=torch.int64, pin_memory=arena.is_cuda),
            ring=torch.zeros(ring, len(STAMPS), dtype=torch.int64, device=arena.device)
            if ring
            else None,
            budget_ns=int(budget_s * 1e9),
            put=None,
        )
        for rank, arena in enumerate(arenas)
    ]


def replay_unevenly(graph: torch.cuda.CUDAGraph, rank: int, count: int) -> None:
    """Back-to-back replays without a host synchronisation; rank 1 is late by a whole step at first, and
    both stop for a while now and then."""
    pauses = torch.randint(1_000, 100_000, (count,), generator=torch.Generator().manual_seed(rank))
    if rank == 1:
        torch.cuda._sleep(20_000_000)
    for turn, cycles in enumerate(pauses.tolist()):
        if turn % 61 == 7 * rank:
            torch.cuda._sleep(cycles)
        graph.replay()
    torch.cuda.synchronize()


class Asked(NamedTuple):
    """One rank's exchange: who is asked what, its queries, and own partials."""

    routes: Routes
    query: Tensor
    outs: Tensor
    lses: Tensor
    routed: Tensor  # (N, W) bool


def asked(
    wire: Wire, rank: int, items: int, *, columns: int, seed: int, dtype: torch.dtype
) -> Asked:
    """Random routes, about half of all pairs; capacity beyond the counts is poisoned."""
    g = torch.Generator().manual_seed(1000 * seed + rank)
    world, heads = wire.world_size, wire.heads
    routed = torch.rand(items, world, generator=g) < 0.6
    routed[:, rank] = False
    if seed % 3 == 2:
        routed[:, (rank + 1) % world] = False  # a rank that is asked nothing
    lengths = torch.randint(0, wire.units + 1, (items, world), generator=g)
    poison = torch.iinfo(torch.int32).max
    seats, units_of = (torch.full((world * items,), poison, dtype=torch.int32) for _ in range(2))
    route_units = torch.full((items * world * wire.units,), poison, dtype=torch.int32)
    at = start = 0
    for holder in range(world):
        for item in range(items):
            if routed[item, holder]:
                count = int(lengths[item, holder])
                seats[at], units_of[at] = item, count
                listed = torch.randint(0, 1 << 30, (count,), generator=g, dtype=torch.int32)
                route_units[start : start + count] = listed
                at, start = at + 1, start + count
    query_columns = 4 * wire.query_words // heads // dtype.itemsize
    query = torch.randn(items, heads, query_columns, generator=g).to(dtype)
    outs = torch.randn(1, items, heads, columns, generator=g).to(dtype)
    lses = 3 * torch.randn(1, items, heads, generator=g)
    lses[0, ::3], outs[0, ::3] = -torch.inf, torch.nan
    expected = torch.stack([lengths, lengths * 7], -1).to(torch.int32)
    routes = Routes(seats, units_of, route_units, routed.sum(0).to(torch.int32), expected)
    return Asked(routes, query, outs, lses, routed)


def partials_of(query: Tensor, lengths: Tensor, columns: int) -> Partials:
    """What stands for attention of rows (M, H, D): of each row something else, empty where it must be."""
    out = (query[..., :columns].float() * 2 + 1).to(query.dtype)
    lse = query[..., -1].float()
    empty = lengths == 0
    out[empty], lse[empty] = 0.0, -torch.inf
    return Partials(out, lse, torch.stack([lengths, lengths * 7], -1).to(torch.int32))


def due(asked: Asked, columns: int) -> tuple[Tensor, Tensor]:
    """The merged out and lse, in fp32."""
    items, world = asked.routed.shape
    outs, lses, of = [asked.outs[0].float()], [asked.lses[0]], [torch.arange(items)]
    for holder in range(world):
        chosen = asked.routed[:, holder].nonzero()[:, 0]
        lengths = asked.routes.expected[chosen, holder, 0]
        answer = partials_of(asked.query[chosen], lengths, columns)
        outs.append(answer.out.float())
        lses.append(answer.lse)
        of.append(chosen)
    return reference.merge(torch.cat(outs), torch.cat(lses), torch.cat(of), items)


def target(asked: Asked) -> Merge:
    """Where the result goes, poisoned."""
    items, heads = asked.query.shape[:2]
    device = asked.query.device
    return Merge(
        asked.outs,
        asked.lses,
        torch.full_like(asked.outs[0], torch.nan),
        torch.full((items, heads), torch.nan, device=device),
        torch.full((items,), -7, dtype=torch.int32, device=device),
    )


def room(wire: Wire, device: torch.device | str = "cpu") -> Accepted:
    """For `accept`, poisoned."""
    accepted = Accepted.make(wire, device)
    for tensor in accepted:
        tensor.fill_(torch.iinfo(torch.int32).max)
    return accepted
