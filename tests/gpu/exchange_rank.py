"""A rank on a GPU, for tests: `python exchange_rank.py JOB RANK FOLDER [OPTION=VALUE ...]`.

Two of them meet over a file in FOLDER, run the job and print one line of JSON. Kernels come from
whatever `qroam.kernels` is first on the path, so a test can put a changed copy there.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from wires import asked, due, partials_of, replay_unevenly, room, target

from qroam.kernels.exchange.launch import exchange
from qroam.kernels.exchange.layout import Wire
from qroam.kernels.exchange.types import Accepted, Ends, Merge, Partials, Routes
from qroam.kernels.pool_layout import PoolLayout
from qroam.partition.codec import make_codec
from qroam.partition.directory import empty_directory
from qroam.partition.pool import BlockStore
from qroam.runtime.errors import PeerError
from qroam.runtime.gpu.pool import GpuPool
from qroam.runtime.gpu.rescue import rescue
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

HEADS, QUERY, VALUE = 128, 576, 512
PLANS = 16
BF16 = torch.bfloat16


def wire_of(rows: int, *, chunk: int, put: bool, units: int = 64) -> Wire:
    return Wire(
        world_size=2,
        rows=rows,
        heads=HEADS,
        query_words=HEADS * QUERY // 2,
        answer_words=HEADS * VALUE // 2,
        units=units,
        chunk=chunk,
        staged=put,
    )


def opened(rank: int, wire: Wire, *, deadline_s: float, heap: int = 0) -> SymmetricMemory:
    group = dist.group.WORLD
    assert group is not None
    return SymmetricMemory(
        [wire],
        group=group,
        device=torch.device("cuda", rank),
        deadline_s=deadline_s,
        put=wire.staged,
        ring=64,
        heap=heap,
    )


def random_plans(rank: int, *, put: bool, steps: int) -> dict[str, Any]:
    """Random routes, step after step: everything that arrived is compared bitwise, and the merge."""
    wire = wire_of(5, chunk=2, put=put, units=40)
    transport = opened(rank, wire, deadline_s=10.0)
    ends, device = transport.ends(), transport.device
    wrong = 0
    for step in range(steps):
        given = [asked(wire, r, 5, columns=VALUE, seed=step, dtype=BF16) for r in range(2)]
        mine, theirs = given[rank], given[1 - rank]
        ours = mine._replace(
            routes=Routes(*(t.to(device) for t in mine.routes)),
            query=mine.query.to(device),
            outs=mine.outs.to(device),
            lses=mine.lses.to(device),
        )
        accepted, merge = room(wire, device), target(ours)
        exchange(ends, ours.routes, send=ours.query)
        exchange(ends, ours.routes, accept=accepted)
        count = int(accepted.num_rows)
        inbox = ends.inbox.view(BF16).view(-1, HEADS, QUERY)
        found = inbox[accepted.query_of[:count].long()].cpu()
        chosen = theirs.routed[:, rank].nonzero()[:, 0]
        wrong += not torch.equal(found, theirs.query[chosen])
        lengths = theirs.routes.expected[chosen, rank, 0]
        wrong += not torch.equal(accepted.lengths[:count].cpu(), lengths)
        listed = torch.cat(
            [accepted.units[m, :n].cpu() for m, n in enumerate(lengths)] or [lengths]
        )
        wrong += not torch.equal(listed, theirs.routes.route_units[: int(lengths.sum())])
        answer = partials_of(found, lengths, VALUE)
        out, lse, covered = (
            torch.zeros(5, *t.shape[1:], dtype=t.dtype, device=device) for t in answer[:3]
        )
        full = Partials(out, lse, covered)
        for to, part in zip(full[:3], answer[:3], strict=True):
            to[:count].copy_(part)
        exchange(ends, ours.routes, answer=full, receive=merge)
        torch.cuda.synchronize()
        transport.check()
        out, lse = due(mine, VALUE)
        wrong += not torch.allclose(merge.out.cpu().float(), out, rtol=1e-2, atol=2e-2)
        wrong += not torch.allclose(merge.lse.cpu(), lse, rtol=1e-5, atol=1e-5)
        wrong += bool(merge.fault.any())
    transport.close()
    transport.close()
    return {"wrong": wrong}


class Replay:
    """One step with new queries and another plan each time, all changed and checked on the device.

    What comes back for a routed item is its own query, so the merged output must be its first
    columns, bit for bit, and 0 where nothing was routed.
    """

    def __init__(self, ends: Ends, rank: int, *, rows: int, idle: bool) -> None:
        device, world = ends.arena.device, 2
        generator = torch.Generator().manual_seed(rank)
        plans = []
        for plan in range(PLANS):
            count = int(torch.randint(0, rows + 1, (1,), generator=generator))
            count = 0 if idle or plan % 5 == 4 else count
            chosen = torch.randperm(rows, generator=generator)[:count].sort().values
            items = torch.full((world * rows,), 1 << 30, dtype=torch.int32)
            items[:count] = chosen.int()
            pairs = torch.zeros(world, dtype=torch.int32)
            pairs[1 - rank] = count
            routed = torch.zeros(rows, dtype=torch.bool)
            routed[chosen] = True
            plans.append((items, pairs, routed))
        stacked = zip(*plans, strict=True)
        self._items, self._pairs, self._routed = (torch.stack(t).to(device) for t in stacked)
        units = ends.wire.units

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.ends, self._rank = ends, rank
        self._routes = Routes(
            ints(world * rows),
            ints(world * rows, value=units),
            ints(world * rows * units),
            ints(world),
            ints(rows, world, 2, value=units),
        )
        self._query = torch.zeros(rows, HEADS, QUERY, dtype=BF16, device=device)
        self._accepted = Accepted.make(ends.wire, device)
        self._answer = Partials(
            torch.zeros(rows, HEADS, VALUE, dtype=BF16, device=device),
            torch.zeros(rows, HEADS, device=device),
            ints(rows, 2, value=units),
        )
        self._merge = Merge(
            torch.full((1, rows, HEADS, VALUE), torch.nan, dtype=BF16, device=device),
            torch.full((1, rows, HEADS), -torch.inf, device=device),
            torch.zeros(rows, HEADS, VALUE, dtype=BF16, device=device),
            torch.zeros(rows, HEADS, device=device),
            ints(rows),
        )
        self._numbers = torch.arange(rows * HEADS * QUERY, device=device).view(rows, HEADS, QUERY)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)

    def step(self) -> None:
        plan = self._step % PLANS
        self._routes.items.copy_(self._items[plan][0])
        self._routes.pairs.copy_(self._pairs[plan][0])
        # 0 to 250: bf16 holds them exactly
        self._query.copy_((self._numbers * 7 + self._step * 13 + self._rank) % 251)
        exchange(self.ends, self._routes, send=self._query)
        exchange(self.ends, self._routes, accept=self._accepted)
        inbox = self.ends.inbox.view(BF16).view(-1, HEADS, QUERY)
        rows = self._accepted.query_of.clamp(0, len(inbox) - 1).long()
        self._answer.out.copy_(inbox[rows][..., :VALUE])
        exchange(self.ends, self._routes, answer=self._answer, receive=self._merge)
        wanted = torch.where(self._routed[plan][0][:, None, None], self._query[..., :VALUE], 0)
        self.wrong += (self._merge.out != wanted).any() | self._merge.fault.any()
        self._step += 1

    def routed_are_nan(self) -> bool:
        """Whether nothing that the last step should have asked of the peer has an output."""
        routed = self._routed[int(self._step - 1) % PLANS]
        return bool(self._merge.out[routed].isnan().all())

    def captured(self) -> torch.cuda.CUDAGraph:
        """The step in a graph; what it needs is compiled and loaded by a first run outside."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self.step()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph


def soak(
    rank: int, *, put: bool, replays: int, idle_rank: int, deadline_s: float
) -> dict[str, Any]:
    """`replay_unevenly`; what was wrong, or who was named."""
    transport = opened(rank, wire_of(8, chunk=4, put=put), deadline_s=deadline_s)
    replay = Replay(transport.ends(), rank, rows=8, idle=rank == idle_rank)
    graph = replay.captured()
    dist.barrier()
    replay_unevenly(graph, rank, replays)
    try:
        transport.check()
    except PeerError as error:
        say({"named": str(error)})
        transport.close(abort=True)
        os._exit(0)
    result = {"wrong": int(replay.wrong), "epochs": int(transport.ends().epoch)}
    transport.close()
    return result


def silence(rank: int, *, deadline_s: float) -> dict[str, Any]:
    """Replay until the peer, which the test stops, is named; then this rank must still be well."""
    transport = opened(rank, wire_of(8, chunk=4, put=False), deadline_s=deadline_s)
    replay = Replay(transport.ends(), rank, rows=8, idle=False)
    graph = replay.captured()
    dist.barrier()
    if rank == 1:
        sys.stdout.write("ready\n")
        sys.stdout.flush()
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        try:
            transport.check()
        except PeerError as error:
            named_at = time.time()
            torch.cuda.synchronize()
            side = torch.randn(512, 512, device=transport.device)
            well = bool(torch.isfinite(side @ side).all())
            nan = replay.routed_are_nan()
            say({"named": str(error), "at": named_at, "well": well, "nan": nan})
            transport.close(abort=True)
            transport.close()
            os._exit(0)
    return {"named": None}


def filled(transport: SymmetricMemory, shape: PoolLayout, blocks: int) -> dict[str, str]:
    """Random blocks in this rank's region, and one that is not closed; what the closed ones hash to,
    by key and generation."""
    codec = make_codec("fp8_v32", dim=QUERY, rope_dim=64)
    pool = GpuPool(transport.heap, shape, codec, rank=transport.rank, peers=transport.heaps)
    size, generator = shape.block_tokens, torch.Generator().manual_seed(transport.rank)
    keys, slots = (
        torch.randperm(count, generator=generator)[: blocks + 1]
        for count in (shape.keys, shape.slots)
    )
    rows = torch.randint(
        256, (shape.layers, blocks + 1, size, shape.entry_bytes), generator=generator,
        dtype=torch.uint8,
    )  # fmt: skip
    tokens = torch.full((blocks + 1,), size, dtype=torch.int32)
    tokens[blocks] -= 1
    store = BlockStore(
        [codec] * shape.layers, num_slots=shape.slots, num_keys=shape.keys, block_tokens=size,
        storage=pool.storage(),
    )  # fmt: skip
    store.assign(keys, slots, keys % 5)
    for layer in range(shape.layers):
        store.copy_in(layer, slots, rows[layer], tokens)
    directory = empty_directory(
        max_blocks=shape.keys, block_tokens=size, num_branches=1, copies=1, world_size=2
    )
    pool.refresh(store, directory)
    torch.cuda.synchronize()
    return {
        f"{key}/{key % 5}": hashed(rows[:, at]) for at, key in enumerate(keys[:blocks].tolist())
    }


def hashed(rows: Tensor) -> str:
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


def rescued(rank: int, *, deadline_s: float, blocks: int) -> dict[str, Any]:
    """Replay until the test kills rank 1, which said what its blocks are; the other takes them."""
    shape = PoolLayout(
        layers=3, keys=4 * blocks, slots=2 * blocks, block_tokens=64, entry_bytes=656, staged=0
    )
    wire = wire_of(8, chunk=4, put=False)
    transport = opened(rank, wire, deadline_s=deadline_s, heap=shape.num_bytes)
    said = filled(transport, shape, blocks)
    replay = Replay(transport.ends(), rank, rows=8, idle=False)
    graph = replay.captured()
    dist.barrier()
    if rank == 1:
        say(said)
    until = time.monotonic() + 30
    while time.monotonic() < until:
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        try:
            transport.check()
        except PeerError as error:
            named_at = time.time()
            transport.close(abort=True)
            found, lacking = rescue(transport.heap_of(error.culprits[0]), shape)
            had = {f"{block.key}/{block.generation}": hashed(block.rows) for block in found}
            say({"named": str(error), "at": named_at, "had": had, "lacking": len(lacking)})
            os._exit(0)
    return {"named": None}


def main() -> None:
    job, rank, folder, *options = sys.argv[1:]
    torch.cuda.set_device(int(rank))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    given = {name: json.loads(value) for name, value in (o.split("=", 1) for o in options)}
    say(globals()[job](int(rank), **given))
    dist.destroy_process_group()


def say(result: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
