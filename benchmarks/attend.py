"""Partial attention (`kernels/attend.py`) against FlashInfer and FlashMLA, over 262144 entries.

Entries are 512 latent and 64 rope columns; each query lists its own 2048 random entries, or 32
random blocks of 64. FlashInfer is planned on the host once, before its runs are captured; that time
is shown beside. FlashMLA takes part where its prebuilt kernels can be imported.

    python benchmarks/attend.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from gpu import DEVICE, Bench, Variant, as_good_as_eager, host_us
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.attend import AttendWorkspace, attend, parts_of
from qroam.kernels.coverage import coverage
from qroam.kernels.library import flashinfer, flashmla
from qroam.partition.codec import make_codec

CORPUS, ENTRIES, LATENT, ROPE = 262144, 2048, 512, 64
DIM = LATENT + ROPE
SCALE = 192**-0.5
FP8 = make_codec("fp8_v32", dim=DIM, rope_dim=ROPE)
try:
    FLASHINFER = version("flashinfer-python")
except PackageNotFoundError:
    FLASHINFER = "(not installed)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    heads: int
    batch: int
    unit_tokens: int = 1
    fp8: bool = False
    ragged: bool = False

    @property
    def name(self) -> str:
        units = f"{ENTRIES} entries" if self.unit_tokens == 1 else f"{self.columns} units of 64"
        lengths = f"0 to {units}" if self.ragged else units
        return f"{'fp8' if self.fp8 else 'bf16'}, {self.heads} heads, {lengths}, B={self.batch}"

    @property
    def columns(self) -> int:
        return ENTRIES // self.unit_tokens

    @property
    def entry_bytes(self) -> int:
        return 656 if self.fp8 else 2 * DIM


CASES = (
    *(Case(heads=128, batch=batch) for batch in (1, 8, 32, 64, 128)),
    *(Case(heads=16, batch=batch) for batch in (8, 64)),
    *(Case(heads=128, batch=batch, unit_tokens=64) for batch in (8, 64)),
    Case(heads=128, batch=64, fp8=True),
    Case(heads=128, batch=64, ragged=True),
)


class Inputs:
    """k calls' queries (B, H, 576), units (B, E) and entry lists (B, 2048), all different."""

    def __init__(self, case: Case, calls: int) -> None:
        shape = (case.batch, case.heads, DIM)
        self.queries = [
            torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(calls)
        ]
        self.units = [_random_units(case) for _ in range(calls)]
        steps = torch.arange(case.unit_tokens, dtype=torch.int32, device=DEVICE)
        self.lists = [(units[..., None] + steps).flatten(1) for units in self.units]
        self.lengths = [case.columns] * case.batch
        if case.ragged:  # an empty row, a full one, and anything
            some = torch.randint(0, case.columns + 1, (case.batch,)).tolist()
            self.lengths = [0, case.columns, *some][: case.batch]
        self.entries = [length * case.unit_tokens for length in self.lengths]

    def checks(
        self, stored: Tensor, *, empty: float = -torch.inf, base: float = math.e
    ) -> Callable[..., None]:
        """A check of the first and last call: first, middle and last row against fp64 torch.

        Args: empty: a library's LSE of nothing. base: of its logarithm.
        """

        def check(results: Sequence[tuple[Tensor, ...]]) -> None:
            for call in (0, len(results) - 1):
                out, lse, *covered = results[call]
                for row in sorted({0, 1, len(out) // 2, len(out) - 1} & set(range(len(out)))):
                    ids = self.lists[call][row, : self.entries[row]]
                    natural = lse[row] * math.log(base)
                    self._check_row(self.queries[call][row], stored, ids, out[row], natural, empty)
                    if covered:
                        zeros = torch.zeros_like(ids)
                        want = coverage(ids, zeros, torch.ones_like(ids, dtype=torch.bool))
                        found = covered[0][row]
                        assert torch.equal(found, want), f"row {row}: covered {found}, not {want}"

        return check

    @staticmethod
    def _check_row(
        query: Tensor, stored: Tensor, ids: Tensor, out: Tensor, lse: Tensor, empty: float
    ) -> None:
        if len(ids) == 0:
            assert bool((out == 0).all()), "an empty row has output"
            assert bool((lse == empty).all()), f"an empty row has lse {lse[0]}"
            return
        rows = stored[ids.long()]
        rows = FP8.decode(rows, torch.bfloat16) if rows.dtype == torch.uint8 else rows
        exact, exact_lse = reference.attend(
            query.double()[None],
            rows.double()[None],
            torch.ones(1, len(ids), dtype=torch.bool, device=DEVICE),
            value_dim=LATENT,
            scale=SCALE,
        )
        eager = torch.softmax(query @ rows.T * SCALE, dim=-1) @ rows[:, :LATENT]
        as_good_as_eager(out, eager, exact[0])
        off = float((lse.double() - exact_lse[0]).abs().max())
        assert off <= 2e-3, f"lse is off by {off:.1e}"


def _random_units(case: Case) -> Tensor:
    """(B, E) int32 distinct random units of each row, as first entries."""
    whole = CORPUS // case.unit_tokens
    chosen = [torch.rand(1, whole, device=DEVICE).topk(case.columns)[1] for _ in range(case.batch)]
    return (torch.cat(chosen) * case.unit_tokens).to(torch.int32)


def ours(case: Case, inputs: Inputs, stored: Tensor) -> Variant:
    workspace = AttendWorkspace.make(
        rows=case.batch,
        heads=case.heads,
        value_dim=LATENT,
        device=DEVICE,
        parts=parts_of(case.heads, DEVICE),
    )
    lengths = torch.tensor(inputs.lengths, dtype=torch.int32, device=DEVICE)

    def call(query: Tensor, units: Tensor) -> Callable[[], object]:
        out = torch.empty(case.batch, case.heads, LATENT, device=DEVICE, dtype=query.dtype)
        lse = torch.empty(case.batch, case.heads, device=DEVICE)
        covered = torch.empty(case.batch, 2, dtype=torch.int32, device=DEVICE)
        return lambda: attend(
            query,
            stored,
            units,
            value_dim=LATENT,
            scale=SCALE,
            workspace=workspace,
            unit_tokens=case.unit_tokens,
            lengths=lengths,
            out=out,
            lse=lse,
            covered=covered,
        )

    calls = [call(*given) for given in zip(inputs.queries, inputs.units, strict=True)]
    return Variant(name="qroam", calls=calls, check=inputs.checks(stored))


def with_flashinfer(
    case: Case, inputs: Inputs, stored: Tensor, backend: flashinfer.Backend, page_tokens: int
) -> Variant:
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)

    def call(
        query: Tensor, lists: Tensor
    ) -> tuple[flashinfer.FlashInferAttend, Callable[[], object]]:
        pages = [
            row[:length:page_tokens] // page_tokens
            for row, length in zip(lists, inputs.entries, strict=True)
        ]
        planned = flashinfer.FlashInferAttend(
            rows=case.batch,
            num_pages=sum(map(len, pages)),
            num_heads=case.heads,
            value_dim=LATENT,
            rope_dim=ROPE,
            scale=SCALE,
            dtype=torch.bfloat16,
            device=DEVICE,
            backend=backend,
            page_tokens=page_tokens,
            workspace=workspace,
        )
        planned.pages.copy_(torch.cat(pages))
        planned.plan(inputs.entries)
        out = torch.empty(case.batch, case.heads, LATENT, device=DEVICE, dtype=query.dtype)
        lse = torch.empty(case.batch, case.heads, device=DEVICE)
        return planned, lambda: planned.launch(query, stored, out=out, lse=lse)

    made = [call(*given) for given in zip(inputs.queries, inputs.lists, strict=True)]
    return Variant(
        name=f"FlashInfer {FLASHINFER} {backend}, pages of {page_tokens}",
        calls=[run for _, run in made],
        check=inputs.checks(stored, base=2.0),
        host_us=host_us(lambda: made[0][0].plan(inputs.entries)),
    )


def with_flashmla(case: Case, inputs: Inputs, stored: Tensor) -> Variant:
    """Its kernel alone; lists are padded with -1 beforehand."""
    schedule = flashmla.new_schedule()
    columns = torch.arange(ENTRIES, device=DEVICE)
    inside = columns < torch.tensor(inputs.entries, device=DEVICE)[:, None]

    def call(query: Tensor, lists: Tensor) -> Callable[[], object]:
        padded = torch.where(inside, lists, -1)
        return lambda: flashmla.run(query, stored, padded, scale=SCALE, schedule=schedule)

    return Variant(
        name="FlashMLA fp8 sparse decode",
        calls=[call(*given) for given in zip(inputs.queries, inputs.lists, strict=True)],
        check=inputs.checks(stored, empty=torch.inf),
    )


def baselines(case: Case, inputs: Inputs, stored: Tensor, corpus: Tensor) -> list[Variant]:
    made = []
    attempts: list[Callable[[], Variant]] = [
        lambda: with_flashinfer(case, inputs, corpus, "fa3", 1),
        lambda: with_flashinfer(case, inputs, corpus, "fa2", 1),
    ]
    if case.fp8:
        attempts.append(lambda: with_flashmla(case, inputs, stored))
    if case.unit_tokens > 1:
        attempts.append(lambda: with_flashinfer(case, inputs, corpus, "fa3", case.unit_tokens))
    for attempt in attempts:
        try:
            made.append(attempt())
        except RuntimeError as error:
            print(
                f"{case.name:<42} {'':<40} not compared: {str(error).splitlines()[0]}", flush=True
            )
    return made


def least_bytes(case: Case, inputs: Inputs) -> float:
    """What the first call has to move: its distinct entries once, lists, queries and results."""
    rows = zip(inputs.lists[0], inputs.entries, strict=True)
    distinct = len(torch.cat([row[:length] for row, length in rows]).unique())
    per_row = case.heads * (2 * DIM + 2 * LATENT + 4) + 8
    lists = 4 * sum(inputs.lengths)
    return distinct * case.entry_bytes + lists + case.batch * per_row


def main() -> int:
    bench = Bench("attend", __doc__)
    torch.manual_seed(0)
    corpus = torch.randn(CORPUS, DIM, device=DEVICE, dtype=torch.bfloat16)
    fp8_corpus = FP8.encode(corpus)
    for case in CASES:
        if not bench.wants(case.name):
            continue
        stored = fp8_corpus if case.fp8 else corpus
        listed = case.batch * ENTRIES // (2 if case.ragged else 1)
        inputs = Inputs(case, bench.rotations(listed * case.entry_bytes))
        bench.case(
            case.name,
            ours(case, inputs, stored),
            baselines(case, inputs, stored, corpus),
            num_bytes=least_bytes(case, inputs),
            flops=2 * case.heads * (DIM + LATENT) * sum(inputs.entries),
        )
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
