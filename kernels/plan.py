"""From selected units to who is asked for what, in one launch: launcher and kernel.

Letters: Q queries, G branches, N = Q * G items, K units of an item, W ranks, B tokens of a block,
U tokens of a unit, F payload forms. The definition is `want`, `route` and `fetch` of the runtime's
plan and `decide` of its predicate.

A program is an item; its units stay in registers. What items must know of one another goes through
small matrices (N, W), and through one bit per (unit, query) in `listers`: from its unit's bits an
item knows how many list it (the fair share), whether it is the first of them (a unit is counted,
and fetched, by its first lister), and with the ways at hand whether it is the first that fetches.
So counts and shares are exact, and the order of all lists follows from the input alone.

Everyone waits for everyone (G1) after the bits and counts, (G2) after the shares, then decides for
itself or, where that is much arithmetic, hears the holders' columns from W programs (G3); (G4) only
where a holder's items are partly fetched, and (G5) only where units are fetched. Programs that are
more than the device holds, or an interpreter, take one launch for each stage instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decide import (
    FETCH,
    MAX_ITEMS,
    MODE_GIVEN,
    MODES,
    Mode,
    PriceTable,
    check_choice,
    check_tensors,
    decide_columns,
    launch_decide,
    three_sums,
)

MAX_UNITS = 4096
MAX_QUERIES = 256  # their bits are 8 words a unit, which a thread still holds in registers
_COUNT, _SHARE, _DECIDE, _FIRST, _LIST, _PLACE = (tl.constexpr(1 << i) for i in range(6))
_ALL = tl.constexpr(63)
_SHARES = tl.constexpr(1 << 28)  # of a unit, so that up to 2**16 units' shares
_COUNTED = tl.constexpr(1 << 44)  # lie below a count in one int64
_COLUMNS = 8  # holders that are handled together
_OWN_DECISION = 512  # (item, holder) pairs up to which every program decides for itself


class Directory(NamedTuple):
    """Where blocks are: the tables of the corpus and of this rank's pool. Keys are block * G + g.

    owners: (keys, R) int32, rank of each copy or -1. generations: (keys,) int32. tokens: (blocks,)
    int32, entries of each block. slot_of: (pool keys,) int32, -1 where a block is not here.
    """

    owners: Tensor
    generations: Tensor
    tokens: Tensor
    slot_of: Tensor
    block_tokens: int
    num_branches: int


class Workspace(NamedTuple):
    """What programs leave for one another: made once, for one launch at a time.

    listers: (units of the corpus, words) int32, a bit per query; zero between launches. seats:
    (units of the corpus,) int32. first, reps: (N, W) int32. gate: (1,) int64, zero before
    the first launch.
    """

    listers: Tensor
    seats: Tensor
    first: Tensor
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
    ) -> Workspace:
        """For plans of up to `num_items` over a corpus of `num_units` stored units."""
        words = -(-num_items // num_branches // 32)
        matrix = (num_items, world_size)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return Workspace(
            listers=zeros(num_units, triton.next_power_of_2(max(words, 1))),
            seats=zeros(num_units),
            first=zeros(*matrix),
            reps=zeros(*matrix),
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


@triton.jit
def _mix(ids, generations):
    """`reference.mix`."""
    x = ids.to(tl.uint32) * 0x9E3779B1 + generations.to(tl.uint32) * 0x85EBCA77 + 0x165667B1
    x = (x ^ (x >> 15)) * 0x2C1B3C6D
    x = (x ^ (x >> 12)) * 0x297A2D39
    return x ^ (x >> 15)


@triton.jit
def _ones(words):
    """How many bits are set in each int32."""
    x = words.to(tl.uint32)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _arrive(gate_ptr, program, ALONE: tl.constexpr):
    """Make this program's writes known and say so; the ticket is for `_wait`.

    The gate's upper half counts how often all have arrived, its lower half is zero between: the
    first program adds what the others leave to be carried. It never needs to be reset.
    """
    tl.debug_barrier()  # a release orders one thread's writes, the barrier puts all before it
    ticket = tl.full((), 0, tl.int64)
    if not ALONE:
        step = tl.where(program == 0, 4294967297 - tl.num_programs(0).to(tl.int64), 1)
        ticket = tl.atomic_add(gate_ptr, step, sem="release", scope="gpu")
    return ticket


@triton.jit
def _wait(gate_ptr, ticket, ALONE: tl.constexpr):
    """Until all have arrived. Every thread acquires for itself."""
    if not ALONE:
        now = ticket
        while (now >> 32) == (ticket >> 32):
            now = tl.inline_asm_elementwise(
                "ld.acquire.gpu.global.u64 $0, [$1];", "=l,l", [gate_ptr],
                dtype=tl.int64, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def _by_holder(values, holder, start, BW: tl.constexpr):
    """(BW,) sums of values (K,) at the holders from `start` on."""
    w = start + tl.arange(0, BW)
    return tl.sum(tl.where(holder[:, None] == w[None, :], values[:, None], 0), axis=0)


@triton.jit
def _of_holder(values, holder, start, BW: tl.constexpr):
    """(K,) from values (BW,) of the holders from `start` on, and which units are theirs."""
    inside = (holder >= start) & (holder < start + BW)
    return tl.gather(values, tl.where(inside, holder - start, 0), 0), inside


@triton.jit
def _rank_among(flags, holder, counts_ptr, W: tl.constexpr, BK: tl.constexpr):
    """How many flagged units of the same holder come before each (K,); stores counts (W,).

    Four holders' counters are in one int64. Unit `_order` is held so that a thread adds up its own
    eight; then one scan over threads remains.
    """
    before = tl.zeros_like(holder)
    shift = ((holder % 4) * 16).to(tl.int64)
    one = tl.where(flags, tl.full((BK,), 1, tl.int64) << shift, 0)
    four = tl.arange(0, 4)
    for group in tl.static_range((W + 3) // 4):
        mine = holder // 4 == group
        eights = tl.reshape(tl.where(mine, one, 0), (8, BK // 8))
        of_thread = tl.sum(eights, axis=0)
        upto = tl.cumsum(eights, axis=0) + (tl.cumsum(of_thread, axis=0) - of_thread)[None, :]
        earlier = (tl.reshape(upto, (BK,)) - one) >> shift
        before = tl.where(mine, earlier.to(tl.int32) & 0xFFFF, before)
        if counts_ptr is not None:
            counts = (tl.sum(of_thread, axis=0) >> (four * 16)).to(tl.int32) & 0xFFFF
            tl.store(counts_ptr + group * 4 + four, counts, mask=group * 4 + four < W)
    return before


@triton.jit
def _order(BK: tl.constexpr):
    """(K,) which unit is where: eight consecutive ones to a thread."""
    at = tl.arange(0, BK)
    return at % (BK // 8) * 8 + at // (BK // 8)


@triton.jit
def _tile(ptr, start, N, W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """(BN, BW) of a matrix (N, W), from column `start` on; 0 outside."""
    n, w = tl.arange(0, BN)[:, None], start + tl.arange(0, BW)[None, :]
    return tl.load(ptr + n * W + w, mask=(n < N) & (w < W), other=0)


@triton.jit
def _remote(units, start, rank, BW: tl.constexpr):
    """Where `units` (BN, BW), from holder `start` on, are asked of another rank."""
    return (units > 0) & (start + tl.arange(0, BW)[None, :] != rank)


@triton.jit
def _store_expected(
    ids, holder, key, tokens_ptr, generations_ptr, expected_ptr, item, hidden_from, hidden_to,
    num_keys, num_blocks, G: tl.constexpr, B: tl.constexpr, U: tl.constexpr, W: tl.constexpr,
    BW: tl.constexpr,
):  # fmt: skip
    """The coverage of what the item lists at each holder, as (entries, mix)."""
    listed = ids >= 0
    generation = tl.load(generations_ptr + key, mask=listed & (key < num_keys), other=0)
    block, offset = key // G, ids % B
    tokens = tl.load(tokens_ptr + block, mask=listed & (block < num_blocks), other=0)
    covered = tl.zeros(ids.shape, tl.int64)
    for u in range(U):
        entry = block * B + offset + u
        seen = (entry < hidden_from) | (entry >= hidden_to)
        one = (_mix(ids + u, generation).to(tl.int64) << 32) + 1
        covered += tl.where(listed & seen & (offset + u < tokens), one, 0)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        sums = _by_holder(covered, holder, start, BW)
        at = expected_ptr + (item * W + w) * 2
        tl.store(at, sums.to(tl.int32), mask=w < W)
        tl.store(at + 1, (sums >> 32).to(tl.int32), mask=w < W)


@triton.jit
def _store_local(
    ids, here, key, slot, rank_in_pair, fill_ptr, local_units_ptr, row, hidden_from, hidden_to,
    G: tl.constexpr, B: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """What is `here` (K,), in order: entry indices where `fill` is given, else stored ids."""
    local = ids
    if fill_ptr is not None:
        offset = ids % B
        there = offset < tl.load(fill_ptr + slot, mask=here & (slot >= 0), other=0)
        if U == 1:
            entry = key // G * B + offset
            there = there & ((entry < hidden_from) | (entry >= hidden_to))
        local = tl.where(there, slot * B + offset, -1)
    tl.store(local_units_ptr + row + rank_in_pair, local, mask=here)


@triton.jit
def _store_demand(
    first, share, holder, first_ptr, reps_ptr, fair_units_ptr, item,
    W: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Per holder, the units that this item counts, and its fair share of all."""
    packed = first.to(tl.int64) * _COUNTED + share
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        sums = _by_holder(packed, holder, start, BW)
        count = (sums // _COUNTED).to(tl.int32)
        fair = (sums % _COUNTED).to(tl.float64) / _SHARES
        tl.store(first_ptr + item * W + w, count, mask=w < W)
        tl.store(reps_ptr + item * W + w, count, mask=w < W)
        tl.store(fair_units_ptr + item * W + w, fair, mask=w < W)


@triton.jit
def _ways(
    way, way_ptr, start, N, W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    IN_HAND: tl.constexpr,
):  # fmt: skip
    """(BN, BW) ways at the holders from `start` on: `way` if this program has decided itself."""
    if not IN_HAND:
        way = _tile(way_ptr, start, N, W, BN, BW).to(tl.int32)
    return way


@triton.jit
def _own_ways(
    way, way_ptr, pairs_units_ptr, holder, item, rank, N,
    W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, IN_HAND: tl.constexpr,
):  # fmt: skip
    """The way of each unit (K,); 1 if some holder is fetched from, 2 if one only by some items."""
    unit_way, state = tl.zeros_like(holder), 0
    for start in range(0, W, BW):
        ways = _ways(way, way_ptr, start, N, W, BN, BW, IN_HAND)
        asked = _remote(_tile(pairs_units_ptr, start, N, W, BN, BW), start, rank, BW)
        mine = tl.where(tl.arange(0, BN)[:, None] == item, ways, 0)
        packed = (asked & (ways == FETCH)).to(tl.int32) + (asked.to(tl.int32) << 12) + (mine << 24)
        sums = tl.sum(packed, axis=0)
        num_fetch, num_asked = sums & 0xFFF, (sums >> 12) & 0xFFF
        states = (num_fetch > 0).to(tl.int32) + ((num_fetch > 0) & (num_fetch < num_asked))
        state = tl.maximum(state, tl.max(states, axis=0))
        found, inside = _of_holder(sums >> 24, holder, start, BW)
        unit_way = tl.where(inside, found, unit_way)
    return unit_way, state


@triton.jit
def _store_routes(
    way, way_ptr, pairs_units_ptr, ids, holder, unit_way, rank_in_pair, expected_ptr,
    items_ptr, units_of_ptr, items_expected_ptr, route_units_ptr, pairs_ptr, listed_ptr,
    form, form_way, item, N, K,
    W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, IN_HAND: tl.constexpr,
):  # fmt: skip
    """This item's part of the lists of one form; pairs in lower halves of int64, units in upper."""
    n = tl.arange(0, BN)[:, None]
    seated = tl.full((), 0, tl.int64)
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        units = _tile(pairs_units_ptr, start, N, W, BN, BW)
        units = tl.where(_ways(way, way_ptr, start, N, W, BN, BW, IN_HAND) == form_way, units, 0)
        both = (units > 0).to(tl.int64) + (units.to(tl.int64) << 32)
        before, mine, after = three_sums(
            tl.where(n < item, both, 0), tl.where(n == item, both, 0), tl.where(n > item, both, 0)
        )
        total = before + mine + after
        base = seated + tl.cumsum(total, axis=0) - mine - after
        if W > BW:
            seated += tl.sum(total, axis=0)

        asked, seat = mine > 0, form * W * N + base.to(tl.int32)
        tl.store(items_ptr + seat, item + tl.zeros((BW,), tl.int32), mask=asked)
        tl.store(units_of_ptr + seat, (mine >> 32).to(tl.int32), mask=asked)
        at = expected_ptr + (item * W + w) * 2
        tl.store(items_expected_ptr + seat * 2, tl.load(at, mask=asked), mask=asked)
        tl.store(items_expected_ptr + seat * 2 + 1, tl.load(at + 1, mask=asked), mask=asked)
        to, inside = _of_holder((base >> 32).to(tl.int32), holder, start, BW)
        to += form * N * K + rank_in_pair
        tl.store(route_units_ptr + to, ids, mask=inside & (unit_way == form_way))
        last = (w < W) & (item == N - 1)
        tl.store(pairs_ptr + form * W + w, total.to(tl.int32), mask=last)
        tl.store(listed_ptr + form * W + w, (total >> 32).to(tl.int32), mask=last)


@triton.jit
def _fetched_first(
    earlier, holder, way, way_ptr, pairs_units_ptr, item, rank, N, G: tl.constexpr,
    W: tl.constexpr, WORDS: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, IN_HAND: tl.constexpr,
):  # fmt: skip
    """(K,) bool: of the `earlier` listers, bits (K, WORDS), none fetches from the unit's holder."""
    n, words = tl.arange(0, BN)[:, None], tl.arange(0, WORDS)[None, :]
    query, bit = n // G, tl.full((BN, 1), 1, tl.int32) << (n // G % 32)
    clash = tl.zeros_like(holder)
    for start in range(0, W, BW):
        fetched = _ways(way, way_ptr, start, N, W, BN, BW, IN_HAND) == FETCH
        fetched &= _remote(_tile(pairs_units_ptr, start, N, W, BN, BW), start, rank, BW)
        fetched &= n % G == item % G
        for word in tl.static_range(WORDS):
            bits = tl.sum(tl.where(fetched & (query // 32 == word), bit, 0), axis=0)
            fetchers, inside = _of_holder(bits, holder, start, BW)
            these = tl.sum(tl.where(words == word, earlier, 0), axis=1)
            clash |= tl.where(inside, these & fetchers, 0)
    return clash == 0


@triton.jit
def _seat_fetched(
    chosen, holder, way, way_ptr, reps_ptr, counts_ptr, item, N, W: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, IN_HAND: tl.constexpr,
):  # fmt: skip
    """(K,) where the `chosen` units of this item come in the fetch list; stores its counts."""
    seat = _rank_among(chosen, holder, None, W, BK)
    seated = 0
    for start in range(0, W, BW):
        w = start + tl.arange(0, BW)
        fetched = _ways(way, way_ptr, start, N, W, BN, BW, IN_HAND) == FETCH
        reps = tl.where(fetched, _tile(reps_ptr, start, N, W, BN, BW), 0)
        # N * K < 2**31 units, so those of this item and later ones lie in the upper half.
        both = tl.where(tl.arange(0, BN)[:, None] < item, 1, 1 + (1 << 32)) * reps.to(tl.int64)
        sums = tl.sum(both, axis=0)
        total, rest = (sums & 0xFFFFFFFF).to(tl.int32), (sums >> 32).to(tl.int32)
        base = seated + tl.cumsum(total, axis=0) - rest
        if W > BW:
            seated += tl.sum(total, axis=0)
        offset, inside = _of_holder(base, holder, start, BW)
        seat = tl.where(inside, seat + offset, seat)
        tl.store(counts_ptr + w, total, mask=(w < W) & (item == N - 1))
    return seat


@triton.jit
def _plan_kernel(
    units_ptr, hidden_ptr, owners_ptr, generations_ptr, tokens_ptr, slot_of_ptr, fill_ptr,
    wait_s_ptr, prices_ptr,
    pairs_units_ptr, unique_units_ptr, fair_units_ptr, way_ptr, expected_ptr,
    items_ptr, units_of_ptr, items_expected_ptr, route_units_ptr, pairs_ptr, listed_ptr,
    fetch_units_ptr, counts_ptr, place_ptr, local_units_ptr, local_lengths_ptr,
    listers_ptr, seats_ptr, first_ptr, reps_ptr, gate_ptr,
    rank, N, K, num_keys, num_blocks, num_pool_keys,
    STAGES: tl.constexpr, MODE: tl.constexpr, DECIDES: tl.constexpr, FORMS: tl.constexpr,
    FIRST_WAY: tl.constexpr, G: tl.constexpr, R: tl.constexpr, B: tl.constexpr, U: tl.constexpr,
    W: tl.constexpr, WORDS: tl.constexpr, SHARED: tl.constexpr,
    BK: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """One item; all stages of it, or one."""
    item = tl.program_id(0)
    query, row = item // G, item * K
    k = _order(BK)
    ids = tl.load(units_ptr + row + k, mask=k < K, other=-1)
    listed = ids >= 0
    key = tl.where(listed, ids // B, 0)
    slot = tl.load(slot_of_ptr + key, mask=listed & (key < num_pool_keys), other=-1)
    owner = tl.load(owners_ptr + key * R + rank % R, mask=listed & (key < num_keys), other=-1)
    holder = tl.where(slot >= 0, rank, tl.where(owner >= 0, owner, W))
    remote = (holder != rank) & (holder < W)

    # One bit per query that lists the unit; `behind` are the queries before this one.
    unit = tl.where(remote, ids // U, 0).to(tl.int64)
    word = tl.arange(0, WORDS)
    behind = tl.where(word * 32 > query, 0, (tl.full((WORDS,), 1, tl.int32) << (query % 32)) - 1)
    behind = tl.where(word * 32 + 32 <= query, -1, behind)[None, :]
    all_listers = listers_ptr + unit[:, None] * WORDS + word[None, :]
    is_remote = remote[:, None] & (word >= 0)[None, :]

    hidden_from, hidden_to = 0, 0
    if hidden_ptr is not None:
        hidden_from = tl.load(hidden_ptr + item * 2)
        hidden_to = tl.load(hidden_ptr + item * 2 + 1)

    ticket = tl.full((), 0, tl.int64)
    if _COUNT & STAGES:
        if SHARED:
            bit = listed.to(tl.int32) << (query % 32)
            tl.atomic_or(listers_ptr + unit * WORDS + query // 32, bit, mask=remote, sem="relaxed")
        else:
            share = tl.where(remote, _SHARES, 0)
            _store_demand(remote, share, holder, first_ptr, reps_ptr, fair_units_ptr, item, W, BW)
    rank_in_pair = tl.zeros((BK,), tl.int32)
    if (_COUNT | _LIST) & STAGES:
        rank_in_pair = _rank_among(holder < W, holder, pairs_units_ptr + item * W, W, BK)
    if _COUNT & STAGES:
        if STAGES == _ALL:
            ticket = _arrive(gate_ptr, item, BN == 1)
        # Behind each arrival comes work that nobody waits for.
        _store_expected(
            ids, holder, key, tokens_ptr, generations_ptr, expected_ptr, item,
            hidden_from, hidden_to, num_keys, num_blocks, G, B, U, W, BW,
        )  # fmt: skip
    if STAGES == _ALL:
        _wait(gate_ptr, ticket, BN == 1)  # G1

    first = remote
    if SHARED and (_SHARE & STAGES):
        masks = tl.load(all_listers, mask=is_remote, other=0)
        sharers = tl.maximum(tl.sum(_ones(masks), axis=1), 1)
        first = remote & (tl.max(((masks & behind) != 0).to(tl.int32), axis=1) == 0)
        share = tl.where(remote, (_SHARES + sharers // 2) // sharers, 0)
        _store_demand(first, share, holder, first_ptr, reps_ptr, fair_units_ptr, item, W, BW)
        if STAGES == _ALL:
            ticket = _arrive(gate_ptr, item, BN == 1)
    if _LIST & STAGES:
        tl.store(local_lengths_ptr + item, tl.load(pairs_units_ptr + item * W + rank))
        _store_local(
            ids, holder == rank, key, slot, rank_in_pair, fill_ptr, local_units_ptr, row,
            hidden_from, hidden_to, G, B, U,
        )  # fmt: skip
    if SHARED and STAGES == _ALL:
        _wait(gate_ptr, ticket, BN == 1)  # G2

    way = tl.zeros((BN, BW), tl.int32)
    if _DECIDE & STAGES and MODE != MODE_GIVEN:
        if DECIDES:
            unique = tl.sum(_tile(first_ptr, 0, N, W, BN, BW), axis=0)
            way = decide_columns(
                0, pairs_units_ptr, fair_units_ptr, unique, wait_s_ptr, prices_ptr, rank, N,
                W, BN, BW, BW, MODE, FORMS, FIRST_WAY,
            )  # fmt: skip
            mine = tl.sum(tl.where(tl.arange(0, BN)[:, None] == item, way, 0), axis=0)
            w = tl.arange(0, BW)
            tl.store(way_ptr + item * W + w, mine.to(tl.int8), mask=w < W)
        else:
            for h in range(item, W, N):
                unique = tl.sum(_tile(first_ptr, h, N, W, BN, 1), axis=0)
                column = decide_columns(
                    h, pairs_units_ptr, fair_units_ptr, unique, wait_s_ptr, prices_ptr, rank, N,
                    W, BN, 1, BW, MODE, FORMS, FIRST_WAY,
                )  # fmt: skip
                n = tl.arange(0, BN)[:, None]
                tl.store(way_ptr + n * W + h, column.to(tl.int8), mask=n < N)
            _wait(gate_ptr, _arrive(gate_ptr, item, BN == 1), BN == 1)  # G3

    if (_FIRST | _LIST | _PLACE) & STAGES:
        unit_way, state = _own_ways(
            way, way_ptr, pairs_units_ptr, holder, item, rank, N, W, BN, BW, DECIDES
        )
        fetched = remote & (unit_way == FETCH)
        if _LIST & STAGES:
            if STAGES == _ALL:
                tl.debug_barrier()  # what other threads have stored in `expected` is read
            for form in tl.static_range(FORMS):
                _store_routes(
                    way, way_ptr, pairs_units_ptr, ids, holder, unit_way, rank_in_pair,
                    expected_ptr, items_ptr, units_of_ptr, items_expected_ptr, route_units_ptr,
                    pairs_ptr, listed_ptr, form, FIRST_WAY + form, item, N, K, W, BN, BW, DECIDES,
                )  # fmt: skip
            if item == N - 1:
                for h in range(W):
                    total = tl.sum(_tile(first_ptr, h, N, W, BN, 1), axis=0)
                    tl.store(unique_units_ptr + h + tl.arange(0, 1), total)

        # A unit's first lister may route it; then the first that fetches it counts and seats it.
        if SHARED and ((_FIRST | _LIST) & STAGES):
            if STAGES != _ALL:
                state = 2  # it takes a launch anyway
            if state == 2:
                earlier = tl.load(all_listers, mask=is_remote, other=0) & behind
                first = _fetched_first(
                    earlier, holder, way, way_ptr, pairs_units_ptr, item, rank, N,
                    G, W, WORDS, BN, BW, DECIDES,
                )  # fmt: skip
                if _FIRST & STAGES:
                    _rank_among(fetched & first, holder, reps_ptr + item * W, W, BK)
                if STAGES == _ALL:
                    _wait(gate_ptr, _arrive(gate_ptr, item, BN == 1), BN == 1)  # G4

        place = tl.full((BK,), -1, tl.int32)
        if _LIST & STAGES:
            if state != 0:
                chosen = fetched & first
                seat = _seat_fetched(
                    chosen, holder, way, way_ptr, reps_ptr, counts_ptr, item, N,
                    W, BK, BN, BW, DECIDES,
                )  # fmt: skip
                tl.store(fetch_units_ptr + seat, ids, mask=chosen)
                place = tl.where(chosen, seat, -1)
                if SHARED:
                    tl.store(seats_ptr + unit, seat, mask=chosen)
                    if STAGES == _ALL:
                        _wait(gate_ptr, _arrive(gate_ptr, item, BN == 1), BN == 1)  # G5
            else:
                if item == N - 1:
                    for h in range(W):
                        tl.store(counts_ptr + h, 0)
        if _PLACE & STAGES:
            if SHARED:
                place = tl.load(seats_ptr + unit, mask=fetched, other=-1)
                nobody = tl.zeros((BK,), tl.int32)
                tl.store(listers_ptr + unit * WORDS + query // 32, nobody, mask=remote)
            tl.store(place_ptr + row + k, place, mask=k < K)


def plan(
    units: Tensor,
    directory: Directory,
    prices: PriceTable,
    workspace: Workspace,
    *,
    rank: int,
    unit_tokens: int = 1,
    mode: Mode = "auto",
    hidden: Tensor | None = None,
    fill: Tensor | None = None,
    wait_s: Tensor | None = None,
    out: Plan | None = None,
) -> Plan:
    """Holders, demand, ways and the lists of what is routed, fetched and here.

    Whatever has a slot here is local, whoever owns it; of other units copy `rank % R` is asked.
    Ids that lie beyond the tables are padding.

    Args:
        units: (N, K) int32 stored ids of the units' first entries, distinct in a row, -1 anywhere;
            Q is up to 256, N up to 1024, K up to 4096.
        unit_tokens: U, divides the directory's block_tokens.
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
    num_items, num_listed = _check(units, directory, prices, workspace, rank, unit_tokens, mode)
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
    check_tensors(device, **{name: (getattr(out, name), *expected[name]) for name in Plan._fields})
    check_tensors(
        device,
        hidden=(hidden, (num_items, 2), torch.int32),
        fill=(fill, (0,) if fill is None else (fill.numel(),), torch.int32),
        wait_s=(wait_s, (world,), torch.float64),
    )
    if num_items == 0:
        for counts in (out.unique_units, out.pairs, out.listed, out.counts):
            counts.zero_()
        return out

    block_k = triton.next_power_of_2(max(num_listed, 16))
    columns = min(triton.next_power_of_2(world), _COLUMNS)
    shared = num_items > directory.num_branches
    fused = is_fused(num_items, num_listed, device)
    decides = fused and mode != "given" and world <= columns and num_items * world <= _OWN_DECISION

    def launch(stages: tl.constexpr, **options: object) -> None:
        _plan_kernel[(num_items,)](
            units, hidden, directory.owners, directory.generations, directory.tokens,
            directory.slot_of, fill, wait_s, prices.numbers, *out, *workspace,
            rank, num_items, num_listed, len(directory.owners), len(directory.tokens),
            len(directory.slot_of),
            STAGES=stages.value, MODE=MODES.index(mode), DECIDES=decides, FORMS=prices.num_forms,
            FIRST_WAY=prices.first_way, G=directory.num_branches, R=directory.owners.shape[1],
            B=directory.block_tokens, U=unit_tokens, W=world, WORDS=workspace.listers.shape[1],
            SHARED=shared, BK=block_k, BN=triton.next_power_of_2(num_items), BW=columns,
            num_warps=warps(num_listed), enable_fp_fusion=False, **options,
        )  # fmt: skip

    if fused:
        # All programs are resident, so they can wait for one another; at most two share an SM.
        per_sm = 1 if num_items <= num_sms(device) else 2
        most = min(65536 // (32 * per_sm * warps(num_listed)), 255)
        launch(_ALL, launch_cooperative_grid=True, maxnreg=most)
        return out
    launch(_COUNT)
    if shared:
        launch(_SHARE)
    if mode != "given":
        launch_decide(
            out.pairs_units,
            out.fair_units,
            out.unique_units,
            workspace.first[:num_items],
            wait_s,
            prices,
            out.way,
            rank=rank,
            mode=mode,
        )
    if shared:
        launch(_FIRST)
    if shared:
        launch(_LIST)
        launch(_PLACE)
    else:
        launch(tl.constexpr(_LIST.value | _PLACE.value))
    return out


def warps(num_listed: int) -> int:
    """Warps of a program: 8 units a thread, up to 16 warps."""
    return int(min(max(triton.next_power_of_2(max(num_listed, 1)) // 256, 4), 16))


def is_fused(num_items: int, num_listed: int, device: torch.device) -> bool:
    """Whether all programs are resident at once, so that one launch does it."""
    if device.type != "cuda" or num_listed > 2048:
        return False
    return num_items <= 2 * num_sms(device)


def num_sms(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check(
    units: Tensor,
    directory: Directory,
    prices: PriceTable,
    workspace: Workspace,
    rank: int,
    unit_tokens: int,
    mode: Mode,
) -> tuple[int, int]:
    """N and K, if what the kernel reads fits together."""
    if units.dim() != 2 or len(units) > MAX_ITEMS or units.shape[1] > MAX_UNITS:
        raise ValueError(
            f"units must be (N, K) of at most {MAX_ITEMS} x {MAX_UNITS}, got {tuple(units.shape)}"
        )
    num_items, num_listed = units.shape
    check_choice(prices, units.device, world_size=prices.world_size, rank=rank, mode=mode)
    block_tokens, branches = directory.block_tokens, directory.num_branches
    if not 1 <= unit_tokens <= block_tokens or block_tokens % unit_tokens:
        raise ValueError(f"unit_tokens must divide block_tokens {block_tokens}, got {unit_tokens}")
    if branches < 1 or num_items % branches or num_items > branches * MAX_QUERIES:
        raise ValueError(
            f"items must be of {branches} branches each, of at most {MAX_QUERIES} queries, "
            f"got {num_items}"
        )
    if directory.owners.dim() != 2 or directory.owners.shape[1] < 1:
        raise ValueError(f"owners must be (keys, R), got {tuple(directory.owners.shape)}")
    keys, copies = directory.owners.shape
    num_units = keys * (block_tokens // unit_tokens)
    words = workspace.listers.shape[-1]
    if words != triton.next_power_of_2(words):
        raise ValueError(f"listers must have 1, 2, 4 ... words a unit, got {words}")
    if num_items > branches * 32 * words or len(workspace.first) < num_items:
        raise ValueError(
            f"the workspace is for {min(32 * words * branches, len(workspace.first))} items, "
            f"got {num_items}"
        )
    matrix, i32 = (len(workspace.first), prices.world_size), torch.int32
    check_tensors(
        units.device,
        units=(units, (num_items, num_listed), i32),
        owners=(directory.owners, (keys, copies), i32),
        generations=(directory.generations, (keys,), i32),
        tokens=(directory.tokens, (keys // branches,), i32),
        slot_of=(directory.slot_of, (directory.slot_of.numel(),), i32),
        listers=(workspace.listers, (num_units, words), i32),
        seats=(workspace.seats, (num_units,), i32),
        first=(workspace.first, matrix, i32),
        reps=(workspace.reps, matrix, i32),
        gate=(workspace.gate, (1,), torch.int64),
    )
    return num_items, num_listed
