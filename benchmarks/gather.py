"""Gather of scattered rows (`kernels/gather.py`): entries, blocks, query rows.

The bar is the copy bandwidth measured in the same run; beside it stand torch's `index_select` and a
copy of as many bytes (small ones cost a launch, whatever they move).

    python benchmarks/gather.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from gpu import DEVICE, Bench, Variant, copy_of
from torch import Tensor

from qroam.kernels.gather import gather

STORED_BYTES = 1 << 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    rows: int
    row_bytes: int
    what: str

    @property
    def name(self) -> str:
        return f"{self.rows} {self.what} of {self.row_bytes} B"

    @property
    def num_bytes(self) -> float:
        """Rows read and written once, and the list."""
        return self.rows * (2 * self.row_bytes + 4)


CASES = (
    *(Case(rows=rows, row_bytes=656, what="fp8 entries") for rows in (2048, 16384, 131072)),
    *(Case(rows=rows, row_bytes=1152, what="bf16 entries") for rows in (2048, 131072)),
    *(Case(rows=rows, row_bytes=64 * 1152, what="bf16 blocks") for rows in (32, 1024)),
    Case(rows=131072, row_bytes=132, what="index keys"),
    Case(rows=64, row_bytes=128 * 1152, what="queries"),
)


def calls_of(
    stored: Tensor, lists: Sequence[Tensor], verb: Callable[[Tensor, Tensor, Tensor], object]
) -> list[Callable[[], object]]:
    """Each call with a list and an output of its own."""

    def call(index: Tensor) -> Callable[[], object]:
        out = torch.empty(len(index), stored.shape[1], dtype=stored.dtype, device=DEVICE)

        def run() -> Tensor:
            verb(stored, index, out)
            return out

        return run

    return [call(index) for index in lists]


def main() -> int:
    bench = Bench("gather", __doc__)
    torch.manual_seed(0)
    for case in CASES:
        if not bench.wants(case.name):
            continue
        number = STORED_BYTES // case.row_bytes
        stored = torch.randint(0, 255, (number, case.row_bytes), dtype=torch.uint8, device=DEVICE)
        lists = [
            torch.rand(number, device=DEVICE).topk(case.rows)[1].to(torch.int32)
            for _ in range(bench.rotations(case.num_bytes))
        ]

        def check(
            results: Sequence[Tensor], stored: Tensor = stored, lists: list[Tensor] = lists
        ) -> None:
            for result, index in zip(results, lists, strict=True):
                assert torch.equal(result, stored[index.long()]), "rows differ"

        words = stored.view(torch.int32)
        ours = calls_of(stored, lists, lambda rows, index, out: gather(rows, index, out=out))
        theirs = calls_of(
            words, lists, lambda rows, index, out: torch.index_select(rows, 0, index, out=out)
        )
        baselines = [
            copy_of(case.num_bytes, calls=len(lists)),
            Variant(
                name="torch.index_select",
                calls=theirs,
                check=lambda results: check([result.view(torch.uint8) for result in results]),
            ),
        ]
        bench.case(
            case.name,
            Variant(name="qroam", calls=ours, check=check),
            baselines,
            num_bytes=case.num_bytes,
        )
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
