"""Partial attention on sm_90: one CTA an SM, 64 heads of it at a time, in three roles.

A producer warpgroup resolves 64 list entries at a time and gathers them into a ring of two stages.
A scoring warpgroup multiplies them with the query, keeps the running maximum, and leaves the shares
(the exponentials) where the tile's rope keys were. Two summing warpgroups add up the values by their
shares, half of the columns each. So scores, exponentials, sums and gathers of neighbouring tiles
overlap. The schedule over rows and parts is the one of `attend.py`; `docs/performance.md` has what
bounds each role.
"""

from __future__ import annotations

from typing import Any

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

HEADS = 64  # of a CTA: the M of its matrix instructions
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _num_tiles(units, U: gl.constexpr, TILE: gl.constexpr):
    return gl.maximum((units * U + TILE - 1) // TILE, 1)


@gluon.jit
def _mix(ids, generations):
    """uint32 of each (stored id, generation); `coverage.mix` (coverage.py) defines it."""
    x = ids.to(gl.uint32) * 0x9E3779B1 + generations.to(gl.uint32) * 0x85EBCA77 + 0x165667B1
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)


@gluon.jit
def _units_of(lengths, row, E: gl.constexpr, HAS_LENGTHS: gl.constexpr):
    if HAS_LENGTHS:
        return gl.minimum(gl.maximum(gl.load(lengths + row), 0), E)
    return gl.to_tensor(E)


@gluon.jit
def _listed_units(units, row, t, listed, at, E: gl.constexpr, U: gl.constexpr, TILE: gl.constexpr):
    place = (t * TILE + at) // U
    return gl.load(units + row.to(gl.int64) * E + place, mask=place < listed, other=-1)


@gluon.jit
def _slots(unit, at, slot_of, num_keys, U: gl.constexpr, B: gl.constexpr, HAS_TABLES: gl.constexpr):
    """The slot of each listed entry's block, -1 if it is not here; without tables, any."""
    slot = unit
    if HAS_TABLES:
        key = (unit + at % U) // B
        inside = (unit >= 0) & (key >= 0) & (key < num_keys)
        slot = gl.load(slot_of + key, mask=inside, other=-1)
    return slot


@gluon.jit
def _resolve(
    unit, slot, at, generation, fill, U: gl.constexpr, B: gl.constexpr, HAS_TABLES: gl.constexpr
):
    """Where the entries of a tile are (-1: nowhere) and what their `mix` is (0: nowhere)."""
    ids = unit + at % U
    valid = slot >= 0
    index = ids
    gens = ids * 0
    if HAS_TABLES:
        offset = ids % B
        gens = gl.load(generation + slot, mask=valid, other=0)
        valid = valid & (offset < gl.load(fill + slot, mask=valid, other=0))
        index = slot * B + offset
    return gl.where(valid, index, -1), gl.where(valid, _mix(ids, gens), 0)


@gluon.jit
def _widen(codes, scale):
    """e4m3 codes to bf16: their bits as a bf16's, times 2 ** 120, times the scale, a power of two.

    Exact, as each factor is. A code of NaN (0x7f) would read as 480: encoders mark a number that they
    cannot store by a scale of NaN, which makes every product NaN.
    """
    scale = scale.to(gl.bfloat16)[:, None]
    codes, scale = gl.broadcast(codes, scale)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 lo, hi, t, bias;
        mov.b32 bias, 0x7b807b80;
        prmt.b32 lo, $2, 0, 0x1404;
        prmt.b32 hi, $2, 0, 0x3424;
        shr.u32 t, lo, 4;
        and.b32 t, t, 0x07f007f0;
        lop3.b32 lo, lo, 0x80008000, t, 0xea;
        shr.u32 t, hi, 4;
        and.b32 t, t, 0x07f007f0;
        lop3.b32 hi, hi, 0x80008000, t, 0xea;
        mul.bf16x2 lo, lo, bias;
        mul.bf16x2 hi, hi, bias;
        mul.bf16x2 $0, lo, $3;
        mul.bf16x2 $1, hi, $4;
        }""",
        "=r,=r,r,r,r", [codes, scale], dtype=gl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@gluon.jit
def _widen_tile(raw, wide, scales, here, LAYOUT: gl.constexpr):
    """Codes that lie in the upper half of their own stage, in place.

    Half of them widen into the lower half, the next quarter over those that were read by then, and
    the last one over itself.
    """
    scale_0 = gl.load(scales, mask=here, other=0.0)
    scale_1 = gl.load(scales + 1, mask=here, other=0.0)
    scale_2 = gl.load(scales + 2, mask=here, other=0.0)
    scale_3 = gl.load(scales + 3, mask=here, other=0.0)
    async_copy.commit_group()
    async_copy.wait_group(0)
    gl.thread_barrier()
    codes = raw.index(0).slice(0, 128, dim=1).load(LAYOUT)
    wide.slice(0, 128, dim=1).store(_widen(codes, scale_0))
    codes = raw.index(0).slice(128, 128, dim=1).load(LAYOUT)
    wide.slice(128, 128, dim=1).store(_widen(codes, scale_1))
    codes = raw.index(1).slice(0, 128, dim=1).load(LAYOUT)
    gl.thread_barrier()
    wide.slice(256, 128, dim=1).store(_widen(codes, scale_2))
    codes = raw.index(1).slice(128, 128, dim=1).load(LAYOUT)
    gl.thread_barrier()
    wide.slice(384, 128, dim=1).store(_widen(codes, scale_3))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _produce(
    entries, entry_ropes, entry_scales, units, lengths, slot_of, generation, fill, num_keys,
    covered, w_covered,
    halves, k_c, k_r, places, full, empty,
    part, group, begin, end, row, first,
    C: gl.constexpr, R: gl.constexpr, ROW: gl.constexpr, E: gl.constexpr, U: gl.constexpr,
    B: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_TABLES: gl.constexpr,
):  # fmt: skip
    """Gathers the listed entries tile by tile; what is not here becomes zeros, and a place of -1.

    The ids of a tile are loaded two tiles ahead, the slots of their blocks one tile ahead.
    """
    LIST: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    GATHER: gl.constexpr = gl.BlockedLayout([1, 16 if FP8 else 8], [4, 8], [4, 1], [1, 0])
    CODES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    ROPE_AT: gl.constexpr = (C + C // 32) // 2 if FP8 else C  # in bf16s
    at = gl.arange(0, TILE, LIST)
    c_cols = gl.arange(0, C // 2 if FP8 else C, gl.SliceLayout(0, GATHER))[None, :]
    r_cols = ROPE_AT + gl.arange(0, R if R > 0 else 64, gl.SliceLayout(0, GATHER))[None, :]
    tile = begin
    count = 0
    while tile < end:
        listed = _units_of(lengths, row, E, HAS_LENGTHS)
        tiles = _num_tiles(listed, U, TILE)
        stop = gl.minimum(first + tiles, end)
        number = gl.zeros([TILE], gl.int32, LIST)
        mixed = gl.zeros([TILE], gl.uint32, LIST)
        t = tile - first
        unit = _listed_units(units, row, t, listed, at, E, U, TILE)
        next_unit = _listed_units(units, row, t + 1, listed, at, E, U, TILE)
        slot = _slots(unit, at, slot_of, num_keys, U, B, HAS_TABLES)
        for t in range(tile - first, stop - first):
            index, mix = _resolve(unit, slot, at, generation, fill, U, B, HAS_TABLES)
            unit = next_unit
            slot = _slots(unit, at, slot_of, num_keys, U, B, HAS_TABLES)
            next_unit = _listed_units(units, row, t + 2, listed, at, E, U, TILE)
            number += (index >= 0).to(gl.int32)
            mixed += mix
            # Twice as many places as stages: the ones of four tiles ago have been read.
            places.index(count % (2 * STAGES)).store(index)
            gl.thread_barrier()
            place = places.index(count % (2 * STAGES)).load(gl.SliceLayout(1, GATHER))
            here = (place >= 0)[:, None]
            base = (entries + place.to(gl.int64) * ROW)[:, None]
            r_base = base
            if FP8:
                r_base = (entry_ropes + place.to(gl.int64) * (ROW // 2))[:, None]
            s = count % STAGES
            mbarrier.wait(empty.index(s), ((count // STAGES) & 1) ^ 1)
            if FP8:
                raw = halves.index(2 * s + 1)._reinterpret(gl.uint8, [2, TILE, C // 2], CODES)
                for j in gl.static_range(2):
                    async_copy.async_copy_global_to_shared(
                        raw.index(j), base + j * (C // 2) + c_cols, mask=here
                    )
            else:
                async_copy.async_copy_global_to_shared(k_c.index(s), base + c_cols, mask=here)
            if R > 0:
                async_copy.async_copy_global_to_shared(k_r.index(s), r_base + r_cols, mask=here)
            async_copy.mbarrier_arrive(full.index(s), increment_count=False)
            if FP8:
                scales = entry_scales + place.to(gl.int64) * (ROW // 4) + C // 4
                _widen_tile(raw, k_c.index(s), scales, place >= 0, GATHER)
            mbarrier.arrive(full.index(s), count=1)
            count += 1

        if group == 0:
            number_of_row = gl.sum(number, 0)
            mix_of_row = gl.sum(mixed, 0).to(gl.int32)
            if (first >= begin) & (first + tiles <= end):
                gl.store(covered + row * 2, number_of_row)
                gl.store(covered + row * 2 + 1, mix_of_row)
            else:
                seat = part * 2 + (first >= begin).to(gl.int32)
                gl.store(w_covered + seat * 2, number_of_row)
                gl.store(w_covered + seat * 2 + 1, mix_of_row)
        tile = stop
        first += tiles
        row += 1


@gluon.jit
def _score(
    query, lengths, query_of, rotation, lse, w_lse,
    q_c, q_r, k_c, k_r, p, places, decays, inverses, full, decayed, ready,
    part, group, begin, end, row, first, scale_log2,
    H: gl.constexpr, C: gl.constexpr, R: gl.constexpr, E: gl.constexpr, U: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_QUERY_OF: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """Scores of each tile and their online softmax: shares and what the sums decay by."""
    HEADS: gl.constexpr = 64
    P_SHARED: gl.constexpr = gl.NVMMASharedLayout(min(2 * TILE, 128), 16, 2)
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    GATHER: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    heads = group * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, GATHER))
    c_cols = gl.arange(0, C, gl.SliceLayout(0, GATHER))
    r_cols = gl.arange(0, R if R > 0 else 64, gl.SliceLayout(0, GATHER))
    is_head = (heads < H)[:, None]

    tile = begin
    count = 0
    while tile < end:
        tiles = _num_tiles(_units_of(lengths, row, E, HAS_LENGTHS), U, TILE)
        stop = gl.minimum(first + tiles, end)
        source = row
        if HAS_QUERY_OF:
            source = gl.load(query_of + row)
        q_at = query + source.to(gl.int64) * H * (C + R) + heads[:, None] * (C + R)
        async_copy.async_copy_global_to_shared(q_c, q_at + c_cols[None, :], mask=is_head)
        if R > 0:
            rope = gl.load(q_at + C + r_cols[None, :], mask=is_head, other=0.0)
            if ROTATE != "none":
                if ROTATE == "interleaved":
                    partner = r_cols ^ 1
                    angle = r_cols // 2
                    sign = gl.where(r_cols % 2 == 0, -1.0, 1.0)
                else:
                    partner = (r_cols + R // 2) % R
                    angle = r_cols % (R // 2)
                    sign = gl.where(r_cols < R // 2, -1.0, 1.0)
                turned = gl.load(q_at + C + partner[None, :], mask=is_head, other=0.0)
                cos = gl.load(rotation + row * R + angle)[None, :]
                sin = (gl.load(rotation + row * R + R // 2 + angle) * sign)[None, :]
                rope = (rope.to(gl.float32) * cos + turned.to(gl.float32) * sin).to(gl.bfloat16)
            q_r.store(rope)
        async_copy.commit_group()
        async_copy.wait_group(0)
        fence_async_shared()
        gl.thread_barrier()

        top = gl.full([HEADS], float("-inf"), gl.float32, ROWS)
        total = gl.zeros([HEADS], gl.float32, ROWS)
        for _ in range(tile, stop):
            s = count % STAGES
            mbarrier.wait(full.index(s), (count // STAGES) & 1)
            fence_async_shared()
            scores = gl.zeros([HEADS, TILE], gl.float32, S_LAYOUT)
            scores = warpgroup_mma(
                q_c, k_c.index(s).permute([1, 0]), scores, use_acc=False, is_async=True
            )
            if R > 0:
                scores = warpgroup_mma(q_r, k_r.index(s).permute([1, 0]), scores, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            here = places.index(count % (2 * STAGES)).load(gl.SliceLayout(0, S_LAYOUT)) >= 0
            scores = gl.where(here[None, :], scores, float("-inf"))
            new_top = gl.maximum(top, gl.max(scores, 1) * scale_log2)
            safe = gl.where(new_top == float("-inf"), 0.0, new_top)
            decay = gl.exp2(top - safe)
            decays.index(s).store(decay)
            gl.thread_barrier()
            mbarrier.arrive(decayed.index(s), count=1)
            shares = gl.exp2(scores * scale_log2 - safe[:, None])
            top = new_top
            total = total * decay + gl.sum(shares, 1)
            p.index(s)._reinterpret(gl.bfloat16, [HEADS, TILE], P_SHARED).store(
                shares.to(gl.bfloat16)
            )
            inverses.index(s).store(1.0 / gl.where(total == 0.0, 1.0, total))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(ready.index(s), count=1)
            count += 1

        base = gl.where(top == float("-inf"), 0.0, top)
        row_lse = (base + gl.log2(total)) * _LN2
        s_heads = group * HEADS + gl.arange(0, HEADS, ROWS)
        if (first >= begin) & (first + tiles <= end):
            gl.store(lse + row * H + s_heads, row_lse, mask=s_heads < H)
        else:
            seat = part * 2 + (first >= begin).to(gl.int32)
            gl.store(w_lse + seat * H + s_heads, row_lse, mask=s_heads < H)
        tile = stop
        first += tiles
        row += 1


@gluon.jit
def _sum(
    lengths, out, w_out, k_c, p, decays, inverses, decayed, ready, empty,
    part, group, begin, end, row, first,
    H: gl.constexpr, C: gl.constexpr, E: gl.constexpr, U: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, HAS_LENGTHS: gl.constexpr,
):  # fmt: skip
    """Sums the values by their shares, half of the columns in each warpgroup, and writes."""
    HEADS: gl.constexpr = 64
    P_SHARED: gl.constexpr = gl.NVMMASharedLayout(min(2 * TILE, 128), 16, 2)
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, min(C // 2, 128), 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    heads = group * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, LINES))
    at = heads[:, None] * C + gl.arange(0, 64, gl.SliceLayout(0, LINES))[None, :]
    is_head = (heads < H)[:, None]

    tile = begin
    count = 0
    while tile < end:
        tiles = _num_tiles(_units_of(lengths, row, E, HAS_LENGTHS), U, TILE)
        stop = gl.minimum(first + tiles, end)
        acc = gl.zeros([HEADS, C], gl.float32, LAYOUT)
        inverse = gl.zeros([HEADS], gl.float32, ROWS)
        for t in range(tile, stop):
            s = count % STAGES
            mbarrier.wait(decayed.index(s), (count // STAGES) & 1)
            acc = acc * decays.index(s).load(ROWS)[:, None]
            mbarrier.wait(ready.index(s), (count // STAGES) & 1)
            inverse = inverses.index(s).load(ROWS)
            shares = p.index(s)._reinterpret(gl.bfloat16, [HEADS, TILE], P_SHARED)
            acc = warpgroup_mma(shares, k_c.index(s), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if t + 1 < stop:
                gl.thread_barrier()
                mbarrier.arrive(empty.index(s), count=1)
            count += 1

        # The last tile's stage carries the result, so that it is written in whole lines.
        s = (count - 1) % STAGES
        gl.thread_barrier()
        k_c.index(s).store((acc * inverse[:, None]).to(gl.bfloat16))
        gl.thread_barrier()
        if (first >= begin) & (first + tiles <= end):
            row_at = out + row.to(gl.int64) * H * C
        else:
            seat = part * 2 + (first >= begin).to(gl.int32)
            row_at = w_out + seat.to(gl.int64) * H * C
        for j in gl.static_range(C // 64):
            chunk = k_c.index(s).slice(j * 64, 64, dim=1).load(LINES)
            gl.store(row_at + at + j * 64, chunk, mask=is_head)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(s), count=1)
        tile = stop
        first += tiles
        row += 1


@gluon.jit
def _attend(
    query, entries, entry_ropes, entry_scales, units, lengths, num_rows, query_of, slot_of,
    generation, fill, rotation, out, lse, covered, w_out, w_lse, w_covered, first_tile,
    M, num_keys, scale_log2,
    H: gl.constexpr, C: gl.constexpr, R: gl.constexpr, E: gl.constexpr, U: gl.constexpr,
    B: gl.constexpr, PARTS: gl.constexpr, MP: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr,
    HAS_LENGTHS: gl.constexpr, HAS_NUM_ROWS: gl.constexpr, HAS_QUERY_OF: gl.constexpr,
    HAS_TABLES: gl.constexpr, ROTATE: gl.constexpr, COMBINED: gl.constexpr,
):  # fmt: skip
    HEADS: gl.constexpr = 64
    ROW: gl.constexpr = C + C // 32 + 2 * R if FP8 else C + R
    GROUPS: gl.constexpr = (H + HEADS - 1) // HEADS
    part = gl.program_id(0) // GROUPS
    group = gl.program_id(0) % GROUPS

    # As `early.wait`; a merge of the parts is not let begin, it would only stand in the way.
    SCAN: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    rows = gl.arange(0, MP, SCAN)
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.u32 $0, $1;" if COMBINED else
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, $1;",
        "=r,r,~{memory}", [gl.arange(0, 256, SCAN)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip

    # The schedule: tiles of all rows in one sequence, cut evenly.
    used = M
    if HAS_NUM_ROWS:
        used = gl.minimum(M, gl.load(num_rows))
    if HAS_LENGTHS:
        listed = gl.load(lengths + rows, mask=rows < used, other=0)
        listed = gl.minimum(gl.maximum(listed, 0), E)
        tiles = gl.where(rows < used, _num_tiles(listed, U, TILE), 0)
        ends = gl.associative_scan(tiles, 0, _plus)
        all_tiles = gl.max(ends, 0)
    else:
        row_tiles: gl.constexpr = (E * U + TILE - 1) // TILE
        ends = gl.minimum(rows + 1, used) * row_tiles
        tiles = gl.where(rows < used, row_tiles, 0)
        all_tiles = used * row_tiles
    chunk = gl.maximum((all_tiles + PARTS - 1) // PARTS, 1)
    begin = part * chunk
    end = gl.minimum(begin + chunk, all_tiles)
    row = gl.sum((ends <= begin).to(gl.int32), 0)
    first = gl.max(gl.where(ends <= begin, ends, 0), 0)
    if (part == 0) & (group == 0):
        gl.store(first_tile + rows, ends - tiles, mask=rows < M)
        gl.store(first_tile + M, all_tiles)
        gl.store(first_tile + M + 1, chunk)

    wide: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_c = gl.allocate_shared_memory(gl.bfloat16, [HEADS, C], wide)
    halves = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, TILE, C // 2], wide)
    k_c = halves._reinterpret(gl.bfloat16, [STAGES, TILE, C], wide)
    # A tile's rope keys are read before its shares exist, and lie where those will.
    p = gl.allocate_shared_memory(gl.bfloat16, [STAGES, TILE, 64], wide)
    k_r = p
    q_r = gl.allocate_shared_memory(gl.bfloat16, [HEADS, R], wide) if R > 0 else q_c
    places = gl.allocate_shared_memory(gl.int32, [2 * STAGES, TILE], flat)
    decays = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS], flat)
    inverses = gl.allocate_shared_memory(gl.float32, [STAGES, HEADS], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    decayed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=128 + 1)
        mbarrier.init(decayed.index(s), count=1)
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)

    gl.warp_specialize(
        [
            (_sum, (
                lengths, out, w_out, k_c, p, decays, inverses, decayed, ready, empty,
                part, group, begin, end, row, first,
                H, C, E, U, TILE, STAGES, HAS_LENGTHS,
            )),
            (_score, (
                query, lengths, query_of, rotation, lse, w_lse,
                q_c, q_r, k_c, k_r, p, places, decays, inverses, full, decayed, ready,
                part, group, begin, end, row, first, scale_log2,
                H, C, R, E, U, TILE, STAGES, HAS_LENGTHS, HAS_QUERY_OF, ROTATE,
            )),
            (_produce, (
                entries, entry_ropes, entry_scales, units, lengths, slot_of, generation, fill,
                num_keys, covered, w_covered,
                halves, k_c, k_r, places, full, empty,
                part, group, begin, end, row, first,
                C, R, ROW, E, U, B, TILE, STAGES, FP8, HAS_LENGTHS, HAS_TABLES,
            )),
        ],
        [4, 4],
        [112, 80 if FP8 else 72],
    )  # fmt: skip


def launch(**arguments: Any) -> None:
    """Run with the arguments that `attend.attend` made."""
    groups = -(-arguments["H"] // HEADS)
    _attend[(arguments["PARTS"] * groups,)](
        **arguments, TILE=64, STAGES=2, num_warps=8, launch_pdl=True
    )
