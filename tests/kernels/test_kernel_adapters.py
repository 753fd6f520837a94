"""Adapters of other libraries' attention: their LSE conventions end at the border.

Without a GPU the libraries are stand-ins that compute in plain torch with the conventions of the
real ones: FlashInfer base 2 unless told otherwise, FlashMLA +inf for an empty row.
"""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qroam.kernels import reference
from qroam.kernels.library import flashinfer, flashmla
from qroam.partition.codec import make_codec

C, R, D = 512, 64, 576
SCALE = 192**-0.5
FP8 = make_codec("fp8_v32", dim=D, rope_dim=R)


def exact(
    query: Tensor, entries: Tensor, units: Tensor, unit_tokens: int = 1
) -> tuple[Tensor, Tensor]:
    """`reference.attend` over (M, E) listed units, in fp64 for an fp64 query."""
    ids = units[..., None] + torch.arange(unit_tokens, device=units.device)
    ids = torch.where(units[..., None] >= 0, ids, -1).flatten(1).long()
    rows = entries[ids.clamp(min=0)]
    return reference.attend(query, rows, ids >= 0, value_dim=C, scale=SCALE)


def lists(rows: int, columns: int, num_units: int, *, seed: int = 0) -> Tensor:
    """(rows, columns) int32 distinct units, -1 anywhere; full, partly filled and empty rows."""
    g = torch.Generator().manual_seed(seed)
    units = torch.stack([torch.randperm(num_units, generator=g)[:columns] for _ in range(rows)])
    chance = torch.tensor([1.0, 0.6, 0.0]).repeat(rows)[:rows, None]
    return torch.where(torch.rand(rows, columns, generator=g) < chance, units, -1).to(torch.int32)


def case(
    rows: int, heads: int, columns: int, *, unit_tokens: int = 1, stored: int = 256, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """query (M, H, 576), entries (S, 576), both bf16, and units; what is not listed is NaN."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, D, generator=g).to(torch.bfloat16)
    entries = torch.randn(stored, D, generator=g).to(torch.bfloat16)
    units = lists(rows, columns, stored // unit_tokens, seed=seed)
    units = torch.where(units >= 0, units * unit_tokens, -1)
    used = torch.zeros(stored, dtype=torch.bool)
    for first in units[units >= 0].tolist():
        used[first : first + unit_tokens] = True
    entries[~used] = torch.nan
    return query, entries, units


class FakeWrapper:
    """FlashInfer's MLA wrapper as its 0.6 documentation tells it."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: Tensor | None = None,
        kv_indptr: Tensor | None = None,
        kv_indices: Tensor | None = None,
        kv_len_arr: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        assert float_workspace_buffer.dim() == 1
        assert backend in ("fa2", "fa3")
        assert use_cuda_graph
        assert kv_indices is not None
        self.pages = kv_indices

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_len_arr: Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        host = (qo_indptr, kv_indptr, kv_indices, kv_len_arr)
        assert all(tensor.dtype == torch.int32 for tensor in host)
        assert qo_indptr.tolist() == list(range(len(kv_len_arr) + 1))
        assert (head_dim_ckv, head_dim_kpe) == (C, R)
        assert not causal
        assert q_data_type == kv_data_type == torch.bfloat16
        self.pages[: len(kv_indices)].copy_(kv_indices)
        self.ends, self.lengths = kv_indptr.tolist(), kv_len_arr.tolist()
        self.page_size, self.scale, self.heads = page_size, sm_scale, num_heads

    def run(
        self,
        q_nope: Tensor,
        q_pe: Tensor,
        ckv_cache: Tensor,
        kpe_cache: Tensor,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        return_lse_base_on_e: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        assert q_nope.shape == (len(self.lengths), self.heads, C)
        assert ckv_cache.shape[1:] == (self.page_size, C)
        outs = torch.empty(q_nope.shape, dtype=q_nope.dtype) if out is None else out
        lses = torch.empty(q_nope.shape[:2]) if lse is None else lse
        query = torch.cat((q_nope, q_pe), dim=2)
        for row, length in enumerate(self.lengths):
            pages = self.pages[self.ends[row] : self.ends[row + 1]].long()
            assert len(pages) == -(-length // self.page_size)
            stored = torch.cat((ckv_cache[pages], kpe_cache[pages]), dim=2).flatten(0, 1)[:length]
            got = reference.attend(
                query[row : row + 1],
                stored[None],
                torch.ones(1, length, dtype=torch.bool),
                value_dim=C,
                scale=self.scale,
            )
            outs[row], lses[row] = got[0][0].to(outs.dtype), got[1][0]
        if not return_lse_base_on_e:
            lses.mul_(1 / math.log(2))
        return outs, lses


@pytest.fixture
def fake_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flashinfer.mla")
    module.BatchMLAPagedAttentionWrapper = FakeWrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.mla", module)
    monkeypatch.setattr(flashinfer, "_capability", lambda device: (9, 0))


def fake_sparse(query: Tensor, rows: Tensor, lists: Tensor, scale: float) -> Any:
    """FlashMLA's sparse decode kernel: (out, lse) of (M, H, 576) over (S, 576)."""
    assert query.dtype == torch.bfloat16
    assert query.shape[1] in (64, 128)
    assert lists.dtype == torch.int32
    assert lists.shape[1] > 0
    assert lists.shape[1] % 64 == 0
    valid = (lists >= 0) & (lists < len(rows))
    chosen = rows[torch.where(valid, lists, 0).long()]
    out, lse = reference.attend(query, chosen, valid, value_dim=C, scale=scale)
    return out.to(query.dtype), torch.where(lse == -torch.inf, torch.inf, lse)


@pytest.fixture
def fake_flashmla(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_mla_metadata() -> tuple[object, None]:
        return SimpleNamespace(used=0), None

    def flash_mla_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        block_table: None,
        cache_seqlens: None,
        head_dim_v: int,
        tile_scheduler_metadata: Any,
        num_splits: None = None,
        softmax_scale: float | None = None,
        is_fp8_kvcache: bool = False,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        assert block_table is None
        assert cache_seqlens is None
        assert is_fp8_kvcache
        assert head_dim_v == C
        assert indices is not None
        assert softmax_scale is not None
        assert k_cache.shape[2:] == (1, 656)
        tile_scheduler_metadata.used += 1
        rows = FP8.decode(k_cache.view(-1, 656), torch.float32)
        out, lse = fake_sparse(q[:, 0], rows, indices[:, 0], softmax_scale)
        return out[:, None], lse[..., None]

    module = ModuleType("flash_mla")
    module.get_mla_metadata = get_mla_metadata  # type: ignore[attr-defined]
    module.flash_mla_with_kvcache = flash_mla_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_mla", module)


def assert_near(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], units: Tensor) -> None:
    """bf16 out, natural-log lse, and rows without units exactly empty."""
    out, lse = found[0].double(), found[1].double()
    empty = (units < 0).all(1)
    assert bool(empty.any()) or len(units) == 1
    assert bool((found[0][empty] == 0).all())
    assert bool((found[1][empty] == -torch.inf).all())
    # In norm: twice 2 ** -9, what eager torch's bf16 is off by on such numbers.
    assert float((out - want[0]).norm()) <= 2 * 2**-9 * float(want[0].norm())
    torch.testing.assert_close(lse, want[1].double(), rtol=1e-4, atol=2e-3)


@pytest.mark.usefixtures("fake_flashinfer")
@pytest.mark.parametrize("unit_tokens", [1, 4])
def test_flashinfer_attends_over_lists_with_holes(unit_tokens: int) -> None:
    query, entries, units = case(6, 16, 9, unit_tokens=unit_tokens)
    found = flashinfer.attend(
        query,
        entries,
        units,
        (units >= 0).sum(1).tolist(),
        value_dim=C,
        scale=SCALE,
        unit_tokens=unit_tokens,
    )
    assert_near(found, exact(query.double(), entries.double(), units, unit_tokens), units)


@pytest.mark.usefixtures("fake_flashinfer")
def test_a_flashinfer_plan_holds_for_other_pages() -> None:
    query, entries, units = case(3, 16, 4, unit_tokens=4)
    planned = flashinfer.FlashInferAttend(
        rows=3, num_pages=6, num_heads=16, value_dim=C, rope_dim=R, scale=SCALE,
        dtype=torch.bfloat16, device="cpu", page_tokens=4,
    )  # fmt: skip
    planned.plan([16, 8, 0])
    entries = torch.nan_to_num(entries)
    out, lse = torch.full((3, 16, C), torch.nan, dtype=torch.bfloat16), torch.full((3, 16), 7.0)
    for pages in ([3, 1, 4, 15, 9, 2], [6, 5, 35, 8, 9, 7]):
        planned.pages.copy_(torch.tensor(pages))
        found = planned.run(query, entries, out=out, lse=lse)
        assert found[0] is out
        assert found[1] is lse
        units = torch.tensor([pages[:4], [*pages[4:], -1, -1], [-1] * 4], dtype=torch.int32)
        units = torch.where(units >= 0, units * 4, -1)
        assert_near(found, exact(query.double(), entries.double(), units, 4), units)
    for lengths in ([16, 8], [16, 9, 0]):
        with pytest.raises(ValueError, match="planned for 3 rows of together 6 pages"):
            planned.plan(lengths)
    for wrong in ((query[:2], entries), (query, entries[:-1])):
        with pytest.raises(ValueError, match="S a multiple of 4"):
            planned.run(*wrong)
    with pytest.raises(ValueError, match=r"needs torch\.bfloat16"):
        planned.run(query, entries.float())


@pytest.mark.usefixtures("fake_flashmla")
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("unit_tokens", [1, 4])
def test_flashmla_attends_over_lists_with_holes(heads: int, unit_tokens: int) -> None:
    query, entries, units = case(3, heads, 9, unit_tokens=unit_tokens, stored=128)
    rows = FP8.encode(torch.nan_to_num(entries))
    decoded = FP8.decode(rows, torch.float32)
    found = flashmla.attend(query, rows, units, value_dim=C, scale=SCALE, unit_tokens=unit_tokens)
    assert_near(found, exact(query.double(), decoded.double(), units, unit_tokens), units)


@pytest.mark.usefixtures("fake_flashmla")
def test_flashmla_keeps_to_device_side_lengths_and_its_schedule() -> None:
    query, entries, units = case(3, 64, 9, stored=128)
    lengths = torch.tensor([0, 3, 9], dtype=torch.int32)
    used = torch.where(torch.arange(9) < lengths[:, None], units, -1)
    rows = FP8.encode(torch.nan_to_num(entries))
    schedule = flashmla.new_schedule()
    for _ in range(2):
        found = flashmla.attend(
            query, rows, units, value_dim=C, scale=SCALE, lengths=lengths, schedule=schedule
        )
        assert_near(found, exact(query.double(), FP8.decode(rows, torch.float64), used), used)
    assert schedule.used == 2


@pytest.mark.usefixtures("fake_flashinfer", "fake_flashmla")
@pytest.mark.parametrize("library", ["flashinfer", "flashmla"])
def test_partials_of_sums_two_and_eight_merge_to_four_fifths(library: str) -> None:
    """Equal logits, 2 entries of value 0 and 8 of value 1: a base-2 LSE taken for a natural one, or
    the other way round, merges to 0.88 or 0.72. A third, empty partial must change nothing."""
    query = torch.zeros(3, 64, D, dtype=torch.bfloat16)
    entries = torch.zeros(64, D, dtype=torch.bfloat16)
    entries[2:] = 1.0
    units = torch.full((3, 8), -1, dtype=torch.int32)
    units[0, [1, 4]] = torch.tensor([0, 1], dtype=torch.int32)
    units[1] = torch.arange(2, 10, dtype=torch.int32)
    if library == "flashinfer":
        out, lse = flashinfer.attend(query, entries, units, [2, 8, 0], value_dim=C, scale=SCALE)
    else:
        rows = FP8.encode(entries)
        out, lse = flashmla.attend(query, rows, units, value_dim=C, scale=SCALE)
    torch.testing.assert_close(lse[:2, 0], torch.tensor([2.0, 8.0]).log())
    merged, total = reference.merge(out.float(), lse, torch.zeros(3, dtype=torch.int64), 1)
    torch.testing.assert_close(merged, torch.full_like(merged, 0.8))
    torch.testing.assert_close(total, torch.full_like(total, math.log(10)))


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    query, entries, units = case(3, 64, 4)
    for name in ("flashinfer.mla", "flash_mla", "sgl_kernel.flash_mla"):
        monkeypatch.setitem(sys.modules, name, None)
    lengths = (units >= 0).sum(1).tolist()
    with pytest.raises(RuntimeError, match="FlashInfer cannot be imported"):
        flashinfer.attend(query, entries, units, lengths, value_dim=C, scale=SCALE)
    rows = torch.zeros(64, 656, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"FlashMLA cannot be imported: flash_mla: .*sgl_kernel"):
        flashmla.attend(query, rows, units, value_dim=C, scale=SCALE)


@pytest.mark.usefixtures("fake_flashinfer")
def test_flashinfer_names_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    query, entries, units = case(3, 16, 4)
    lengths = (units >= 0).sum(1).tolist()

    def run(query: Tensor = query, lengths: list[int] = lengths, **changed: Any) -> None:
        given = {"entries": entries, "units": units, "value_dim": C, "scale": SCALE, **changed}
        flashinfer.attend(query, lengths=lengths, **given)

    run()
    with pytest.raises(ValueError, match="lengths must be those of units"):
        run(lengths=[4, 4, 4])
    with pytest.raises(ValueError, match="int32"):
        run(units=units.long())
    with pytest.raises(ValueError, match="contiguous"):
        run(query=query.transpose(0, 1))
    with pytest.raises(RuntimeError, match="got 256 and 320"):
        run(value_dim=256)
    with pytest.raises(RuntimeError, match="float32"):
        run(query=query.float())
    with pytest.raises(RuntimeError, match="fp8"):
        run(entries=torch.zeros(64, 656, dtype=torch.uint8))
    monkeypatch.setattr(flashinfer, "_capability", lambda device: (8, 0))
    with pytest.raises(RuntimeError, match=r"fa3 does not run on cpu \(\(8, 0\)\)"):
        run()
    run(backend="fa2")


@pytest.mark.usefixtures("fake_flashmla")
def test_flashmla_names_what_it_cannot_do() -> None:
    query, entries, units = case(3, 64, 4)
    rows = FP8.encode(torch.nan_to_num(entries))

    def run(query: Tensor = query, **changed: Any) -> None:
        given = {"entries": rows, "units": units, "value_dim": C, "scale": SCALE, **changed}
        flashmla.attend(query, **given)

    run()
    with pytest.raises(ValueError, match="int32"):
        run(units=units.long())
    with pytest.raises(ValueError, match="contiguous"):
        run(entries=rows.T)
    with pytest.raises(RuntimeError, match=r"\(64, 128\) heads"):
        run(query=query[:, :16].contiguous())
    with pytest.raises(RuntimeError, match="bfloat16"):
        run(query=query.half())
    with pytest.raises(RuntimeError, match="value columns"):
        run(value_dim=256)
    for wrong in (torch.zeros(65, 656, dtype=torch.uint8), torch.zeros(64, 576)):
        with pytest.raises(RuntimeError, match="multiple of 64"):
            run(entries=wrong)


def needs(library: str) -> None:
    try:
        importlib.import_module(library)
    except (ImportError, OSError) as error:
        pytest.skip(f"needs {library}: {error}")


def on_gpu(query: Tensor, entries: Tensor, units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.cuda(), entries.cuda(), units.cuda()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["fa3", "fa2"])
@pytest.mark.parametrize(("rows", "heads", "columns"), [(1, 128, 300), (3, 128, 65), (9, 16, 300)])
def test_real_flashinfer(backend: flashinfer.Backend, rows: int, heads: int, columns: int) -> None:
    needs("flashinfer.mla")
    query, entries, units = on_gpu(*case(rows, heads, columns, stored=512))
    lengths = (units >= 0).sum(1).tolist()
    found = flashinfer.attend(
        query, entries, units, lengths, value_dim=C, scale=SCALE, backend=backend
    )
    assert_near(found, exact(query.double(), entries.double(), units), units)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads", [64, 128])
def test_real_flashmla(heads: int) -> None:
    try:
        flashmla.new_schedule()
    except RuntimeError as error:
        pytest.skip(str(error))
    query, entries, units = on_gpu(*case(3, heads, 300, stored=512))
    rows = FP8.encode(torch.nan_to_num(entries))
    decoded = FP8.decode(rows, torch.float32)
    found = flashmla.attend(query, rows, units, value_dim=C, scale=SCALE)
    assert_near(found, exact(query.double(), decoded.double(), units), units)
