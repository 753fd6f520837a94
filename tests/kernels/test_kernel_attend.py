"""The attention kernels against `kernels.reference`, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.attend import AttendWorkspace, Pairing, Tables, attend, parts_of
from qroam.kernels.coverage import coverage
from qroam.partition.codec import make_codec
from qroam.partition.rope import apply_rope, rope_tables

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")]


@dataclass(frozen=True, kw_only=True)
class Case:
    heads: int
    lengths: tuple[int, ...]  # list columns in use, by row
    latent: int = 128
    rope: int = 64
    listed: int = 0  # list columns, at least the longest length
    unit_tokens: int = 1
    dtype: torch.dtype = torch.float32
    codec: str | None = None
    corpus: int = 512
    parts: int | None = None
    padding: float = 0.2  # of the columns in use
    tables: bool = False
    seed: int = 0


class Inputs:
    """Random inputs of a case, whatever nobody may read poisoned with NaN."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)
        dim, rows = case.latent + case.rope, len(case.lengths)
        self.query = torch.randn(rows, case.heads, dim, generator=generator).to(case.dtype)
        entries = torch.randn(case.corpus, dim, generator=generator).to(case.dtype)
        capacity = max(case.listed, *case.lengths, 1)
        unit = case.unit_tokens
        whole = case.corpus // unit
        units = torch.full((rows, capacity), -1, dtype=torch.int32)
        for row, length in enumerate(case.lengths):
            picked = torch.randperm(whole, generator=generator)[:length] * unit
            hide = torch.rand(length, generator=generator) < case.padding
            units[row, :length] = torch.where(hide, -1, picked).int()
            units[row, length:] = whole // 2 * unit  # beyond the length: must not be read
        inside = torch.arange(capacity) < torch.tensor(case.lengths)[:, None]
        self.units, self.lengths = units, torch.tensor(case.lengths, dtype=torch.int32)
        listed = torch.where(inside & (units >= 0), units, -1)
        ids = listed[..., None] + torch.arange(unit)
        self.ids = torch.where(listed[..., None] >= 0, ids, -1).flatten(1)
        self.tables: Tables | None = None
        self.index: Tensor
        self.generations = torch.zeros_like(self.ids)
        self.valid = self.ids >= 0
        index = self.ids.clamp(min=0).long()
        if case.tables:
            self._place(entries, generator)
            index = self.index
        else:
            wanted = torch.zeros(case.corpus, dtype=torch.bool)
            wanted[index[self.valid]] = True
            entries[~wanted] = torch.nan
            self.stored = entries
        if case.codec is not None:
            codec = make_codec(case.codec, dim=dim, rope_dim=case.rope)
            unread = self.stored.isnan().any(1)
            self.stored = codec.encode(torch.nan_to_num(self.stored))
            readable = codec.decode(self.stored, torch.float32)
            self.stored[unread] = 0xFF  # codes, scales and rope of NaN
        else:
            readable = self.stored
        self.read = readable[index.clamp(0, len(readable) - 1)]

    def _place(self, entries: Tensor, generator: torch.Generator) -> None:
        """Put two thirds of the blocks of 64 into random slots, some of them half written."""
        case, tokens = self.case, 64
        keys = case.corpus // tokens
        slots = torch.randperm(2 * keys, generator=generator)[:keys].int()
        absent = torch.rand(keys, generator=generator) < 0.3
        slot_of = torch.where(absent, -1, slots)
        fill = torch.randint(1, tokens + 1, (2 * keys,), generator=generator).int()
        generation = torch.randint(0, 9, (2 * keys,), generator=generator).int()
        stored = torch.full((2 * keys * tokens, entries.shape[1]), torch.nan, dtype=entries.dtype)
        for key, slot in enumerate(slot_of.tolist()):
            if slot >= 0:
                used = int(fill[slot])
                stored[slot * tokens : slot * tokens + used] = entries[key * tokens :][:used]
        self.stored = stored
        self.tables = Tables(slot_of, generation, fill, tokens)
        ids = self.ids.clamp(min=0).long()
        slot = torch.where(self.valid, slot_of[ids // tokens].long(), -1)
        self.valid &= (slot >= 0) & (ids % tokens < fill[slot.clamp(min=0)])
        self.generations = generation[slot.clamp(min=0)]
        self.index = torch.where(self.valid, slot * tokens + ids % tokens, 0)

    def run(
        self, *, rows: int | None = None, **more: Tensor | str | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Args: rows: what the workspace is made for, by default as many as there are."""
        case = self.case
        room, rows, on = rows or len(case.lengths), len(case.lengths), torch.device(DEVICE)
        tables = self.tables and Tables(
            self.tables.slot_of.to(on), self.tables.generation.to(on), self.tables.fill.to(on), 64
        )
        workspace = AttendWorkspace.make(
            rows=room,
            heads=case.heads,
            value_dim=case.latent,
            device=on,
            dtype=case.dtype,
            parts=case.parts or parts_of(case.heads, on),
        )
        for tensor in workspace[:3]:
            tensor.fill_(2**30 if tensor.dtype == torch.int32 else torch.nan)
        options: dict[str, object] = {
            "lengths": self.lengths.to(on),
            "out": torch.full(
                (rows, case.heads, case.latent), torch.nan, dtype=case.dtype, device=on
            ),
            "lse": torch.full((rows, case.heads), torch.nan, device=on),
            "covered": torch.full((rows, 2), 77, dtype=torch.int32, device=on),
        }
        options |= {k: v.to(on) if isinstance(v, Tensor) else v for k, v in more.items()}
        out, lse, covered = attend(
            self.query.to(on),
            self.stored.to(on),
            self.units.to(on),
            value_dim=case.latent,
            scale=self.scale,
            workspace=workspace,
            unit_tokens=case.unit_tokens,
            tables=tables,
            **options,  # type: ignore[arg-type]
        )
        return out.cpu(), lse.cpu(), covered.cpu()

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.case.latent + self.case.rope)

    def exact(self, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        query = self.query if query is None else query
        parts = [
            reference.attend(
                query[i : i + 1].to(DEVICE).double(),
                self.read[i : i + 1].to(DEVICE),
                self.valid[i : i + 1].to(DEVICE),
                value_dim=self.case.latent,
                scale=self.scale,
            )
            for i in range(len(query))
        ]
        out, lse = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        covered = coverage(self.ids, self.generations, self.valid)
        return out, lse, covered

    def eager(self) -> Tensor:
        """Plain torch in the case's dtype."""
        valid = self.valid.to(DEVICE)
        keys = torch.where(valid[..., None], self.read.to(DEVICE, self.case.dtype), 0)
        scores = self.query.to(DEVICE) @ keys.mT * self.scale
        scores = scores.masked_fill(~valid[:, None], -math.inf)
        shares = torch.nan_to_num(scores.softmax(-1, dtype=torch.float32)).to(self.case.dtype)
        return (shares @ keys[..., : self.case.latent]).cpu()


def agree(inputs: Inputs, got: tuple[Tensor, Tensor, Tensor], query: Tensor | None = None) -> None:
    out, lse, covered = got
    exact_out, exact_lse, exact_covered = inputs.exact(query)
    assert covered.dtype == torch.int32
    assert torch.equal(covered, exact_covered)
    empty = exact_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert torch.all(out[empty] == 0)
    if inputs.case.dtype == torch.float32:
        bound, lse_bound = 1e-5, 1e-5
    else:  # twice what eager torch is off by at most
        bound, lse_bound = max(2 * float(off(inputs.eager(), exact_out).max()), 1e-5), 2e-3
    assert float(off(out, exact_out).max()) <= bound
    torch.testing.assert_close(
        lse[~empty].double(), exact_lse[~empty], rtol=lse_bound, atol=lse_bound
    )


def off(out: Tensor, exact: Tensor) -> Tensor:
    """Relative error of each head of each row, in norm."""
    error: Tensor = (out.double() - exact).norm(dim=-1)
    size: Tensor = exact.norm(dim=-1).clamp(min=1e-9)
    return error / size


SHAPES = [
    Case(heads=1, lengths=(70,)),
    Case(heads=8, lengths=(0, 1, 63, 64, 65), parts=3),
    Case(heads=16, lengths=(5, 130, 0, 200), parts=5, latent=256),
    Case(heads=24, lengths=(64, 0, 0, 70), rope=0, parts=2),
    Case(heads=8, lengths=(3, 5, 1), unit_tokens=16, listed=8, parts=4),
    Case(heads=16, lengths=(200, 40), padding=1.0, parts=3),
    Case(heads=16, lengths=(200, 90, 300), tables=True, parts=4),
    Case(heads=8, lengths=(3, 2, 4), tables=True, unit_tokens=64, parts=4),
    Case(heads=16, lengths=(100, 64), dtype=torch.float16, parts=3),
]
BIG = [
    Case(heads=h, lengths=n, latent=512, dtype=torch.bfloat16, corpus=4096, seed=h, **more)
    for h in (1, 8, 16, 24, 64, 128)
    for n, more in (
        ((0, 1, 63, 64, 65, 2048), {}),
        ((2048,), {}),
        ((0,), {}),
        ((700,) * 40, {"tables": True}),
        ((33, 5) * 20, {"unit_tokens": 64, "listed": 40}),
        ((1500,) * 3, {"codec": "fp8_v32"}),
        (tuple(range(0, 2048, 8)), {}),
    )
] + [
    Case(heads=16, lengths=(200, 300), latent=c, rope=r, dtype=torch.bfloat16)
    for c in (128, 256, 512)
    for r in (0, 64)
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_partials_equal_the_definition(case: Case) -> None:
    inputs = Inputs(case)
    agree(inputs, inputs.run())


@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu, id=str(c)) for c in BIG])
def test_partials_at_full_size(case: Case) -> None:
    inputs = Inputs(case)
    first = inputs.run()
    agree(inputs, first)
    for a, b in zip(first, inputs.run(), strict=True):
        assert torch.equal(a, b)  # the same schedule: the same bits


def test_fp8_rows_are_those_of_the_codec() -> None:
    inputs = Inputs(Case(heads=4, lengths=(70, 20), latent=512, codec="fp8_v32", corpus=128))
    agree(inputs, inputs.run())


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_a_row_can_turn_its_query(pairing: Pairing) -> None:
    case = Case(heads=8, lengths=(70, 64, 3), latent=128, dtype=torch.float32)
    inputs = Inputs(case)
    cos, sin = rope_tables(torch.tensor([-700, 0, 12]), 64, 10000.0, torch.float32)
    got = inputs.run(rotation=torch.cat((cos, sin), 1), pairing=pairing)
    turned = apply_rope(inputs.query[..., 128:], cos, sin, pairing=pairing)
    agree(inputs, got, torch.cat((inputs.query[..., :128], turned), -1))


def test_rows_share_a_query_and_only_used_rows_are_written() -> None:
    inputs = Inputs(Case(heads=8, lengths=(70, 64, 3, 9), parts=3))
    query_of = torch.tensor([1, 1, 0, 3], dtype=torch.int32)
    used = torch.tensor([3], dtype=torch.int32)
    out, lse, covered = inputs.run(query_of=query_of, num_rows=used)
    assert out[3].isnan().all()
    assert lse[3].isnan().all()
    assert covered[3].tolist() == [77, 77]
    exact_out, exact_lse, exact_covered = inputs.exact(inputs.query[query_of.long()])
    assert torch.equal(covered[:3], exact_covered[:3])
    bound = 1e-5
    torch.testing.assert_close(out[:3].double(), exact_out[:3], rtol=bound, atol=bound)
    torch.testing.assert_close(lse[:3].double(), exact_lse[:3], rtol=bound, atol=bound)


def test_lists_without_lengths_and_lengths_out_of_range() -> None:
    inputs = Inputs(Case(heads=8, lengths=(70, 64, 3), parts=3))
    inputs.units[:, :] = torch.where(inputs.ids >= 0, inputs.units, -1)
    out, lse, covered = inputs.run(lengths=torch.tensor([99, 70, 2**31 - 1], dtype=torch.int32))
    agree(inputs, (out, lse, covered))
    without = inputs.run(lengths=None)
    agree(inputs, without)
    none = inputs.run(lengths=torch.tensor([-5, 70, 70], dtype=torch.int32))
    assert none[2][0].tolist() == [0, 0]
    assert bool((none[1][0] == -math.inf).all())


def test_a_workspace_for_more_rows_and_ids_far_beyond_the_tables() -> None:
    inputs = Inputs(Case(heads=8, lengths=(200, 90), tables=True, parts=4))
    far = inputs.units >= 300
    inputs.units[far] = torch.where(torch.arange(int(far.sum())) % 2 == 0, 2**31 - 1, 512).int()
    inputs.valid &= ~far
    agree(inputs, inputs.run(rows=7))


HOPPER = [
    Case(heads=h, lengths=(70, 64, 3, 900), latent=512, dtype=torch.bfloat16, corpus=2048, **more)
    for h in (16, 128)
    for more in ({}, {"tables": True}, {"codec": "fp8_v32"})
]


@pytest.mark.parametrize("case", [pytest.param(c, marks=gpu, id=str(c)) for c in HOPPER])
@pytest.mark.parametrize("pairing", ["interleaved", "half"])
def test_rotation_rows_and_queries_on_hopper(case: Case, pairing: Pairing) -> None:
    inputs = Inputs(case)
    query_of = torch.tensor([1, 1, 0, 3], dtype=torch.int32)
    cos, sin = rope_tables(torch.tensor([-700, 0, 12, 5]), 64, 10000.0, torch.float32)
    out, lse, covered = inputs.run(
        query_of=query_of,
        rotation=torch.cat((cos, sin), 1),
        pairing=pairing,
        num_rows=torch.tensor([3], dtype=torch.int32),
    )
    assert out[3].isnan().all()
    assert covered[3].tolist() == [77, 77]
    chosen = inputs.query[query_of.long()].float()
    turned = apply_rope(chosen[..., 512:], cos, sin, pairing=pairing)
    exact_out, exact_lse, exact_covered = inputs.exact(torch.cat((chosen[..., :512], turned), -1))
    # The turned columns are rounded to bf16 once more, as eager torch's would be.
    assert float(off(out[:3], exact_out[:3]).max()) <= 4 * 2**-8
    torch.testing.assert_close(lse[:3].double(), exact_lse[:3], rtol=1e-2, atol=1e-2)
    assert torch.equal(covered[:3], exact_covered[:3])


_ZEROS = torch.zeros(2, dtype=torch.int32)
TWO_SLOTS = Tables(_ZEROS, _ZEROS, _ZEROS, block_tokens=64)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"units": torch.zeros(2, 4, dtype=torch.int64)}, "units must be"),
        ({"units": torch.zeros(2, 0, dtype=torch.int32)}, "at least 1"),
        ({"units": torch.zeros(3, 4, dtype=torch.int32)}, "made for 2 parts and 2 rows, got 3"),
        ({"query": torch.zeros(3, 8, 192)}, "2 rows need as many queries"),
        ({"query": torch.zeros(2, 129, 192)}, "1 to 128 heads.*got 129"),
        ({"query": torch.zeros(2, 8, 160)}, "rope columns, got 8, 128 and 32"),
        ({"query": torch.zeros(2, 8, 192, dtype=torch.float64)}, "got torch.float64"),
        ({"query": torch.zeros(2, 192, 8).mT}, "contiguous"),
        ({"entries": torch.zeros(9, 192, dtype=torch.float16)}, "entries must be"),
        ({"entries": torch.zeros(9, 656, dtype=torch.uint8)}, "fp8 rows need 512"),
        ({"unit_tokens": 3}, "power of two up to 64, got 3"),
        ({"unit_tokens": 128}, "power of two up to 64, got 128"),
        ({"entries": torch.zeros(9 * 192 + 1)[1:].view(9, 192)}, "multiples of 16 bytes"),
        ({"tables": TWO_SLOTS}, "9 entries hold, got 2 and 2"),
        (
            {"checked": True, "units": torch.full((2, 4), 9, dtype=torch.int32)},
            "units must be below 9",
        ),
        (
            {"checked": True, "query_of": torch.tensor([0, 2], dtype=torch.int32)},
            "query_of must be below 2, got 2",
        ),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, "lengths must be"),
        ({"rotation": torch.zeros(2, 64), "pairing": "both"}, "interleaved or half"),
    ],
)
def test_the_door(change: dict[str, object], match: str) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(2, 8, 192),
        "entries": torch.zeros(9, 192),
        "units": torch.zeros(2, 4, dtype=torch.int32),
        "value_dim": 128,
        "scale": 1.0,
        "workspace": AttendWorkspace.make(
            rows=2, heads=8, value_dim=128, device="cpu", parts=2, dtype=torch.float32
        ),
    }
    with pytest.raises(ValueError, match=match):
        attend(**(arguments | change))  # type: ignore[arg-type]
