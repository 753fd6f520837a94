"""Entries pulled from the other GPU's pool (`kernels/fetch.py`) against a gather over NCCL.

B queries a rank, each of which lists so many entries of the other GPU, fp8 rows of 656 bytes or bf16
rows of 1152; the plan given. Ours pulls each from where it lies, without its holder; "lists" are those
by which attention reads what came, with coverage checked, which NCCL's variant does without. Its
holder is sent the list, packs the rows with our gather kernel, and sends them.

    python benchmarks/fetch.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from corpus import ENTRIES, QUERY, Corpus, chosen, map_of, step_of, wire_of
from gpu import Variant
from gpus import Rank, launch
from torch import Tensor

from qroam.kernels.codec import encode_latent
from qroam.kernels.gather import gather
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

BATCHES, LISTED = (1, 8, 64), 1024
ROWS = {"bf16": 2 * QUERY, "fp8_v32": 656}


class Call:
    """What one rank fetches, and what it is asked for over NCCL."""

    def __init__(
        self, here: Rank, corpus: Corpus, transport: SymmetricMemory, channel: int, batch: int
    ) -> None:
        self.rank, self.corpus = here.rank, corpus
        self.step = step_of(here, corpus, transport, channel, batch, LISTED)
        self.step.units.copy_(chosen(batch, LISTED, 1 - here.rank, here.device))
        self.step.make_plan(0, "always-fetch")
        torch.cuda.synchronize()
        self.count = int(self.step.plan.counts[1 - here.rank])  # NCCL has to know it
        counts = [0, 0]
        dist.all_gather_object(counts, self.count)
        pool = corpus.pool
        rows = pool.entries(0)
        self.listed = self.step.plan.fetch_units[: self.count]
        self.asked = torch.empty(counts[1 - here.rank], dtype=torch.int32, device=here.device)
        self.packed = rows.new_empty(len(self.asked), rows.shape[1])
        self.home = rows.new_empty(self.count, rows.shape[1])
        first = pool.map.first_staged(0)
        self.staged = rows[first : first + self.count]

    def qroam(self) -> Tensor:
        self.step.fetch(0)
        return self.staged

    def with_lists(self) -> Tensor:
        self.step.fetch(0)
        self.step.compose(0)
        return self.staged

    def nccl(self, group: dist.ProcessGroup) -> Tensor:
        peer = 1 - self.rank

        def swap(out: Tensor, back: Tensor) -> None:
            operations = [
                dist.P2POp(dist.isend, out, peer, group),
                dist.P2POp(dist.irecv, back, peer, group),
            ]
            for work in dist.batch_isend_irecv(operations):
                work.wait()

        swap(self.listed, self.asked)
        # Blocks lie in order here, so a listed id is its index in the holder's half.
        index = self.asked - self.rank * (ENTRIES // 2)
        gather(self.corpus.pool.entries(0), index, out=self.packed)
        swap(self.packed, self.home)
        return self.home


def checked(calls: Sequence[Call], codec: str) -> Callable[[Sequence[Tensor]], None]:
    """The last call's rows bit for bit: calls share the staged rows. Coverage is what was planned."""

    def check(results: Sequence[Tensor]) -> None:
        call = calls[-1]
        wanted = call.corpus.entries[call.listed.long()]
        if codec == "fp8_v32":
            wanted = encode_latent(wanted, rope_dim=64)
        assert torch.equal(results[-1].view(torch.uint8), wanted.view(torch.uint8))
        call.step.compose(0)
        assert not bool(call.step.lacking.any()), "coverage was found to differ"

    return check


def work(here: Rank) -> None:
    group = dist.group.WORLD
    assert group is not None
    group_nccl = dist.new_group(backend="nccl", device_id=here.device)
    assert group_nccl is not None
    shapes = {
        codec: map_of(entry_bytes=row_bytes, staged=BATCHES[-1] * LISTED)
        for codec, row_bytes in ROWS.items()
    }
    wires = [wire_of(batch, LISTED) for batch in BATCHES]
    here.say(
        f"2 x {here.properties.name}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}"
    )
    transport = SymmetricMemory(
        wires, group=group, device=here.device, deadline_s=20.0,
        heap=sum(shape.num_bytes for shape in shapes.values()),
    )  # fmt: skip
    start = 0
    for codec, shape in shapes.items():
        region = transport.heap[start : start + shape.num_bytes], transport.heaps + start
        start += shape.num_bytes
        corpus = Corpus(here, *region, shape, codec=codec)
        for channel, batch in enumerate(BATCHES):
            case = f"B={batch}, {LISTED} entries of {ROWS[codec]} B a query"
            if not here.wants(case):
                continue
            torch.manual_seed(here.rank)
            calls = [
                Call(here, corpus, transport, channel, batch)
                for _ in range(here.calls(batch * LISTED * ROWS[codec]))
            ]
            dist.barrier()
            check = checked(calls, codec)
            ways: dict[str, Callable[[Call], object]] = {
                "one-sided pull": Call.qroam,
                "one-sided pull, lists": Call.with_lists,
                "NCCL: ids sent, rows gathered and sent": partial(Call.nccl, group=group_nccl),
            }
            own, listed, nccl = here.timed(
                [
                    Variant(name=name, check=check, calls=[partial(way, call) for call in calls])
                    for name, way in ways.items()
                ]
            )
            ours, with_lists, baseline = ways
            here.report("fetch", case, (ours, own), {baseline: nccl})
            here.report("fetch", case, (with_lists, listed), {baseline: nccl})
            moved = calls[-1].count * ROWS[codec]
            here.say(f"{'':<28} {moved / 1e6:.2f} MB, {moved / own.median / 1e3:.0f} GB/s")
    transport.close()


if __name__ == "__main__":
    sys.exit(launch(2, work, __doc__))
