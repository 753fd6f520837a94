"""Merge of partials (`kernels/library/merge.py`): P partials of every item, or lists of them.

Partials are bf16, 128 heads of 512 columns, coverage compared as in a step. The bar is the copy
bandwidth measured in the same run; beside it stand the same sum as three torch operations, and a
copy of as many bytes.

    python benchmarks/merge.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu import DEVICE, Bench, Variant, as_good_as_eager, copy_of
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.library.merge import merge

COLUMNS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    partials: int
    items: int
    heads: int = 128
    listed: bool = False  # 0 to 2 P partials of an item, P on average, one behind another

    @property
    def name(self) -> str:
        number = f"0 to {2 * self.partials}" if self.listed else f"{self.partials}"
        return f"{number} partials, {self.items} queries, {self.heads} heads"

    @property
    def num_bytes(self) -> float:
        """Partials read and results written once: bf16 out, fp32 lse, coverage twice."""
        row = self.heads * (2 * COLUMNS + 4)
        return self.items * (self.partials * (row + 16) + row + 4)


CASES = (
    Case(partials=4, items=64),
    Case(partials=2, items=64),
    Case(partials=8, items=64),
    Case(partials=4, items=1),
    Case(partials=4, items=8),
    Case(partials=4, items=256),
    Case(partials=4, items=64, heads=16),
    Case(partials=4, items=64, listed=True),
)


class Inputs:
    """Of one call: outs (P, N, H, C) bf16, lses (P, N, H), covered (P, N, 2), or lists of them."""

    def __init__(self, case: Case) -> None:
        self.case, total = case, case.partials * case.items
        self.offsets: Tensor | None = None
        shape: tuple[int, ...] = (case.partials, case.items)
        if case.listed:
            half = torch.randint(0, 2 * case.partials + 1, (case.items // 2,))
            half[0] = 0
            counts = torch.cat((half, 2 * case.partials - half))  # as many as with P for each
            offsets = torch.zeros(case.items + 1, dtype=torch.int32)
            offsets[1:] = counts.cumsum(0)
            self.offsets, shape = offsets.to(DEVICE), (total,)
        self.outs = torch.randn(*shape, case.heads, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
        self.lses = 8 * torch.randn(*shape, case.heads, device=DEVICE)
        empty = torch.rand(shape, device=DEVICE) < 0.1
        self.outs[empty], self.lses[empty] = torch.nan, -torch.inf
        self.covered = torch.randint(0, 2**31 - 1, (*shape, 2), dtype=torch.int32, device=DEVICE)
        self.expected = self.covered.clone()
        self.out = torch.empty(case.items, case.heads, COLUMNS, dtype=torch.bfloat16, device=DEVICE)
        self.lse = torch.empty(case.items, case.heads, device=DEVICE)
        self.fault = torch.empty(case.items, dtype=torch.int32, device=DEVICE)

    def merge(self) -> tuple[Tensor, Tensor, Tensor]:
        merge(
            self.outs,
            self.lses,
            offsets=self.offsets,
            covered=self.covered,
            expected=self.expected,
            fault=self.fault,
            out=self.out,
            lse=self.lse,
        )
        return self.out, self.lse, self.fault

    def torch_merge(self) -> tuple[Tensor, Tensor]:
        lse = torch.logsumexp(self.lses, dim=0)
        shares = torch.exp(self.lses - lse).masked_fill(self.lses == -torch.inf, 0.0)
        outs = self.outs.masked_fill((self.lses == -torch.inf)[..., None], 0.0)
        return torch.einsum("pnh,pnhc->nhc", shares.to(outs.dtype), outs), lse

    def exact(self, item: int) -> tuple[Tensor, Tensor, Tensor]:
        """One item's out and lse in fp64, and eager torch's out in bf16."""
        if self.offsets is None:
            outs, lses = self.outs[:, item], self.lses[:, item]
        else:
            first, end = self.offsets[item : item + 2].tolist()
            outs, lses = self.outs[first:end], self.lses[first:end]
        target = torch.zeros(len(outs), dtype=torch.int64, device=DEVICE)
        out, lse = reference.merge(outs.double(), lses.double(), target, 1)
        eager, _ = reference.merge(outs, lses.to(outs.dtype), target, 1)
        return out[0], lse[0], eager[0]


def checked(inputs: Sequence[Inputs]) -> Callable[[Sequence[tuple[Tensor, ...]]], None]:
    def check(results: Sequence[tuple[Tensor, ...]]) -> None:
        for call in (0, len(results) - 1):
            out, lse, *fault = results[call]
            assert not fault or bool((fault[0] == 0).all()), "coverage was found to differ"
            for item in sorted({0, len(out) // 2, len(out) - 1}):
                exact, exact_lse, eager = inputs[call].exact(item)
                as_good_as_eager(out[item], eager, exact)
                torch.testing.assert_close(lse[item].double(), exact_lse, rtol=1e-5, atol=1e-5)

    return check


def main() -> int:
    bench = Bench("merge", __doc__)
    torch.manual_seed(0)
    for case in CASES:
        if not bench.wants(case.name):
            continue
        inputs = [Inputs(case) for _ in range(bench.rotations(case.num_bytes))]
        check = checked(inputs)
        baselines = [copy_of(case.num_bytes, calls=len(inputs))]
        if not case.listed:
            calls = [given.torch_merge for given in inputs]
            baselines.append(Variant(name="torch operations", calls=calls, check=check))
        ours = Variant(name="qroam", calls=[given.merge for given in inputs], check=check)
        bench.case(case.name, ours, baselines, num_bytes=case.num_bytes)
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
