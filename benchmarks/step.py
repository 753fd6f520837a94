"""A routed decode step of one layer on two GPUs, the plan given: exchange around the attention.

B queries a rank, 128 heads, 512+64, bf16, form A; 2048 entries of 262144 each, half of them on
either rank. Own entries are attended while queries fly. The baseline is the same step with NCCL and
the same attention kernels, its queries sent while own entries are attended; the bound is one GPU
that holds all entries. `exposed` is the step without what that GPU takes.

    python benchmarks/step.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from gpu import Variant, as_good_as_eager
from gpus import Rank, launch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.attend import Tables, Workspace, attend, parts_of
from qroam.kernels.exchange import Accepted, Ends, Merge, Partials, Routes, exchange
from qroam.kernels.merge import merge
from qroam.kernels.wire import Wire
from qroam.runtime.transport_nvshmem import NvshmemTransport

HEADS, QUERY, VALUE, ENTRIES, SELECTED, BLOCK = 128, 576, 512, 262144, 2048, 64
SCALE = QUERY**-0.5
BATCHES = (1, 8, 64)
BF16 = torch.bfloat16


class Corpus:
    """All entries, of which each rank owns half, and the tables of the owner and of the bound."""

    def __init__(self, here: Rank) -> None:
        generator = torch.Generator(here.device).manual_seed(7)  # the same on both ranks
        self.entries = torch.randn(
            ENTRIES, QUERY, dtype=BF16, device=here.device, generator=generator
        )
        half, blocks = ENTRIES // 2, ENTRIES // BLOCK
        self.own = self.entries[here.rank * half : (here.rank + 1) * half]
        slots = torch.full((blocks,), -1, dtype=torch.int32, device=here.device)
        mine = slice(here.rank * blocks // 2, (here.rank + 1) * blocks // 2)
        slots[mine] = torch.arange(blocks // 2, dtype=torch.int32, device=here.device)
        zeros = torch.zeros(blocks, dtype=torch.int32, device=here.device)
        full = torch.full_like(zeros, BLOCK)
        self.tables = Tables(slots, zeros[: blocks // 2], full[: blocks // 2], BLOCK)
        every = torch.arange(blocks, dtype=torch.int32, device=here.device)
        self.all_tables = Tables(every, zeros, full, BLOCK)


class Call:
    """Buffers of one step on this rank."""

    def __init__(self, here: Rank, corpus: Corpus, batch: int) -> None:
        device, rank, half = here.device, here.rank, ENTRIES // 2
        self.corpus, self.rank = corpus, rank

        def chosen(owner: int) -> Tensor:
            lists = [torch.randperm(half, device=device)[: SELECTED // 2] for _ in range(batch)]
            return (torch.stack(lists) + owner * half).to(torch.int32)

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.own_units, self.remote_units = chosen(rank), chosen(1 - rank)
        self.all_units = torch.cat((self.own_units, self.remote_units), 1)
        pairs, items = ints(2), ints(2 * batch)
        pairs[1 - rank] = batch
        items[:batch] = torch.arange(batch, device=device)
        expected = ints(batch, 2, 2)
        every = torch.ones_like(self.remote_units, dtype=torch.bool)
        covered = reference.coverage(self.remote_units, torch.zeros_like(self.remote_units), every)
        expected[:, 1 - rank] = covered.to(torch.int32)
        units_of = ints(2 * batch, value=SELECTED // 2)
        self.routes = Routes(items, units_of, self.remote_units.flatten(), pairs, expected)
        self.query = torch.randn(batch, HEADS, QUERY, dtype=BF16, device=device)
        self.out = torch.empty(batch, HEADS, VALUE, dtype=BF16, device=device)
        self.lse = torch.empty(batch, HEADS, device=device)
        self.fault = ints(batch)
        # Of own entries [0], and of what the other rank asked here or answered [1].
        self.outs = torch.empty(2, batch, HEADS, VALUE, dtype=BF16, device=device)
        self.lses = torch.empty(2, batch, HEADS, device=device)
        self.covered = ints(2, batch, 2)
        self.arrived = torch.empty_like(self.query)
        self.arrived_units = torch.empty_like(self.remote_units)
        self.home, self.home_lse = torch.empty_like(self.outs), torch.empty_like(self.lses)
        self.workspace = Workspace.make(
            rows=batch, heads=HEADS, value_dim=VALUE, parts=parts_of(HEADS, device), device=device
        )

    def _attend(
        self, query: Tensor, units: Tensor, at: int, accepted: Accepted | None = None
    ) -> None:
        attend(
            query, self.corpus.own, units, value_dim=VALUE, scale=SCALE, workspace=self.workspace,
            tables=self.corpus.tables, out=self.outs[at], lse=self.lses[at],
            covered=self.covered[at],
            lengths=None if accepted is None else accepted.lengths,
            num_rows=None if accepted is None else accepted.num_rows,
            query_of=None if accepted is None else accepted.query_of,
        )  # fmt: skip

    def qroam(self, ends: Ends, accepted: Accepted) -> tuple[Tensor, Tensor, Tensor]:
        exchange(ends, self.routes, send=self.query)
        self._attend(self.query, self.own_units, 0)
        exchange(ends, self.routes, accept=accepted)
        inbox = ends.inbox.view(BF16).view(-1, HEADS, QUERY)
        self._attend(inbox, accepted.units, 1, accepted)
        exchange(
            ends,
            self.routes,
            answer=Partials(self.outs[1], self.lses[1], self.covered[1]),
            receive=Merge(self.outs[:1], self.lses[:1], self.out, self.lse, self.fault),
        )
        return self.out, self.lse, self.fault

    def nccl(self, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        peer = 1 - self.rank

        def swap(*pairs: tuple[Tensor, Tensor]) -> list[dist.Work]:
            works: list[dist.Work] = dist.batch_isend_irecv(
                [
                    dist.P2POp(way, tensor, peer, group)
                    for pair in pairs
                    for way, tensor in zip((dist.isend, dist.irecv), pair, strict=True)
                ]
            )
            return works

        asked = swap((self.query, self.arrived), (self.remote_units, self.arrived_units))
        self._attend(self.query, self.own_units, 0)
        for work in asked:
            work.wait()
        self._attend(self.arrived, self.arrived_units, 1)
        for work in swap((self.outs[1], self.home[1]), (self.lses[1], self.home_lse[1])):
            work.wait()
        self.home[0].copy_(self.outs[0])
        self.home_lse[0].copy_(self.lses[0])
        merge(self.home, self.home_lse, out=self.out, lse=self.lse)
        return self.out, self.lse

    def bound(self) -> tuple[Tensor, Tensor]:
        attend(
            self.query, self.corpus.entries, self.all_units, value_dim=VALUE, scale=SCALE,
            workspace=self.workspace, tables=self.corpus.all_tables, out=self.out, lse=self.lse,
            covered=self.covered[0],
        )  # fmt: skip
        return self.out, self.lse


def checked(calls: Sequence[Call]) -> Callable[[Sequence[tuple[Tensor, ...]]], None]:
    """First and last query of the first and last call, against fp64 over all that was selected."""

    def check(results: Sequence[tuple[Tensor, ...]]) -> None:
        for at in (0, len(calls) - 1):
            call, (out, lse, *fault) = calls[at], results[at]
            assert not fault or not bool(fault[0].any()), "coverage was found to differ"
            for item in (0, len(out) - 1):
                query = call.query[item : item + 1]
                entries = call.corpus.entries[call.all_units[item].long()][None]
                valid = torch.ones(1, SELECTED, dtype=torch.bool, device=out.device)
                run = partial(reference.attend, valid=valid, value_dim=VALUE, scale=SCALE)
                exact, exact_lse = run(query.double(), entries.double())
                scores = (query[0].float() @ entries[0].float().mT * SCALE).softmax(-1)
                eager = scores.to(BF16) @ entries[0, :, :VALUE]
                as_good_as_eager(out[item], eager, exact[0])
                torch.testing.assert_close(lse[item].double(), exact_lse[0], rtol=1e-4, atol=1e-4)

    return check


def work(here: Rank) -> None:
    group = dist.group.WORLD
    assert group is not None
    group_nccl = dist.new_group(backend="nccl", device_id=here.device)
    assert group_nccl is not None
    wires = [
        Wire(
            world_size=2, rows=batch, heads=HEADS, query_words=HEADS * QUERY // 2,
            answer_words=HEADS * VALUE // 2, units=SELECTED,
        )
        for batch in BATCHES
    ]  # fmt: skip
    transport = NvshmemTransport(wires, group=group, device=here.device, deadline_s=20.0)
    corpus = Corpus(here)
    here.say(
        f"2 x {here.properties.name}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}"
    )
    for channel, batch in enumerate(BATCHES):
        case = f"B={batch}, selections spread evenly"
        if not here.wants(case):
            continue
        torch.manual_seed(here.rank)
        calls = [Call(here, corpus, batch) for _ in range(here.calls(batch * SELECTED * QUERY * 2))]
        ends, accepted = transport.ends(channel), Accepted.make(wires[channel], here.device)
        check = checked(calls)
        ways: dict[str, Callable[[Call], object]] = {
            "routed, plan given": lambda call, e=ends, a=accepted: call.qroam(e, a),  # type: ignore[misc]
            "NCCL send and receive, same attention": lambda call: call.nccl(group_nccl),
            "one GPU that holds all entries": Call.bound,
        }
        own, nccl, bound = here.timed(
            [
                Variant(name=name, check=check, calls=[partial(way, call) for call in calls])
                for name, way in ways.items()
            ]
        )
        transport.check()
        names = list(ways)
        here.report("step", case, (names[0], own), {names[1]: nccl, names[2]: bound})
        exposed, theirs = own.median - bound.median, nccl.median - bound.median
        here.say(f"{'':<28} exposed: {exposed:.1f} us, with NCCL {theirs:.1f} us")
        here.record("step", f"{case}, exposed", exposed, f"{names[1]}, exposed", theirs)
    transport.close()


if __name__ == "__main__":
    sys.exit(launch(2, work, __doc__))
