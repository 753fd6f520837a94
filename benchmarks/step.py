"""A decode step of one layer on two GPUs: plan, exchange, attention, merge, in one CUDA graph.

B queries a rank, 128 heads, 512+64, bf16, form A; 2048 entries of 262144 each, half of them on
either rank. The baseline is the same step with NCCL, the same plan and the same attention kernels,
its queries sent while own entries are attended; the bound is one GPU that holds all entries and has
nothing to plan. `exposed` is the step without what that GPU takes. "Plan given" leaves the plan out
of both.

Form B is compared with form A: un-absorbed queries in, projected outputs out, plan given. What form A
has no part in, W_UK before its step and W_UV behind it, is of its time too.

    python benchmarks/step.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from corpus import BF16, HEADS, LAYOUT, QUERY, VALUE, Corpus, chosen, map_of, step_of, wire_of
from gpu import Variant, as_good_as_eager
from gpus import Rank, launch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.attend import AttendWorkspace, attend, parts_of
from qroam.kernels.decide import PlanMode
from qroam.kernels.library.merge import merge
from qroam.partition.layout import Form
from qroam.runtime.gpu.payload import absorb, project
from qroam.runtime.gpu.step import GpuStep
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

SELECTED = 2048
SCALE = LAYOUT.softmax_scale
BATCHES = (1, 8, 64)
FORMS: tuple[Form, Form] = ("A", "B")


class Call:
    """Buffers of one step on this rank."""

    def __init__(self, here: Rank, corpus: Corpus, step: GpuStep) -> None:
        self.corpus, self.rank, self.step = corpus, here.rank, step
        batch, device, half = len(step.query), here.device, SELECTED // 2
        own = chosen(batch, half, here.rank, device)
        remote = chosen(batch, half, 1 - here.rank, device)
        # As a selector leaves them: mixed.
        mixed = torch.rand(batch, SELECTED, device=device).argsort(1)
        self.units = torch.cat((own, remote), 1).gather(1, mixed)
        step.units.copy_(self.units)
        step.query.normal_()
        self.query, self.out, self.lse = step.query, step.out, step.lse
        # Of own entries [0], and what the other rank answered [1]; and what is answered to it.
        self.home = torch.empty(2, batch, HEADS, VALUE, dtype=BF16, device=device)
        self.home_lse = torch.empty(2, batch, HEADS, device=device)
        self.out_there, self.lse_there = (
            torch.empty_like(self.home[0]),
            torch.empty_like(self.home_lse[0]),
        )
        self.covered = torch.zeros(2, batch, 2, dtype=torch.int32, device=device)
        self.arrived, self.arrived_units = torch.empty_like(self.query), torch.empty_like(remote)
        self.workspace = AttendWorkspace.make(
            rows=batch, heads=HEADS, value_dim=VALUE, parts=parts_of(HEADS, device), device=device
        )
        step.make_plan(0, "always-route")

    def qroam(self, mode: PlanMode) -> tuple[Tensor, Tensor, Tensor]:
        self.step.run(0, mode)
        return self.out, self.lse, self.step.fault

    def given(self) -> tuple[Tensor, Tensor, Tensor]:
        self.step.carry_out(0, "always-route")
        return self.out, self.lse, self.step.fault

    def nccl(self, group: dist.ProcessGroup, *, planned: bool) -> tuple[Tensor, Tensor]:
        peer, made = 1 - self.rank, self.step.plan
        if planned:
            self.step.make_plan(0, "always-route")
        batch, pool = len(self.query), self.corpus.pool
        # All lists are of one length here, which NCCL has to know; ours reads it on the device.
        lists = made.route_units[0][: batch * SELECTED // 2].view(batch, -1)

        def swap(*pairs: tuple[Tensor, Tensor]) -> list[dist.Work]:
            works: list[dist.Work] = dist.batch_isend_irecv(
                [
                    dist.P2POp(way, tensor, peer, group)
                    for pair in pairs
                    for way, tensor in zip((dist.isend, dist.irecv), pair, strict=True)
                ]
            )
            return works

        options: dict[str, Any] = {"value_dim": VALUE, "scale": SCALE, "workspace": self.workspace}
        asked = swap((self.query, self.arrived), (lists, self.arrived_units))
        attend(
            self.query, pool.entries(0), made.local_units, lengths=made.local_lengths,
            out=self.home[0], lse=self.home_lse[0], covered=self.covered[0], **options,
        )  # fmt: skip
        for work in asked:
            work.wait()
        attend(
            self.arrived, pool.entries(0), self.arrived_units, tables=pool.tables(0),
            out=self.out_there, lse=self.lse_there, covered=self.covered[1], **options,
        )  # fmt: skip
        for work in swap((self.out_there, self.home[1]), (self.lse_there, self.home_lse[1])):
            work.wait()
        merge(self.home, self.home_lse, out=self.out, lse=self.lse)
        return self.out, self.lse

    def bound(self) -> tuple[Tensor, Tensor]:
        attend(
            self.query, self.corpus.entries, self.units, value_dim=VALUE, scale=SCALE,
            workspace=self.workspace, out=self.out, lse=self.lse, covered=self.covered[0],
        )  # fmt: skip
        return self.out, self.lse


class Projected:
    """One query and selection in both forms, with weights of its own, as a layer has them."""

    def __init__(self, call: Call, here: Rank, transport: SymmetricMemory, channel: int) -> None:
        batch, device = len(call.query), here.device
        nope, value = LAYOUT.query_dim - LAYOUT.rope_dim, LAYOUT.out_dim
        generator = torch.Generator(device).manual_seed(channel)  # the same on both ranks
        self.w_uk, self.w_uv = (
            torch.randn(HEADS, rows, columns, dtype=BF16, device=device, generator=generator)
            * rows**-0.5
            for rows, columns in ((nope, VALUE), (VALUE, value))
        )
        self.a, self.units, self.corpus = call.step, call.units, call.corpus
        self.b = step_of(
            here, call.corpus, transport, channel, batch, SELECTED,
            weights=[(self.w_uk, self.w_uv)],
        )  # fmt: skip
        self.b.units.copy_(self.units)
        self.b.query.normal_()
        self.b.make_plan(0, "always-route")
        self.out = torch.empty_like(self.b.out)

    def form_a(self) -> tuple[Tensor, Tensor, Tensor]:
        absorb(self.b.query, self.w_uk, out=self.a.query)
        self.a.carry_out(0, "always-route")
        project(self.a.out, self.w_uv, out=self.out)
        return self.out, self.a.lse, self.a.fault

    def form_b(self) -> tuple[Tensor, Tensor, Tensor]:
        self.b.carry_out(0, "always-route")
        return self.b.out, self.b.lse, self.b.fault

    def due(self, item: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of a query, out and lse in fp64; or as eager torch has them in bf16, softmax in fp32."""
        query = self.b.query[item : item + 1, None].to(dtype)
        entries = self.corpus.entries[self.units[item].long()].to(dtype)
        row = reference.absorb(query, self.w_uk[None].to(dtype))[0, 0]
        wide = dtype if dtype == torch.float64 else torch.float32
        scores = row.to(wide) @ entries.to(wide).mT * SCALE
        out = scores.softmax(-1).to(dtype) @ entries[:, :VALUE]
        out = reference.project(out[None, None], self.w_uv[None].to(dtype))[0, 0]
        return out, scores.logsumexp(-1)


def checked(calls: Sequence[Call]) -> Callable[[Sequence[tuple[Tensor, ...]]], None]:
    """First and last query of the first and last call, against fp64 over all that was selected."""

    def check(results: Sequence[tuple[Tensor, ...]]) -> None:
        for at in (0, len(calls) - 1):
            call, (out, lse, *fault) = calls[at], results[at]
            assert not fault or not bool(fault[0].any()), "coverage was found to differ"
            for item in (0, len(out) - 1):
                query = call.query[item : item + 1]
                entries = call.corpus.entries[call.units[item].long()][None]
                valid = torch.ones(1, SELECTED, dtype=torch.bool, device=out.device)
                run = partial(reference.attend, valid=valid, value_dim=VALUE, scale=SCALE)
                exact, exact_lse = run(query.double(), entries.double())
                scores = (query[0].float() @ entries[0].float().mT * SCALE).softmax(-1)
                eager = scores.to(BF16) @ entries[0, :, :VALUE]
                as_good_as_eager(out[item], eager, exact[0])
                torch.testing.assert_close(lse[item].double(), exact_lse[0], rtol=1e-4, atol=1e-4)

    return check


def checked_forms(
    calls: Sequence[Projected],
) -> Callable[[Sequence[tuple[Tensor, Tensor, Tensor]]], None]:
    """As `checked`, for either form."""

    def check(results: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        for at in (0, len(calls) - 1):
            call, (out, lse, fault) = calls[at], results[at]
            assert not bool(fault.any()), "coverage was found to differ"
            for item in (0, len(out) - 1):
                exact, exact_lse = call.due(item, torch.float64)
                eager, _ = call.due(item, BF16)
                as_good_as_eager(out[item], eager, exact)
                torch.testing.assert_close(lse[item].double(), exact_lse, rtol=1e-2, atol=1e-2)

    return check


def compare_with_nccl(
    here: Rank,
    case: str,
    calls: Sequence[Call],
    transport: SymmetricMemory,
    group: dist.ProcessGroup,
) -> None:
    check = checked(calls)
    ways: dict[str, Callable[[Call], object]] = {
        "plan and routed step": lambda call: call.qroam("always-route"),
        "routed step, plan given": Call.given,
        "plan, NCCL send and receive, same attention": partial(
            Call.nccl, group=group, planned=True
        ),
        "NCCL send and receive, same attention, plan given": partial(
            Call.nccl, group=group, planned=False
        ),
        "one GPU that holds all entries": Call.bound,
    }
    whole, given, nccl, nccl_given, bound = here.timed(
        [
            Variant(name=name, check=check, calls=[partial(way, call) for call in calls])
            for name, way in ways.items()
        ]
    )
    transport.check()
    names = list(ways)
    for own, ours, theirs, baseline in (
        (whole, names[0], nccl, names[2]),
        (given, names[1], nccl_given, names[3]),
    ):
        here.report("step", case, (ours, own), {baseline: theirs, names[4]: bound})
        exposed, its = own.median - bound.median, theirs.median - bound.median
        here.say(f"{'':<28} exposed: {exposed:.1f} us, with NCCL {its:.1f} us")
        here.record("step", f"{case}, {ours}, exposed", exposed, f"{baseline}, exposed", its)


def compare_forms(
    here: Rank, case: str, calls: Sequence[Call], transport: SymmetricMemory, channel: int
) -> None:
    both = [Projected(call, here, transport, channel) for call in calls]
    torch.cuda.synchronize()
    check, names = checked_forms(both), ("routed step of form B", "W_UK, form A's step, W_UV")
    ways: tuple[Callable[[Projected], object], ...] = (Projected.form_b, Projected.form_a)
    form_b, form_a = here.timed(
        [
            Variant(name=name, check=check, calls=[partial(way, call) for call in both])
            for name, way in zip(names, ways, strict=True)
        ]
    )
    transport.check()
    here.report("step", case, (names[0], form_b), {names[1]: form_a})


def work(here: Rank) -> None:
    group = dist.group.WORLD
    assert group is not None
    group_nccl = dist.new_group(backend="nccl", device_id=here.device)
    assert group_nccl is not None
    shape = map_of(entry_bytes=2 * QUERY, staged=BATCHES[-1] * SELECTED)
    transport = SymmetricMemory(
        [wire_of(batch, SELECTED, form=form) for form in FORMS for batch in BATCHES], group=group,
        device=here.device, deadline_s=20.0, heap=shape.num_bytes,
    )  # fmt: skip
    corpus = Corpus(here, transport.heap, transport.heaps, shape)
    here.say(
        f"2 x {here.properties.name}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}"
    )
    for channel, batch in enumerate(BATCHES):
        spread, forms = f"B={batch}, selections spread evenly", f"B={batch}, payload forms"
        if not here.wants(spread) and not here.wants(forms):
            continue
        torch.manual_seed(here.rank)
        calls = [
            Call(here, corpus, step_of(here, corpus, transport, channel, batch, SELECTED))
            for _ in range(here.calls(batch * SELECTED * QUERY * 2))
        ]
        torch.cuda.synchronize()
        if here.wants(spread):
            compare_with_nccl(here, spread, calls, transport, group_nccl)
        if here.wants(forms):
            compare_forms(here, forms, calls, transport, len(BATCHES) + channel)
    transport.close()


if __name__ == "__main__":
    sys.exit(launch(2, work, __doc__))
