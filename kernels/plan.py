"""From selected units to who is asked for what, in one launch: the launcher of plan.cu.

Letters: Q queries, G branches, N = Q * G items, K units of an item, W ranks, B tokens of a block,
U tokens of a unit, F payload forms. The definition is `want`, `route` and `fetch` of the runtime's
plan and `decide` of its predicate.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import nvrtc
from .checks import check_tensor
from .decide import (
    COLUMN_BYTES,
    SOURCE,
    Fixed,
    PlanMode,
    PriceTable,
    check_choice,
    step_of,
)
from .limits import MAX_ITEMS, MAX_QUERIES, MAX_UNIT_TOKENS, MAX_UNITS

_COUNT, _SHARE, _FIRST, _LIST, _PLACE = (1 << i for i in range(5))
_ALL = 31
_ALONE, _GRID = range(2)
_RESERVED = 1024  # bytes of an SM's shared memory that the device keeps for each block


class BlockTable(NamedTuple):
    """Where blocks are, as this rank sees it: a record of four numbers a key, block * G + g.

    records: (keys, 4) int32: the rank to ask or -1, the slot here or -1, generation, and entries of
    the block. One 16-byte load has all of a unit; four tables took four loads.
    """

    records: Tensor
    block_tokens: int
    num_branches: int

    @staticmethod
    def of(
        owners: Tensor,
        generations: Tensor,
        tokens: Tensor,
        slot_of: Tensor,
        *,
        rank: int,
        block_tokens: int,
        num_branches: int,
        askable: Tensor | None = None,
    ) -> BlockTable:
        """Of the tables of the corpus and of the pool of `rank`; the first copy from `rank % R` is asked.

        Args:
            owners: (keys, R) int32, rank of each copy or -1. generations: (keys,) int32.
            tokens: (keys // G,) int32, entries of each block.
            slot_of: (pool keys,) int32, -1 where a block is not here; missing keys are not.
            askable: (W,) uint8: 2 for ranks that may be asked, 1 for ranks asked only if no copy has a 2,
                0 for ranks that may not. None: all may be.
        Raises: ValueError for tables that do not fit together.
        """
        keys = len(generations)
        if owners.dim() != 2 or len(owners) != keys or owners.shape[1] < 1:
            raise ValueError(f"owners must be ({keys}, R), got {tuple(owners.shape)}")
        if num_branches < 1 or tuple(tokens.shape) != (keys // num_branches,):
            raise ValueError(
                f"tokens must be of {keys} keys / {num_branches} branches, got {tuple(tokens.shape)}"
            )
        slots = torch.full_like(generations, -1)
        slots[: len(slot_of)] = slot_of[:keys]
        copies = owners.long().roll(-(rank % owners.shape[1]), 1)
        usable = (copies >= 0).to(torch.uint8)
        if askable is not None:
            usable *= askable[copies.clamp(min=0)]
        best, at = usable.max(1, keepdim=True)  # of equals the first
        columns = (
            torch.where(best > 0, copies.gather(1, at), -1)[:, 0],
            slots,
            generations,
            tokens.repeat_interleave(num_branches),
        )
        return BlockTable(
            torch.stack([column.to(torch.int32) for column in columns], 1),
            block_tokens,
            num_branches,
        )


class PlanWorkspace(NamedTuple):
    """What programs leave for one another: made once, for one launch at a time.

    listers: (units of the corpus, words) int32, a bit per query; zero between launches. seats:
    (units of the corpus,) int32. demand (W, N, 2) int64: a record of 16 bytes, see decide.cuh; reps
    (W, N) int32. gate: (1,) int64, zero before the first launch.
    """

    listers: Tensor
    seats: Tensor
    demand: Tensor
    reps: Tensor
    gate: Tensor

    @staticmethod
    def make(
        *,
        num_items: int,
        num_branches: int,
        num_units: int,
        world_size: int,
        device: torch.device | str,
    ) -> PlanWorkspace:
        """For plans of up to `num_items` over a corpus of `num_units` stored units."""
        words = -(-num_items // num_branches // 32)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return PlanWorkspace(
            listers=zeros(num_units, _power_of_2(words)),
            seats=zeros(num_units),
            demand=zeros(world_size, num_items, 2, dtype=torch.int64),
            reps=zeros(world_size, num_items),
            gate=zeros(1, dtype=torch.int64),
        )


class Plan(NamedTuple):
    """What the step does. Capacity beyond the counts holds anything.

    pairs_units (N, W) int32, unique_units (W,) int32, fair_units (N, W) float64: the demand, as the
    predicate reads it; fair shares are rounded to 2**-28 of a unit. way: (N, W) int8. expected:
    (N, W, 2) int32, coverage (entries, mix) of what each item lists at each holder.

    Per form, grouped by holder, items ascending: items, units_of (F, W * N) int32,
    items_expected (F, W * N, 2) int32, route_units (F, N * K) int32; pairs, listed (F, W) int32.

    Distinct units to fetch, grouped by holder, then by the first item that fetches them and its
    order: fetch_units (N * K,) int32, counts (W,) int32; place: (N, K) int32, position of each
    listed unit in `fetch_units`, -1 where it is not fetched.

    local_units (N, K) int32, local_lengths (N,) int32: the units that are here, in the item's
    order, and the columns in use; -1 where there is nothing to read.
    """

    pairs_units: Tensor
    unique_units: Tensor
    fair_units: Tensor
    way: Tensor
    expected: Tensor
    items: Tensor
    units_of: Tensor
    items_expected: Tensor
    route_units: Tensor
    pairs: Tensor
    listed: Tensor
    fetch_units: Tensor
    counts: Tensor
    place: Tensor
    local_units: Tensor
    local_lengths: Tensor

    @staticmethod
    def make(
        *,
        num_items: int,
        num_listed: int,
        world_size: int,
        num_forms: int,
        device: torch.device | str,
    ) -> Plan:
        """Tensors to write to."""
        shapes = _shapes(num_items, num_listed, world_size, num_forms)
        return Plan(
            *(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes.values())
        )


def _shapes(n: int, k: int, w: int, f: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    i32 = torch.int32
    return {
        "pairs_units": ((n, w), i32),
        "unique_units": ((w,), i32),
        "fair_units": ((n, w), torch.float64),
        "way": ((n, w), torch.int8),
        "expected": ((n, w, 2), i32),
        "items": ((f, w * n), i32),
        "units_of": ((f, w * n), i32),
        "items_expected": ((f, w * n, 2), i32),
        "route_units": ((f, n * k), i32),
        "pairs": ((f, w), i32),
        "listed": ((f, w), i32),
        "fetch_units": ((n * k,), i32),
        "counts": ((w,), i32),
        "place": ((n, k), i32),
        "local_units": ((n, k), i32),
        "local_lengths": ((n,), i32),
    }


def plan(
    units: Tensor,
    blocks: BlockTable,
    prices: PriceTable,
    workspace: PlanWorkspace,
    *,
    rank: int,
    unit_tokens: int = 1,
    mode: PlanMode = "auto",
    hidden: Tensor | None = None,
    fill: Tensor | None = None,
    wait_s: Tensor | None = None,
    out: Plan | None = None,
) -> Plan:
    """Holders, demand, ways and the lists of what is routed, fetched and here.

    Whatever has a slot here is local, whichever rank owns it. Ids beyond the table are padding.

    Args:
        units: (N, K) int32 stored ids of the units' first entries, distinct in a row, -1 anywhere;
            Q is up to 256, N up to 1024, K up to 4096.
        unit_tokens: U, divides the block_tokens of `blocks`.
        mode: what decides; with "given" the ways are those found in `out.way`.
        hidden: (N, 2) int32, entry ids ahead of each item's query; None hides nothing.
        fill: (slots,) int32, entries written in each slot of the layer. With it the local list
            holds entry indices slot * B + offset, and -1 for units whose first entry is not written
            (or, of single entries, is hidden); without it stored ids.
        wait_s: (W,) float64, what each holder is busy with before it starts.
        out: where to write; see `Plan.make`.
    Raises:
        ValueError: naming what does not fit. Values on the device are not read.
    """
    num_items, num_listed = _check(units, blocks, prices, workspace, rank, unit_tokens, mode)
    world, device = prices.world_size, units.device
    if out is None:
        if mode == "given":
            raise ValueError("mode 'given' needs `out`, whose `way` is read")
        out = Plan.make(
            num_items=num_items,
            num_listed=num_listed,
            world_size=world,
            num_forms=prices.num_forms,
            device=device,
        )
    expected = _shapes(num_items, num_listed, world, prices.num_forms)
    for name, (shape, dtype) in expected.items():
        check_tensor(getattr(out, name), name, shape, dtype, device)
    check_tensor(hidden, "hidden", (num_items, 2), torch.int32, device)
    check_tensor(fill, "fill", (None,), torch.int32, device)
    check_tensor(wait_s, "wait_s", (world,), torch.float64, device)
    if num_items == 0:
        for counts in (out.unique_units, out.pairs, out.listed, out.counts):
            counts.zero_()
        return out

    shared = num_items > blocks.num_branches
    fixed = Fixed(
        **_blocks(num_items, num_listed, world, device),
        block_tokens=blocks.block_tokens,
        unit_tokens=unit_tokens,
        num_branches=blocks.num_branches,
        world_size=world,
        words=_words(num_items, blocks.num_branches),
        num_forms=prices.num_forms,
        mode=mode,
        stages=_ALL,
        together=_ALONE if num_items == 1 else _GRID,
    )
    tensors: dict[str, Tensor | None] = {
        "units": units,
        "hidden": hidden,
        "records": blocks.records,
        "fill": fill,
        "wait_s": wait_s,
        **out._asdict(),
        **workspace._asdict(),
    }
    step = step_of(
        tensors,
        prices,
        rank=rank,
        num_items=num_items,
        num_listed=num_listed,
        num_keys=len(blocks.records),
    )

    def launch(fixed: Fixed) -> None:
        nvrtc.launch(
            SOURCE,
            fixed.name("plan"),
            step,
            grid=num_items * fixed.parts,
            block=fixed.threads,
            shared_bytes=_shared_bytes(fixed),
            cluster=fixed.parts,
            cooperative=fixed.together == _GRID,
            device=device,
        )

    if is_fused(fixed, num_items, device):
        launch(fixed)
        return out
    each = [
        replace(fixed, stages=stages, together=_ALONE)
        for stages in ((_COUNT, _SHARE, _FIRST, _LIST, _PLACE) if shared else (_COUNT, _LIST))
    ]
    for one in each:  # a stage that does not compile must not follow one that has run
        nvrtc.load(SOURCE, one.name("plan"), device)
    for one in each:
        launch(one)
    return out


def _blocks(num_items: int, num_listed: int, world: int, device: torch.device) -> dict[str, int]:
    """Threads of a block, units of a thread, and blocks of an item.

    Scattered accesses bound a block, so an item of a small batch is spread over a cluster, where there
    are clusters. All must be resident at once: 12, 24 and 64 clusters of 8, 4 and 2 blocks are, on
    132 SMs; where they are not, the cooperative launch is refused.
    """
    sms = num_sms(device)
    most = sms // num_items if has_clusters(device) else 1
    parts = 8 if most >= 10 else 4 if most >= 5 else 2 if most >= 2 else 1
    per_thread = 1 if parts > 2 else 2 if num_items <= sms else 4
    wanted = _power_of_2(-(-num_listed // parts)) // per_thread
    threads = min(max(wanted, _power_of_2(world), 64), 512 if per_thread == 4 else 1024)
    return {
        "threads": threads,
        "per_thread": -(-max(num_listed, 1) // (threads * parts)),
        "parts": parts,
    }


def _words(num_items: int, num_branches: int) -> int:
    """Of the bits of a unit's queries, in this launch: all are zero between launches."""
    return _power_of_2(-(-num_items // num_branches // 32))


def _shared_bytes(fixed: Fixed) -> int:
    """Of plan.cu's Shared."""
    warps, capacity, world = fixed.threads // 32, fixed.threads * fixed.per_thread, fixed.world_size
    columns = COLUMN_BYTES * (world + 1) + 4 * world * fixed.words
    counts = 4 * (1 + world + 2 + warps * (world + 1) + warps + 32 * fixed.words + 1)
    return columns + counts + (2 * 4 + 4 * 2) * capacity + 4


def is_fused(fixed: Fixed, num_items: int, device: torch.device) -> bool:
    """Whether all items are resident at once, so that they can wait for one another."""
    per_sm = -(-num_items * fixed.parts // max(num_sms(device), 1))
    needed = per_sm * (_shared_bytes(fixed) + _RESERVED)
    return num_sms(device) > 0 and per_sm <= 2 and needed <= shared_of_sm(device)


def shared_of_sm(device: torch.device) -> int:
    """Bytes of shared memory of an SM."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9


def num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power_of_2(number: int) -> int:
    """The next one, at least 1."""
    return 1 << (max(number, 1) - 1).bit_length()


def _check(
    units: Tensor,
    blocks: BlockTable,
    prices: PriceTable,
    workspace: PlanWorkspace,
    rank: int,
    unit_tokens: int,
    mode: PlanMode,
) -> tuple[int, int]:
    """N and K, if what the kernel reads fits together."""
    if units.dim() != 2 or len(units) > MAX_ITEMS or units.shape[1] > MAX_UNITS:
        raise ValueError(
            f"units must be (N, K) of at most {MAX_ITEMS} x {MAX_UNITS}, got {tuple(units.shape)}"
        )
    num_items, num_listed = units.shape
    check_choice(prices, units.device, world_size=prices.world_size, rank=rank, mode=mode)
    block_tokens, branches = blocks.block_tokens, blocks.num_branches
    if not 1 <= unit_tokens <= block_tokens or block_tokens % unit_tokens:
        raise ValueError(f"unit_tokens must divide block_tokens {block_tokens}, got {unit_tokens}")
    if unit_tokens > MAX_UNIT_TOKENS:
        raise ValueError(f"unit_tokens may be at most {MAX_UNIT_TOKENS}, got {unit_tokens}")
    if branches < 1 or num_items % branches or num_items > branches * MAX_QUERIES:
        raise ValueError(
            f"items must be of {branches} branches each, of at most {MAX_QUERIES} queries, "
            f"got {num_items}"
        )
    keys = len(blocks.records)
    num_units = keys * (block_tokens // unit_tokens)
    if workspace.reps.dim() != 2:
        raise ValueError(f"reps must be (W, N), got {tuple(workspace.reps.shape)}")
    words = workspace.listers.shape[-1]
    if words != _power_of_2(words):
        raise ValueError(f"listers must have 1, 2, 4 ... words a unit, got {words}")
    if num_items > branches * 32 * words or workspace.reps.shape[1] < num_items:
        raise ValueError(
            f"the workspace is for {min(32 * words * branches, workspace.reps.shape[1])} items, "
            f"got {num_items}"
        )
    matrix, i32 = (prices.world_size, workspace.reps.shape[1]), torch.int32
    tables = {
        "units": (units, (num_items, num_listed), i32),
        "records": (blocks.records, (keys, 4), i32),
        "listers": (workspace.listers, (num_units, words), i32),
        "seats": (workspace.seats, (num_units,), i32),
        "demand": (workspace.demand, (*matrix, 2), torch.int64),
        "reps": (workspace.reps, matrix, i32),
        "gate": (workspace.gate, (1,), torch.int64),
    }
    for name, (tensor, shape, dtype) in tables.items():
        check_tensor(tensor, name, shape, dtype, units.device)
    for name in ("records", "listers", "demand"):
        if tables[name][0].data_ptr() % 16:
            raise ValueError(f"{name} must begin at a multiple of 16 bytes")
    return num_items, num_listed
