"""Entries pulled from their holders, and the lists by which `attend` reads them: launchers and kernels.

Letters: W ranks, N items of this rank, K units of an item, each of one entry.

    fetch      the plan's distinct entries, each out of its holder's region into a staged row here
    compose    per item one list of what is here and what was fetched, and whether that is all of it

The holder does nothing: its tables and rows are read in its own memory, laid out by `pool_layout.py`.
No kernel waits here. What a holder wrote is seen if its kernels were over before a signal that an
earlier kernel of this stream has acquired; a block is entered in the directory only after that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_tensor
from .decide import FETCH
from .limits import MAX_RANKS
from .mix import mix_of
from .plan import Plan, num_sms
from .pool_layout import PoolLayout

_FETCH: tl.constexpr = tl.constexpr(FETCH)
# A program is one warp: its threads need no barrier, and a tile waits for its own tables only.
_TILE = 2048  # int32 of a tile of rows: 16 accesses of 16 bytes a thread, all in flight at once
_MOST_ROWS = 32
_REGISTERS = 128  # of a thread
_PROGRAMS_OF_SM = 65536 // (_REGISTERS * 32)


def fetch(
    pool: PoolLayout,
    layer: int,
    peers: Tensor,
    units: Tensor,
    counts: Tensor,
    *,
    memory: Tensor,
    came: Tensor,
    uses: Tensor | None = None,
) -> None:
    """Copy the entry of each listed unit to the staged row of its number, if its holder has it.

    Args:
        peers: (W,) int64, where each rank's region is mapped here.
        units: (cap,) int32 stored ids grouped by holder, as many as there are staged rows at most.
        counts: (W,) int32, how many of them are each holder's; what lies beyond may hold anything.
        memory: (num_bytes,) uint8, this rank's own region.
        came: (cap, 2) int32, written up to the counts: 1 and the `mix` of the id and of the
            generation that its holder has, or 0 and 0 where it has no such entry.
        uses: (keys,) int32, counted up by the entries of each block that came.
    Raises:
        ValueError: naming what does not fit. No value on the device is read.
    """
    device = memory.device
    _check_pool(pool, layer, counts, device)
    check_tensor(peers, "peers", (len(counts),), torch.int64, device)
    check_tensor(units, "units", (None,), torch.int32, device)
    check_tensor(memory, "memory", (pool.num_bytes,), torch.uint8, device)
    check_tensor(came, "came", (len(units), 2), torch.int32, device)
    check_tensor(uses, "uses", (pool.keys,), torch.int32, device)
    if len(units) > pool.staged:
        raise ValueError(f"units may be as many as staged rows, {pool.staged}, got {len(units)}")
    if memory.data_ptr() % 16:
        raise ValueError("memory must begin at a multiple of 16 bytes")
    if len(units) == 0:
        return
    words = pool.entry_bytes // 4
    columns = min(triton.next_power_of_2(words), _TILE)
    rows = min(_TILE // columns, _MOST_ROWS)
    programs = num_sms(device) * _PROGRAMS_OF_SM if device.type == "cuda" else 2
    _fetch_kernel[(min(triton.cdiv(len(units), rows), programs),)](
        peers, units, counts, memory.view(torch.int32), came, uses, layer,
        W=len(counts), WP=triton.next_power_of_2(len(counts)), KEYS=pool.keys, SLOTS=pool.slots,
        B=pool.block_tokens, SLOT_OF=pool.slot_of, GENERATION=pool.generation, FILL=pool.fill,
        ENTRIES=pool.entries_of(0), STAGED=pool.entries_of(pool.layers) // 4, WORDS=words,
        COLUMNS=columns, ROWS=rows, num_warps=1, num_stages=1, maxnreg=_REGISTERS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layer"])  # so all layers are compiled before a graph's capture
def _fetch_kernel(
    peers_ptr, units_ptr, counts_ptr, memory_ptr, came_ptr, uses_ptr, layer,
    W: tl.constexpr, WP: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr, B: tl.constexpr,
    SLOT_OF: tl.constexpr, GENERATION: tl.constexpr, FILL: tl.constexpr, ENTRIES: tl.constexpr,
    STAGED: tl.constexpr, WORDS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS entries; a row has WORDS int32. Places are bytes, STAGED int32."""
    ranks = tl.arange(0, WP)
    ends = tl.cumsum(tl.load(counts_ptr + ranks, mask=ranks < W, other=0), 0)
    total = tl.max(ends, 0)
    columns = tl.arange(0, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(total, ROWS), tl.num_programs(0)):
        seat = tile * ROWS + tl.arange(0, ROWS)
        used = seat < total
        unit = tl.load(units_ptr + seat, mask=used, other=-1)
        holder = tl.sum((ends[None, :] <= seat[:, None]).to(tl.int32), 1)
        region = tl.load(peers_ptr + holder, mask=used, other=0)
        key, offset = unit // B, unit % B
        known = (unit >= 0) & (key < KEYS)
        slot = tl.load(_words_at(region + SLOT_OF) + key, mask=known, other=-1)
        placed = (slot >= 0) & (slot < SLOTS)
        generation = tl.load(_words_at(region + GENERATION) + slot, mask=placed, other=0)
        block = layer * SLOTS + slot
        fill = tl.load(_words_at(region + FILL) + block, mask=placed, other=0)
        # Rows are read beside the tables: blocks that may be fetched do not change.
        there = placed & (offset < fill)
        row = (block * B + offset).to(tl.int64)
        from_row = _words_at(region + ENTRIES + row * (4 * WORDS))
        to_row = memory_ptr + STAGED + seat.to(tl.int64) * WORDS
        for first in tl.static_range(0, WORDS, COLUMNS):
            at = first + columns
            live = (at < WORDS)[None, :]
            entry = tl.load(from_row[:, None] + at[None, :], mask=placed[:, None] & live)
            tl.store(to_row[:, None] + at[None, :], entry, mask=there[:, None] & live)
        tl.store(came_ptr + seat * 2, there.to(tl.int32), mask=used)
        mixed = tl.where(there, mix_of(unit, generation), 0).to(tl.int32)
        tl.store(came_ptr + seat * 2 + 1, mixed, mask=used)
        if uses_ptr is not None:
            tl.atomic_add(uses_ptr + key, 1, mask=there, sem="relaxed")


@triton.jit
def _words_at(address):
    """A pointer to a multiple of 16 bytes; the hint would be lost on the integer."""
    return tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16)


def compose(
    pool: PoolLayout,
    layer: int,
    plan: Plan,
    came: Tensor,
    *,
    rank: int,
    units: Tensor,
    lengths: Tensor,
    fault: Tensor,
    uses: Tensor | None = None,
) -> None:
    """List for each item what is here and what was fetched for it, and compare with the plan.

    Args:
        plan: of units of one entry, its local ones as entry indices. What an item must not see is
            left out of its local list only: an entry that it fetched is a fault.
        came: what `fetch` wrote for this plan.
        units: (N, K) int32, gets entry indices counted from the layer's first row: the item's local
            list, then what it fetches, in its order, -1 where that did not come.
        lengths: (N,) int32, gets the columns in use.
        fault: (N,) int32, gets 0, or 1 + the last rank of whose entries others are listed than the
            plan expects; of this rank's own only the number is compared.
        uses: (slots,) int32 of the pool's last slots, counted up by the entries of each that items
            list, an entry once an item.
    Raises:
        ValueError: naming what does not fit. No value on the device is read.
    """
    device, i32 = units.device, torch.int32
    _check_pool(pool, layer, plan.counts, device)
    world = len(plan.counts)
    check_tensor(units, "units", (None, None), i32, device)
    check_tensor(uses, "uses", (None,), i32, device)
    items, listed = units.shape
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, {world}), got {rank}")
    for name, tensor, shape, dtype in (
        ("way", plan.way, (items, world), torch.int8),
        ("expected", plan.expected, (items, world, 2), i32),
        ("place", plan.place, (items, listed), i32),
        ("local_units", plan.local_units, (items, listed), i32),
        ("local_lengths", plan.local_lengths, (items,), i32),
        ("came", came, (items * listed, 2), i32),
        ("lengths", lengths, (items,), i32),
        ("fault", fault, (items,), i32),
    ):
        check_tensor(tensor, name, shape, dtype, device)
    counted = 0 if uses is None else len(uses)
    if counted > pool.slots:
        raise ValueError(f"uses may be of {pool.slots} slots, got {counted}")
    if items == 0:
        return
    columns = triton.next_power_of_2(max(listed, 1))
    _compose_kernel[(items,)](
        plan.way, plan.expected, plan.counts, plan.place, plan.local_units, plan.local_lengths,
        came, units, lengths, fault, uses, pool.first_staged(layer), rank,
        W=world, K=listed, KP=columns, B=pool.block_tokens,
        COUNTED=pool.slots - counted,
        num_warps=min(max(columns // 256, 1), 8), num_stages=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_staged", "rank"])
def _compose_kernel(
    way_ptr, expected_ptr, counts_ptr, place_ptr, local_units_ptr, local_lengths_ptr,
    came_ptr, units_ptr, lengths_ptr, fault_ptr, uses_ptr, first_staged, rank,
    W: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, B: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Program: an item. Slots from COUNTED on have a number in `uses`."""
    item = tl.program_id(0)
    columns = tl.arange(0, KP)
    row = item * K + columns
    here = tl.load(local_lengths_ptr + item)
    local = tl.load(local_units_ptr + row, mask=columns < here, other=-1)
    seat = tl.load(place_ptr + row, mask=columns < K, other=-1)
    fetched = seat >= 0
    there = tl.load(came_ptr + seat * 2, mask=fetched, other=0) != 0
    mixed = tl.load(came_ptr + seat * 2 + 1, mask=there, other=0)
    rank_in = tl.cumsum(fetched.to(tl.int32), 0)
    tl.store(units_ptr + row, local, mask=columns < here)
    index = tl.where(there, first_staged + seat, -1)
    tl.store(units_ptr + item * K + here + rank_in - 1, index, mask=fetched)
    tl.store(lengths_ptr + item, here + tl.sum(fetched.to(tl.int32), 0))
    if uses_ptr is not None:
        tl.atomic_add(
            uses_ptr + (local // B - COUNTED), 1, mask=local >= COUNTED * B, sem="relaxed"
        )

    fault = 0
    start = 0
    for holder in range(W):
        end = start + tl.load(counts_ptr + holder)
        wanted = expected_ptr + (item * W + holder) * 2
        if holder == rank:
            if tl.sum((local >= 0).to(tl.int32), 0) != tl.load(wanted):
                fault = holder + 1
        elif tl.load(way_ptr + item * W + holder) == _FETCH:
            from_it = there & (seat >= start) & (seat < end)
            found = tl.sum(from_it.to(tl.int32), 0)
            found_mix = tl.sum(tl.where(from_it, mixed, 0).to(tl.uint32), 0).to(tl.int32)
            if (found != tl.load(wanted)) | (found_mix != tl.load(wanted + 1)):
                fault = holder + 1
        start = end
    tl.store(fault_ptr + item, fault)


def _check_pool(pool: PoolLayout, layer: int, counts: Tensor, device: torch.device) -> None:
    """A layer of the pool, and counts of up to MAX_RANKS ranks."""
    if not 0 <= layer < pool.layers:
        raise ValueError(f"layer must be in [0, {pool.layers}), got {layer}")
    check_tensor(counts, "counts", (None,), torch.int32, device)
    if not 1 <= len(counts) <= MAX_RANKS:
        raise ValueError(f"counts must be of 1 to {MAX_RANKS} ranks, got {len(counts)}")
