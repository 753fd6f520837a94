"""Round trip between two GPUs inside a kernel: payload, signal, and the same back.

Stores to the peer and a released signal, as the exchange does it, against NVSHMEM's
putmem_signal_nbi from the same kernel. 1000 round trips a launch; on both sides the waiting is
`signals.wait_for`.

    python benchmarks/latency.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from gpu import timing_of
from gpus import Rank, launch

from qroam.kernels.exchange.layout import Wire
from qroam.kernels.exchange.nvshmem_put import put_and_signal
from qroam.kernels.exchange.signals import publish, stamp_of, wait_for
from qroam.kernels.exchange.types import Ends
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

CASES = ((64, 1), (1024, 1), (16384, 1), (147456, 1), (147456, 8))  # bytes, CTAs that store them
_ROUNDS = 1000
_SOURCE = 1 << 20  # words into the arena: where the payload is taken from


@triton.jit(do_not_specialize=["rank", "epoch", "budget_ns"])
def _ping_pong(
    own_ptr, peers_ptr, counter_ptr, status_ptr, rank, epoch, budget_ns, rounds,
    SOURCE: tl.constexpr, SIGNAL: tl.constexpr, ABORT: tl.constexpr, WORDS: tl.constexpr,
    CTAS: tl.constexpr, TILE: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    peer = 1 - rank
    signal = (own_ptr + SIGNAL).to(tl.pointer_type(tl.int64))
    for turn in range(rounds):
        stamp = stamp_of(epoch + turn, 1)
        if rank == 1:
            wait_for(signal, stamp, peer, peers_ptr, status_ptr, budget_ns, rank, ABORT, 2)
        if PUT:
            words = tl.full((), WORDS, tl.int32)
            put_and_signal(own_ptr, own_ptr + SOURCE, words, signal, (stamp << 16) | 1, peer)
        else:
            to_ptr = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int32))
            to_ptr = tl.multiple_of(to_ptr, 16)
            for tile in range(tl.program_id(0), (WORDS + TILE - 1) // TILE, CTAS):
                at = tile * TILE + tl.arange(0, TILE)
                tl.store(to_ptr + at, tl.load(own_ptr + SOURCE + at, at < WORDS), at < WORDS)
            to_signal = (to_ptr + SIGNAL).to(tl.pointer_type(tl.int64))
            publish(counter_ptr, CTAS, to_signal, (stamp << 16) | 1)
        if rank == 0:
            wait_for(signal, stamp, peer, peers_ptr, status_ptr, budget_ns, rank, ABORT, 2)


class PingPong:
    """Epochs go on from launch to launch, so no signal is met twice."""

    def __init__(self, here: Rank, transport: SymmetricMemory, ends: Ends) -> None:
        self._here, self._transport, self._ends = here, transport, ends
        self._counter = torch.zeros(1, dtype=torch.int32, device=here.device)
        self._epoch = 1

    def launch(self, rounds: int, num_bytes: int, ctas: int) -> None:
        ends, words = self._ends, num_bytes // 4
        options: dict[str, Any] = {"num_warps": 4 if num_bytes <= 16384 else 16, "num_stages": 1}
        if ends.put is not None:
            options["extern_libs"] = {"libnvshmem_device": ends.put}
        _ping_pong[(ctas,)](
            ends.arena, ends.peers, self._counter, ends.status, ends.rank, self._epoch,
            ends.budget_ns, rounds,
            SOURCE=_SOURCE, SIGNAL=ends.wire.query_signals, ABORT=ends.wire.abort, WORDS=words,
            CTAS=ctas, TILE=min(max(triton.next_power_of_2(words), 128), 8192),
            PUT=ends.put is not None, **options,
        )  # fmt: skip
        self._epoch += rounds

    def arrives(self, num_bytes: int, ctas: int) -> None:
        """Raises: AssertionError unless the payload of the other rank is here, bit for bit."""
        arena, words = self._ends.arena, num_bytes // 4
        numbers = torch.arange(words, dtype=torch.int32, device=arena.device)
        arena[_SOURCE : _SOURCE + words] = numbers + 7 * self._here.rank + self._epoch
        arena[:words] = -1
        wanted = numbers + 7 * (1 - self._here.rank) + self._epoch
        self.launch(0, num_bytes, ctas)  # compiling takes one rank longer than the other
        torch.cuda.synchronize()
        dist.barrier()
        self.launch(3, num_bytes, ctas)
        torch.cuda.synchronize()
        self._transport.check()
        assert torch.equal(arena[:words], wanted), "the payload did not arrive"
        dist.barrier()

    def microseconds(self, num_bytes: int, ctas: int, *, launches: int) -> list[float]:
        found = []
        for _ in range(launches):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            dist.barrier()
            start.record()
            self.launch(_ROUNDS, num_bytes, ctas)
            end.record()
            torch.cuda.synchronize()
            found.append(1e3 * start.elapsed_time(end) / _ROUNDS)
        self._transport.check()
        return found


def work(here: Rank) -> None:
    group = dist.group.WORLD
    assert group is not None
    # Room for a payload at its beginning and another one behind; staged, so that both ways work.
    wire = Wire(
        world_size=2, rows=8, heads=128, query_words=36864, answer_words=32768, units=64, staged=True
    )  # fmt: skip
    transport = SymmetricMemory([wire], group=group, device=here.device, deadline_s=10.0, put=True)
    put = transport.ends()
    addresses = [transport.mapped(rank) for rank in range(2)]
    stores = put._replace(put=None, peers=torch.tensor(addresses, device=here.device))
    ways = {
        name: PingPong(here, transport, ends) for name, ends in (("stores", stores), ("put", put))
    }
    for num_bytes, ctas in CASES:
        case = f"{num_bytes} B, {ctas} CTA" + "s" * (ctas > 1)
        if not here.wants(case):
            continue
        timings = {}
        for name, way in ways.items():
            threads = ctas if name == "stores" else 1  # a put is one CTA's
            way.arrives(num_bytes, threads)
            timings[name] = timing_of(way.microseconds(num_bytes, threads, launches=9))
        baseline = {"NVSHMEM putmem_signal_nbi_block, 1 CTA": timings["put"]}
        here.report("latency", case, ("stores and a released signal", timings["stores"]), baseline)
    transport.close()


if __name__ == "__main__":
    sys.exit(launch(2, work, __doc__))
