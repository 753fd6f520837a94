"""Partial attention over listed entries of a block pool: launcher, portable kernel, combine.

Letters: M rows of work (a query and a list of units), H heads, C value (latent) columns, R rope
columns, E list columns, U entries of a unit, B entries of a block. Entries are C + R columns wide;
keys are all of them, values the first C.

The tiles of all rows, 64 entries each, form one sequence that is cut evenly over the parts, about
one part an SM, so rows of any length balance. A row that lies in one part is finished there; of a
row that is cut, every part leaves a partial in the workspace, and `_combine` merges them. All
counts stay on the device.

`attend_sm90.py` has the sm_90 kernel, of the same schedule; the one here runs wherever Triton does, and
in its interpreter.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attend_sm90
from .checks import check_ids, check_tensor
from .limits import (
    FP8_LATENT,
    FP8_ROPE,
    FP8_ROW_BYTES,
    LATENTS,
    MAX_ATTEND_ROWS,
    MAX_HEADS,
    ROPES,
)
from .mix import mix_of

TILE = 64
Pairing = Literal["interleaved", "half"]
_LN2 = tl.constexpr(0.6931471805599453)
_LOG2E = 1.4426950408889634


class Tables(NamedTuple):
    """Where stored ids are: one layer's tables of the block pool.

    slot_of: (keys,) int32, -1 where a block is not here. generation, fill: (slots,) int32, of the
    block in a slot, and how many of its entries are written.
    """

    slot_of: Tensor
    generation: Tensor
    fill: Tensor
    block_tokens: int


class AttendWorkspace(NamedTuple):
    """What the kernels leave for one another: made once, for one launch at a time.

    out (parts, 2, H, C) of the query's dtype, lse (parts, 2, H) fp32 and covered (parts, 2, 2)
    int32: of the row that a part inherits (0) and of the one that it passes on (1). first_tile
    (M + 2,) int32: where the tiles of each row begin; then their number, and how many make a part.
    """

    out: Tensor
    lse: Tensor
    covered: Tensor
    first_tile: Tensor

    @staticmethod
    def make(
        *,
        rows: int,
        heads: int,
        value_dim: int,
        parts: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> AttendWorkspace:
        """For up to `rows` rows of queries of `dtype`; `parts_of` fills a device."""
        return AttendWorkspace(
            out=torch.empty(parts, 2, heads, value_dim, dtype=dtype, device=device),
            lse=torch.empty(parts, 2, heads, dtype=torch.float32, device=device),
            covered=torch.empty(parts, 2, 2, dtype=torch.int32, device=device),
            first_tile=torch.empty(rows + 2, dtype=torch.int32, device=device),
        )


def parts_of(heads: int, device: torch.device | str) -> int:
    """How many parts fill the device: its SMs, shared by the groups of 64 heads."""
    device = torch.device(device)
    if device.type != "cuda":
        return 2
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return int(sms) // -(-heads // attend_sm90.HEADS)


def attend(
    query: Tensor,
    entries: Tensor,
    units: Tensor,
    *,
    value_dim: int,
    scale: float,
    workspace: AttendWorkspace,
    unit_tokens: int = 1,
    lengths: Tensor | None = None,
    num_rows: Tensor | None = None,
    query_of: Tensor | None = None,
    tables: Tables | None = None,
    rotation: Tensor | None = None,
    pairing: Pairing = "interleaved",
    out: Tensor | None = None,
    lse: Tensor | None = None,
    covered: Tensor | None = None,
    combined: bool = True,
    checked: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row over its own listed units: `reference.attend`, and `coverage.coverage`.

    Args:
        query: (N, H, C + R), bf16 (fp16 or fp32 on the portable kernel), rope applied.
        entries: (S, C + R) of the query's dtype, or (S, 656) uint8, `fp8_v32` rows.
        units: (M, E) int32, the first entry of each unit: an index into `entries`, or with `tables`
            a stored id. -1 is padding, anywhere. What is not here adds nothing.
        value_dim: C, 128, 256 or 512; R is 0 or 64.
        lengths: (M,) int32, list columns in use. num_rows: (1,) int32, rows in use; what lies
            beyond may hold anything, and its results are not written.
        query_of: (M,) int32, the query of each row; by default its own.
        rotation: (M, R) fp32, cos then sin of R / 2 angles by which a row's query is turned.
        out, lse, covered: where to write, instead of new tensors.
        combined: without it a row that was cut stays in the workspace, see `roles.py`, and nothing
            of it is in the results: for a kernel that merges more than its parts.
        checked: read `units` and `query_of` back and refuse ids that are out of range.
    Returns:
        out: (M, H, C) in the query's dtype, 0 for an empty row.
        lse: (M, H) fp32, natural log of sum(exp(scale * q.k)), -inf for an empty row.
        covered: (M, 2) int32, the entries that went in and the sum of their `mix`.
    Raises:
        ValueError: naming what does not fit. Unless `checked`, no value on the device is read, and
            an id out of range reads anywhere.
    """
    rows, heads, rope_dim, is_fp8 = _check(query, entries, units, value_dim, unit_tokens, workspace)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    device = query.device
    optional = (
        ("lengths", lengths, (rows,), torch.int32),
        ("num_rows", num_rows, (1,), torch.int32),
        ("query_of", query_of, (rows,), torch.int32),
        ("rotation", rotation, (rows, rope_dim), torch.float32),
        ("out", out, (rows, heads, value_dim), query.dtype),
        ("lse", lse, (rows, heads), torch.float32),
        ("covered", covered, (rows, 2), torch.int32),
    )
    for name, tensor, shape, dtype in optional:
        if tensor is not None:
            check_tensor(tensor, name, shape, dtype, device)
    if query_of is None and len(query) != rows:
        raise ValueError(f"{rows} rows need as many queries or `query_of`, got {len(query)}")
    if rotation is not None and (rope_dim == 0 or pairing not in ("interleaved", "half")):
        raise ValueError(
            f"rotation needs rope columns and pairing interleaved or half, got {pairing!r}"
        )
    if tables is not None:
        for name in ("slot_of", "generation", "fill"):
            check_tensor(getattr(tables, name), name, (None,), torch.int32, device)
        slots, block_tokens = len(tables.fill), tables.block_tokens
        if block_tokens < 1 or block_tokens % unit_tokens:
            raise ValueError(
                f"unit_tokens must divide block_tokens {block_tokens}, got {unit_tokens}"
            )
        if len(tables.generation) != slots or slots * block_tokens > len(entries):
            raise ValueError(
                f"generation and fill must be of as many slots, {block_tokens} entries each, as the "
                f"{len(entries)} entries hold, got {len(tables.generation)} and {slots}"
            )
    if out is None:
        out = torch.empty(rows, heads, value_dim, dtype=query.dtype, device=device)
    if lse is None:
        lse = torch.empty(rows, heads, dtype=torch.float32, device=device)
    if covered is None:
        covered = torch.empty(rows, 2, dtype=torch.int32, device=device)
    if checked:
        stored = len(entries) if tables is None else len(tables.slot_of) * tables.block_tokens
        check_ids(units, "units", stored - unit_tokens + 1)
        if query_of is not None:
            check_ids(query_of, "query_of", len(query))
    if rows == 0:
        return out, lse, covered

    parts = len(workspace.out)
    on_hopper = (
        query.is_cuda
        and query.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) == (9, 0)
    )
    nothing = units  # what a switched-off pointer points to
    arguments = {
        "query": query,
        "entries": entries,
        "units": units,
        "lengths": nothing if lengths is None else lengths,
        "num_rows": nothing if num_rows is None else num_rows,
        "query_of": nothing if query_of is None else query_of,
        "slot_of": nothing if tables is None else tables.slot_of,
        "generation": nothing if tables is None else tables.generation,
        "fill": nothing if tables is None else tables.fill,
        "rotation": nothing if rotation is None else rotation,
        "out": out,
        "lse": lse,
        "covered": covered,
        "w_out": workspace.out,
        "w_lse": workspace.lse,
        "w_covered": workspace.covered,
        "first_tile": workspace.first_tile,
        "M": rows,
        "num_keys": 0 if tables is None else len(tables.slot_of),
        "scale_log2": scale * _LOG2E,
        "H": heads,
        "C": value_dim,
        "R": rope_dim,
        "E": units.shape[1],
        "U": unit_tokens,
        "B": 1 if tables is None else tables.block_tokens,
        "PARTS": parts,
        "MP": triton.next_power_of_2(max(rows, 16)),
        "FP8": is_fp8,
        "HAS_LENGTHS": lengths is not None,
        "HAS_NUM_ROWS": num_rows is not None,
        "HAS_QUERY_OF": query_of is not None,
        "HAS_TABLES": tables is not None,
        "ROTATE": "none" if rotation is None else pairing,
    }
    if on_hopper:
        words = (torch.bfloat16, torch.float32) if is_fp8 else (entries.dtype, entries.dtype)
        attend_sm90.launch(
            **arguments, entry_ropes=entries.view(words[0]), entry_scales=entries.view(words[1]),
            COMBINED=combined,
        )  # fmt: skip
    else:
        group = 32 if heads > 16 else 16
        wide = query.dtype == torch.float32  # two stages of it would not fit into shared memory
        _attend[(parts * -(-heads // group),)](
            **arguments,
            HEADS=group,
            TILE=TILE // 2 if wide else TILE,
            num_warps=2 * group // 8,
            num_stages=1 if wide else 2,
        )
    if not combined:
        return out, lse, covered
    # On Hopper the merge is launched while the attention ends, and waits for its results itself.
    early = {"launch_pdl": True} if on_hopper else {}
    group = max(min(rows * heads // 1024, 8), 1)
    _combine[(rows, triton.cdiv(heads, group))](
        out, lse, covered, workspace.out, workspace.lse, workspace.covered, workspace.first_tile,
        rows, H=heads, C=value_dim, GROUP=group, CHUNK=8, PARTS=parts,
        PP=triton.next_power_of_2(parts), EARLY=on_hopper, num_warps=value_dim // 256 or 1, **early,
    )  # fmt: skip
    return out, lse, covered


@triton.jit
def _num_tiles(units, U: tl.constexpr, TILE: tl.constexpr):
    return tl.maximum((units * U + TILE - 1) // TILE, 1)


@triton.jit
def _e4m3(codes):
    """Exact: the code's exponent and mantissa as those of an fp32, its bias made up for."""
    code = codes.to(tl.int32)
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _attend(
    query, entries, units, lengths, num_rows, query_of, slot_of, generation, fill, rotation,
    out, lse, covered, w_out, w_lse, w_covered, first_tile,
    M, num_keys, scale_log2,
    H: tl.constexpr, C: tl.constexpr, R: tl.constexpr, E: tl.constexpr, U: tl.constexpr,
    B: tl.constexpr, PARTS: tl.constexpr, MP: tl.constexpr, FP8: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, HAS_NUM_ROWS: tl.constexpr, HAS_QUERY_OF: tl.constexpr,
    HAS_TABLES: tl.constexpr, ROTATE: tl.constexpr,
    HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    GROUPS: tl.constexpr = (H + HEADS - 1) // HEADS
    part = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    dtype = query.dtype.element_ty

    rows = tl.arange(0, MP)
    used = M
    if HAS_NUM_ROWS:
        used = tl.minimum(M, tl.load(num_rows))
    listed = tl.full([MP], E, tl.int32)
    if HAS_LENGTHS:
        listed = tl.load(lengths + rows, mask=rows < used, other=0)
        listed = tl.minimum(tl.maximum(listed, 0), E)
    tiles = tl.where(rows < used, _num_tiles(listed, U, TILE), 0)
    ends = tl.cumsum(tiles, 0)
    all_tiles = tl.sum(tiles, 0)
    chunk = tl.maximum((all_tiles + PARTS - 1) // PARTS, 1)
    if tl.program_id(0) == 0:
        tl.store(first_tile + rows, ends - tiles, mask=rows < M)
        tl.store(first_tile + M, all_tiles)
        tl.store(first_tile + M + 1, chunk)
    begin = part * chunk
    end = tl.minimum(begin + chunk, all_tiles)
    row = tl.sum((ends <= begin).to(tl.int32), 0)
    first = tl.max(tl.where(ends <= begin, ends, 0), 0)

    heads = group * HEADS + tl.arange(0, HEADS)
    is_head = heads < H
    c_cols = tl.arange(0, C)
    r_cols = tl.arange(0, R if R > 0 else 16)
    at = tl.arange(0, TILE)
    tile = begin
    while tile < end:
        listed_here = E
        if HAS_LENGTHS:
            listed_here = tl.minimum(tl.maximum(tl.load(lengths + row), 0), E)
        row_tiles = _num_tiles(listed_here, U, TILE)
        stop = tl.minimum(first + row_tiles, end)
        source = row
        if HAS_QUERY_OF:
            source = tl.load(query_of + row)
        q_at = query + source.to(tl.int64) * H * (C + R) + heads[:, None] * (C + R)
        q_c = tl.load(q_at + c_cols[None, :], mask=is_head[:, None], other=0.0)
        if R > 0:
            q_r = tl.load(q_at + C + r_cols[None, :], mask=is_head[:, None], other=0.0)
            if ROTATE != "none":
                if ROTATE == "interleaved":
                    partner = r_cols ^ 1
                    angle = r_cols // 2
                    sign = tl.where(r_cols % 2 == 0, -1.0, 1.0)
                else:
                    partner = (r_cols + R // 2) % R
                    angle = r_cols % (R // 2)
                    sign = tl.where(r_cols < R // 2, -1.0, 1.0)
                turned = tl.load(q_at + C + partner[None, :], mask=is_head[:, None], other=0.0)
                cos = tl.load(rotation + row * R + angle)
                sin = tl.load(rotation + row * R + R // 2 + angle) * sign
                q_r = (q_r.to(tl.float32) * cos + turned.to(tl.float32) * sin).to(dtype)

        top = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        acc = tl.zeros([HEADS, C], tl.float32)
        number = tl.zeros([TILE], tl.int32)
        mixed = tl.zeros([TILE], tl.uint32)
        for t in range(tile - first, stop - first):
            place = t * TILE + at
            unit = tl.load(
                units + row.to(tl.int64) * E + place // U, mask=place // U < listed_here, other=-1
            )
            ids = unit + place % U
            valid = unit >= 0
            gens = tl.zeros([TILE], tl.int32)
            index = tl.where(valid, ids, 0)
            if HAS_TABLES:
                offset = index % B
                valid = valid & (index >= 0) & (index // B < num_keys)
                slot = tl.load(slot_of + index // B, mask=valid, other=-1)
                valid = valid & (slot >= 0)
                gens = tl.load(generation + slot, mask=valid, other=0)
                valid = valid & (offset < tl.load(fill + slot, mask=valid, other=0))
                index = slot * B + offset
            number += valid.to(tl.int32)
            mixed += tl.where(valid, mix_of(ids, gens), 0)

            here = valid[:, None]
            wide = index.to(tl.int64)[:, None]
            if FP8:
                row_at = entries + wide * (C + C // 32 + 2 * R)
                scale_at = (row_at + C).to(tl.pointer_type(tl.float32))
                scales = tl.load(scale_at + c_cols[None, :] // 128, mask=here, other=0.0)
                k_c = _e4m3(tl.load(row_at + c_cols[None, :], mask=here, other=0)) * scales
                k_c = k_c.to(dtype)
                rope_at = (row_at + C + C // 32).to(tl.pointer_type(tl.bfloat16))
            else:
                k_c = tl.load(entries + wide * (C + R) + c_cols[None, :], mask=here, other=0.0)
                rope_at = entries + wide * (C + R) + C
            scores = tl.dot(q_c, tl.trans(k_c), input_precision="ieee")
            if R > 0:
                k_r = tl.load(rope_at + r_cols[None, :], mask=here, other=0.0).to(dtype)
                scores = tl.dot(q_r, tl.trans(k_r), scores, input_precision="ieee")
            scores = tl.where(valid[None, :], scores * scale_log2, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            shares = tl.exp2(scores - safe[:, None])
            decay = tl.exp2(top - safe)
            total = total * decay + tl.sum(shares, 1)
            acc = tl.dot(shares.to(dtype), k_c, acc * decay[:, None], input_precision="ieee")
            top = new_top

        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        base = tl.where(top == float("-inf"), 0.0, top)
        row_lse = (base + tl.log2(total)) * _LN2
        o_at = heads[:, None] * C + c_cols[None, :]
        count = tl.sum(number, 0)
        mix = tl.sum(mixed, 0).to(tl.int32)
        if (first >= begin) & (first + row_tiles <= end):
            o_row = out + row.to(tl.int64) * H * C
            tl.store(o_row + o_at, result.to(dtype), mask=is_head[:, None])
            tl.store(lse + row * H + heads, row_lse, mask=is_head)
            if group == 0:
                tl.store(covered + row * 2, count)
                tl.store(covered + row * 2 + 1, mix)
        else:
            seat = part * 2 + (first >= begin).to(tl.int32)
            w_row = w_out + seat.to(tl.int64) * H * C
            tl.store(w_row + o_at, result.to(w_out.dtype.element_ty), mask=is_head[:, None])
            tl.store(w_lse + seat * H + heads, row_lse, mask=is_head)
            if group == 0:
                tl.store(w_covered + seat * 2, count)
                tl.store(w_covered + seat * 2 + 1, mix)
        tile = stop
        first += row_tiles
        row += 1


@triton.jit
def _combine(
    out, lse, covered, w_out, w_lse, w_covered, first_tile, M,
    H: tl.constexpr, C: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, PP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the partials of a row that was cut; program (row, group of heads)."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    chunk = tl.load(first_tile + M + 1)
    begin = tl.load(first_tile + row)
    end = tl.load(first_tile + row + 1)
    part = begin // chunk
    partials = (end - 1) // chunk - part + 1
    if (end > begin) & (partials > 1):
        every = tl.arange(0, PP)
        seats = (part + every) * 2 + (every == 0).to(tl.int32)
        cols = tl.arange(0, C)
        some = tl.arange(0, CHUNK)
        first_head = tl.program_id(1) * GROUP
        for head in range(first_head, tl.minimum(first_head + GROUP, H)):
            lses = tl.load(w_lse + seats * H + head, mask=every < partials, other=float("-inf"))
            top = tl.max(lses, 0)
            safe = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp(lses - safe), 0)
            acc = tl.zeros([C], tl.float32)
            for i in range(0, partials, CHUNK):
                j = i + some
                at = ((part + j) * 2 + (j == 0).to(tl.int32)) * H + head
                share = tl.exp(tl.load(w_lse + at, mask=j < partials, other=float("-inf")) - safe)
                value = tl.load(
                    w_out + at.to(tl.int64)[:, None] * C + cols[None, :],
                    mask=(j < partials)[:, None], other=0.0,
                ).to(tl.float32)  # fmt: skip
                weighted = tl.where(share[:, None] == 0.0, 0.0, value * share[:, None])
                acc += tl.sum(weighted, 0)
            acc /= tl.where(total == 0.0, 1.0, total)
            at_row = row.to(tl.int64) * H + head
            tl.store(out + at_row * C + cols, acc.to(out.dtype.element_ty))
            tl.store(lse + at_row, safe + tl.log(total))
        if tl.program_id(1) == 0:
            both = tl.arange(0, 2)
            parts = tl.load(
                w_covered + seats[:, None] * 2 + both[None, :],
                mask=(every < partials)[:, None], other=0,
            )  # fmt: skip
            tl.store(covered + row * 2 + both, tl.sum(parts, 0))


def _check(
    query: Tensor,
    entries: Tensor,
    units: Tensor,
    value_dim: int,
    unit_tokens: int,
    workspace: AttendWorkspace,
) -> tuple[int, int, int, bool]:
    """Rows, heads, rope columns and whether the entries are fp8, or a ValueError."""
    check_tensor(query, "query", (None, None, None), None, query.device)
    check_tensor(units, "units", (None, None), torch.int32, query.device)
    _, heads, dim = query.shape
    rows, listed = units.shape
    if query.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"query must be bfloat16, float16 or float32, got {query.dtype}")
    if value_dim not in LATENTS or dim - value_dim not in ROPES or not 1 <= heads <= MAX_HEADS:
        raise ValueError(
            f"needs 1 to {MAX_HEADS} heads, {LATENTS} value columns and {ROPES} rope columns, "
            f"got {heads}, {value_dim} and {dim - value_dim}"
        )
    if not 1 <= unit_tokens <= TILE or unit_tokens & (unit_tokens - 1):
        raise ValueError(f"unit_tokens must be a power of two up to {TILE}, got {unit_tokens}")
    if listed < 1 or rows > MAX_ATTEND_ROWS or rows * (listed * unit_tokens + TILE) >= 2**31:
        raise ValueError(
            f"units must be (at most {MAX_ATTEND_ROWS}, at least 1) of below 2**31 entries, "
            f"got {tuple(units.shape)} of {unit_tokens}"
        )
    is_fp8 = entries.dtype == torch.uint8
    if is_fp8:
        if value_dim != FP8_LATENT or dim - value_dim != FP8_ROPE:
            raise ValueError(
                f"fp8 rows need {FP8_LATENT} value and {FP8_ROPE} rope columns, "
                f"got {value_dim} and {dim - value_dim}"
            )
        check_tensor(entries, "entries", (None, FP8_ROW_BYTES), torch.uint8, query.device)
    else:
        check_tensor(entries, "entries", (None, dim), query.dtype, query.device)
    if any(tensor.data_ptr() % 16 for tensor in (query, entries)):
        raise ValueError("query and entries must begin at multiples of 16 bytes")
    parts, device = len(workspace.out), query.device
    if parts < 1 or len(workspace.first_tile) < rows + 2:
        raise ValueError(
            f"the workspace was made for {parts} parts and {len(workspace.first_tile) - 2} rows, "
            f"got {rows} rows"
        )
    check_tensor(workspace.out, "workspace.out", (parts, 2, heads, value_dim), query.dtype, device)
    check_tensor(workspace.lse, "workspace.lse", (parts, 2, heads), torch.float32, device)
    check_tensor(workspace.covered, "workspace.covered", (parts, 2, 2), torch.int32, device)
    check_tensor(workspace.first_tile, "workspace.first_tile", (None,), torch.int32, device)
    return rows, heads, dim - value_dim, is_fp8
