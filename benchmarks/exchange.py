"""Exchange of routed queries and their answers between two GPUs (`kernels/exchange/`) against NCCL.

B queries a rank, 128 heads, bf16, payload form A, all asked of the other rank with 1024 units each;
partials are given, the merge with the own partial is included. `one kernel` has all four roles in
one launch; `three kernels` is how they lie around the attention of a step. NCCL's variants are told
neither lists nor counts, and find their partials packed.

    python benchmarks/exchange.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from gpu import Variant
from gpus import Rank, launch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.exchange.launch import exchange
from qroam.kernels.exchange.layout import Wire
from qroam.kernels.exchange.types import Accepted, Ends, Merge, Partials, Routes
from qroam.kernels.library.merge import merge
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory

HEADS, QUERY, VALUE, UNITS = 128, 576, 512, 1024
BATCHES = (1, 4, 8, 16, 32, 64)
_ROW = HEADS * VALUE
_RECORD = HEADS * (VALUE + 2)  # bf16 elements: out, then lse as fp32


class Call:
    """Buffers of one exchange on this rank. Partials are (2, B, H, C) and (2, B, H), own and theirs."""

    def __init__(self, rank: int, batch: int, device: torch.device) -> None:
        peer, self.rank = 1 - rank, rank

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        pairs, items = ints(2), ints(2 * batch)
        pairs[peer] = batch
        items[:batch] = torch.arange(batch, device=device)
        units_of, expected = ints(2 * batch, value=UNITS), ints(batch, 2, 2, value=UNITS)
        self.routes = Routes(items, units_of, ints(batch * UNITS), pairs, expected)
        self.query = torch.randn(batch, HEADS, QUERY, dtype=torch.bfloat16, device=device)
        # [rank] is for this rank's queries, [peer] for the other's.
        self.outs = torch.randn(2, batch, HEADS, VALUE, dtype=torch.bfloat16, device=device)
        self.lses = 4 * torch.randn(2, batch, HEADS, device=device)
        self.covered = ints(batch, 2, value=UNITS)
        self.out = torch.empty_like(self.outs[0])
        self.lse = torch.empty_like(self.lses[0])
        self.fault = ints(batch)
        self.packed = torch.empty(2, batch, _RECORD, dtype=torch.bfloat16, device=device)
        self._of(self.packed, self.outs, self.lses)
        self.both = torch.empty_like(self.packed)  # what is merged: own, and what arrives
        self.both[rank] = self.packed[rank]
        self.queries = torch.empty(2, *self.query.shape, dtype=torch.bfloat16, device=device)
        self.all_lses = torch.empty(2, *self.lses.shape, device=device)

    @staticmethod
    def _of(packed: Tensor, outs: Tensor, lses: Tensor) -> None:
        packed[..., :_ROW] = outs.flatten(2)
        packed[..., _ROW:].view(torch.float32).copy_(lses)

    def qroam(
        self, ends: Ends, accepted: Accepted, launches: Sequence[Sequence[str]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        peer = 1 - self.rank
        roles: dict[str, Any] = {
            "send": self.query,
            "accept": accepted,
            "answer": Partials(self.outs[peer], self.lses[peer], self.covered),
            "receive": Merge(
                self.outs[self.rank][None], self.lses[self.rank][None],
                self.out, self.lse, self.fault,
            ),
        }  # fmt: skip
        for names in launches:
            exchange(ends, self.routes, **{name: roles[name] for name in names})
        return self.out, self.lse, self.fault

    def _merged(self) -> tuple[Tensor, Tensor]:
        outs = self.both[..., :_ROW].unflatten(-1, (HEADS, VALUE))
        merge(outs, self.both[..., _ROW:].view(torch.float32), out=self.out, lse=self.lse)
        return self.out, self.lse

    def _answers(self, nccl: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """One packed all-to-all; nothing of it stays here."""
        peer, batch = 1 - self.rank, len(self.query)
        splits = [0, 0]
        splits[peer] = batch
        dist.all_to_all_single(self.both[peer], self.packed[peer], splits, splits, group=nccl)
        return self._merged()

    def gather_then_all_to_all(self, nccl: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        dist.all_gather_into_tensor(self.queries, self.query, group=nccl)
        return self._answers(nccl)

    def all_to_all_twice(self, nccl: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        peer, splits = 1 - self.rank, [0, 0]
        splits[peer] = len(self.query)
        dist.all_to_all_single(self.queries[peer], self.query, splits, splits, group=nccl)
        return self._answers(nccl)

    def gather_then_reduce_scatter(self, nccl: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        dist.all_gather_into_tensor(self.queries, self.query, group=nccl)
        dist.all_gather_into_tensor(self.all_lses, self.lses, group=nccl)
        lse = torch.logsumexp(self.all_lses, 0)
        weighted = self.outs * torch.exp(self.lses - lse)[..., None]
        dist.reduce_scatter_tensor(self.out, weighted.to(torch.bfloat16), group=nccl)
        return self.out, lse[self.rank]


def checked(calls: Sequence[Call], theirs: Sequence[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    """Of the first and last call: merged out and lse against fp64."""

    def check(results: Sequence[tuple[Tensor, ...]]) -> None:
        for at in (0, len(calls) - 1):
            call, (out, lse, *fault) = calls[at], results[at]
            outs = torch.cat([call.outs[call.rank], theirs[at][0]]).double()
            lses = torch.cat([call.lses[call.rank], theirs[at][1]]).double()
            target = torch.arange(len(out), device=out.device).repeat(2)
            exact, exact_lse = reference.merge(outs, lses, target, len(out))
            torch.testing.assert_close(out.double(), exact, rtol=2**-6, atol=2**-6)
            torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
            assert not fault or not bool(fault[0].any()), "coverage was found to differ"

    return check


def work(here: Rank) -> None:
    group = dist.group.WORLD
    assert group is not None
    nccl = dist.new_group(backend="nccl", device_id=here.device)
    assert nccl is not None
    wires = [
        Wire(
            world_size=2, rows=batch, heads=HEADS, query_words=HEADS * QUERY // 2,
            answer_words=_ROW // 2, units=UNITS,
        )
        for batch in BATCHES
    ]  # fmt: skip
    transport = SymmetricMemory(wires, group=group, device=here.device, deadline_s=10.0)
    here.say(
        f"2 x {here.properties.name}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}"
    )
    for channel, batch in enumerate(BATCHES):
        case = f"B={batch}, form A"
        if not here.wants(case):
            continue
        num_bytes = batch * 2 * (2 * HEADS * QUERY + 5 * _ROW)
        torch.manual_seed(here.rank)
        calls = [Call(here.rank, batch, here.device) for _ in range(here.calls(num_bytes))]
        theirs = []
        for call in (calls[0], calls[-1]):  # what the other rank holds for this one's queries
            out, lse = torch.empty_like(call.out), torch.empty_like(call.lse)
            peer = 1 - here.rank
            for mine, got in ((call.outs[peer], out), (call.lses[peer], lse)):
                dist.batch_isend_irecv(
                    [
                        dist.P2POp(dist.isend, mine.contiguous(), peer, nccl),
                        dist.P2POp(dist.irecv, got, peer, nccl),
                    ]
                )
            theirs.append((out, lse))
        torch.cuda.synchronize()
        check = checked(calls, [theirs[0]] * (len(calls) - 1) + [theirs[1]])
        ends = transport.ends(channel)
        accepted = Accepted.make(wires[channel], here.device)
        launches = {
            "one kernel": [["send", "accept", "answer", "receive"]],
            "three kernels": [["send"], ["accept"], ["answer", "receive"]],
        }
        ours = [
            Variant(name=name, check=check, calls=[_bind(c, ends, accepted, roles) for c in calls])
            for name, roles in launches.items()
        ]
        baselines = {
            "NCCL all-gather, all-to-all, our merge": Call.gather_then_all_to_all,
            "NCCL all-to-all twice, our merge": Call.all_to_all_twice,
            "NCCL all-gathers, weighting, reduce-scatter": Call.gather_then_reduce_scatter,
        }
        others = [
            Variant(name=name, check=check, calls=[_over(f, c, nccl) for c in calls])
            for name, f in baselines.items()
        ]
        timings = here.timed([*ours, *others])
        transport.check()
        for variant, timing in zip(ours, timings, strict=False):
            against = dict(zip(baselines, timings[len(ours) :], strict=True))
            here.report("exchange", case, (variant.name, timing), against)
    transport.close()


def _bind(
    call: Call, ends: Ends, accepted: Accepted, roles: Sequence[Sequence[str]]
) -> Callable[[], object]:
    return lambda: call.qroam(ends, accepted, roles)


def _over(
    exchange: Callable[[Call, dist.ProcessGroup], object], call: Call, nccl: dist.ProcessGroup
) -> Callable[[], object]:
    return lambda: exchange(call, nccl)


if __name__ == "__main__":
    sys.exit(launch(2, work, __doc__))
