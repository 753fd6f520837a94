"""fp8 entries and index keys, encoded and decoded (`kernels/codec.py`).

The bar is the copy bandwidth measured in the same run; beside it stands a copy of as many bytes.
The plain-torch codec (`partition/codec.py`) reads values to the host and cannot be captured; it is
what the results are compared with, bit by bit.

    python benchmarks/codec.py [--quick] [--cases REGEX]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from gpu import DEVICE, Bench, Variant, copy_of
from torch import Tensor

from qroam.kernels import codec
from qroam.partition.codec import Codec, make_codec

ENTRY = make_codec("fp8_v32", dim=576, rope_dim=64)
INDEX = make_codec("fp8_index", dim=128)
SAMPLE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    verb: Literal["encode", "decode"]
    what: Literal["entries", "index keys"]
    number: int

    @property
    def name(self) -> str:
        return f"{self.verb} {self.number} {self.what}"

    @property
    def codec(self) -> Codec:
        return ENTRY if self.what == "entries" else INDEX

    @property
    def num_bytes(self) -> float:
        """bf16 on one side, fp8 rows on the other."""
        return self.number * (2 * self.codec.dim + self.codec.entry_bytes)


CASES = (
    *(Case(verb="encode", what="entries", number=number) for number in (64, 8192, 131072)),
    *(Case(verb="decode", what="entries", number=number) for number in (2048, 131072)),
    Case(verb="encode", what="index keys", number=131072),
    Case(verb="decode", what="index keys", number=131072),
)


def call(case: Case, source: Tensor) -> Callable[[], Tensor]:
    """Into an output of its own: `source` is (N, D) bf16 or (N, entry_bytes) uint8."""
    encodes, entries = case.verb == "encode", case.what == "entries"
    out = torch.empty(
        case.number,
        case.codec.entry_bytes if encodes else case.codec.dim,
        dtype=torch.uint8 if encodes else torch.bfloat16,
        device=DEVICE,
    )
    if entries and encodes:
        return lambda: codec.encode_latent(source, rope_dim=64, out=out)
    if entries:
        return lambda: codec.decode_latent(source, rope_dim=64, out=out)
    if encodes:
        return lambda: codec.encode_index(source, out=out)
    return lambda: codec.decode_index(source, out=out)


def checked(case: Case, sources: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], None]:
    def check(results: Sequence[Tensor]) -> None:
        for number in (0, len(sources) - 1):
            some = torch.randint(0, case.number, (SAMPLE,), device=DEVICE)
            source, result = sources[number][some], results[number][some]
            if case.verb == "encode":
                want = case.codec.encode(source)
            else:
                want = case.codec.decode(source, torch.bfloat16)
            assert torch.equal(result, want), f"call {number} differs from partition/codec.py"

    return check


def main() -> int:
    bench = Bench("codec", __doc__)
    torch.manual_seed(0)
    for case in CASES:
        if not bench.wants(case.name):
            continue
        sources = []
        for _ in range(bench.rotations(case.num_bytes)):
            numbers = torch.randn(case.number, case.codec.dim, device=DEVICE, dtype=torch.bfloat16)
            numbers *= torch.rand(case.number, 1, device=DEVICE, dtype=torch.bfloat16) * 100
            sources.append(numbers if case.verb == "encode" else case.codec.encode(numbers))
        ours = Variant(
            name="qroam",
            calls=[call(case, source) for source in sources],
            check=checked(case, sources),
        )
        baselines = [copy_of(case.num_bytes, calls=len(sources))]
        bench.case(case.name, ours, baselines, num_bytes=case.num_bytes)
    return bench.close()


if __name__ == "__main__":
    sys.exit(main())
