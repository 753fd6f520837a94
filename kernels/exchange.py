"""An exchange of routed queries and their answers: launcher and kernels over peer memory.

Letters: W ranks, N items of this rank, M rows that arrived, H heads, D query columns, C value
columns, E units of a list, P partials of this rank's own.

Four roles, in this order on the stream, each of them a launch or together with its neighbours:

    send      query rows and unit lists, from the plan, into the inboxes of their holders
    accept    wait for the queries of all other ranks; one dense list of them for `attend`
    answer    partials of the accepted rows into the windows of who asked
    receive   wait for the answers to each item, check their coverage, merge them with its own

Every message has at least its first chunk, and every first chunk is answered, if only by a bare
signal. That is the credit: an exchange ends when all answers to it came, so nobody can be more than
one exchange ahead, and a message of this parity finds its place read. The epoch is a word on the
device, counted up once everybody in the launch of `receive` has read it; replays need no host.

A CTA waits for other ranks only, which wait for what this one has sent, never for what it waits
for; and a launch has no more CTAs than are resident, so that all of them do send.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from .attend import Workspace
from .checks import check_tensor
from .put import put_and_signal
from .signals import UNTRUE, last_of, publish, stamp_of, tell_abort, wait_for
from .wire import HEAD, LIST_HEAD, Wire

STAMPS = ("begun", "sent", "arrived", "answered", "merged")
_HEAD: tl.constexpr = tl.constexpr(HEAD)
_LIST_HEAD: tl.constexpr = tl.constexpr(LIST_HEAD)
_UNTRUE: tl.constexpr = tl.constexpr(UNTRUE)
_STAMPS: tl.constexpr = tl.constexpr(len(STAMPS))
_WARPS = 4
_REGISTERS = 128  # of a thread, so that an SM holds four CTAs
_CTAS_OF_SM = 65536 // (_REGISTERS * 32 * _WARPS)
_TILE = 2048  # words a CTA copies at once, four accesses of 16 bytes a thread
_WIDE = 4  # so many times a CTA's threads and tile where only a few CTAs may run
_HEADS = 4  # the most that a CTA merges
_MOST_PARTS = 128  # CTAs that copy a chunk; each of them counts, one after another


class Ends(NamedTuple):
    """This rank's end of a channel. Made once by the transport; the kernels alone change it.

    arena: (words,) int32, of `wire`'s layout, zero before the first exchange. peers: (W,) int64,
    where each rank's arena is mapped here; with `put` 0 but for this rank's own. epoch: (1,) int64.
    counters: (2 * W * chunks + 1,) int32, zero. tables: (1,) int32, version of the directory.
    status: (1,) int64 that the host can read at any time, an abort code or 0. ring: (R, stamps)
    int64, nanoseconds of `STAMPS` by epoch % R, or None.
    """

    wire: Wire
    rank: int
    lane: int
    arena: Tensor
    peers: Tensor
    epoch: Tensor
    counters: Tensor
    tables: Tensor
    status: Tensor
    ring: Tensor | None
    budget_ns: int
    put: str | None  # path of NVSHMEM's device library where peers cannot be stored to

    @property
    def inbox(self) -> Tensor:
        """(rows, query words) int32, a view of the arena: what `Accepted.query_of` points into."""
        rows, words = self.wire.query_rows, self.wire.query_words
        return self.arena[: rows * words].view(rows, words)


class Routes(NamedTuple):
    """Of a plan, one form: who is asked for what. `kernels.plan.Plan` says more.

    items, units_of: (W * N,) int32. route_units: (N * E',) int32. pairs: (W,) int32. expected:
    (N, W, 2) int32.
    """

    items: Tensor
    units_of: Tensor
    route_units: Tensor
    pairs: Tensor
    expected: Tensor


class Accepted(NamedTuple):
    """What others ask, for `attend`: rows by source, then as each source listed them.

    units: (M, E) int32. lengths, query_of: (M,) int32, the latter rows of the inbox. num_rows: (1,).
    """

    units: Tensor
    lengths: Tensor
    query_of: Tensor
    num_rows: Tensor

    @staticmethod
    def make(wire: Wire, device: torch.device | str) -> Accepted:
        """With room for all that can arrive."""
        rows = (wire.world_size - 1) * wire.rows

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        return Accepted(empty(rows, wire.units), empty(rows), empty(rows), empty(1))


class Partials(NamedTuple):
    """Of the accepted rows: out (M, H, C), lse (M, H) fp32, covered (M, 2) int32.

    parts: where `attend` left the rows that it cut; they are merged as they leave.
    """

    out: Tensor
    lse: Tensor
    covered: Tensor
    parts: Workspace | None = None


class Merge(NamedTuple):
    """Own partials, outs (P, N, H, C) and lses (P, N, H) fp32, and where the result goes.

    out: (N, H, C), lse: (N, H) fp32; NaN where something was missing. fault: (N,) int32, 0, or 1 +
    the last holder whose answer covers something else than was asked. lacking: (N,) int32, faults
    that the own partials have already.

    parts: where `attend` left the own rows that it cut; P is 1 then.
    """

    outs: Tensor
    lses: Tensor
    out: Tensor
    lse: Tensor
    fault: Tensor
    lacking: Tensor | None = None
    parts: Workspace | None = None


@triton.jit
def _share(counts, peer):
    """Of counts (ranks,), how many rows are of ranks before `peer`, and how many are its own."""
    ranks = tl.arange(0, counts.shape[0])
    before = tl.sum(tl.where(ranks < peer, counts, 0), axis=0)
    return before, tl.sum(tl.where(ranks == peer, counts, 0), axis=0)


@triton.jit
def _part(unit, rank, W: tl.constexpr, PARTS: tl.constexpr):
    """Which of the PARTS of which chunk for which rank; first all first chunks, the next rank first."""
    part, turn = unit % PARTS, unit // PARTS
    return part, turn // (W - 1), (rank + 1 + turn % (W - 1)) % W


@triton.jit
def _message(epoch, peer, chunk, W: tl.constexpr, CHUNKS: tl.constexpr):
    """Which chunk of all it is, in an arena of either parity."""
    return ((epoch & 1) * W + peer) * CHUNKS + chunk


@triton.jit
def _arena_of(peers_ptr, peer):
    return tl.multiple_of(tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _copy(to_ptr, from_ptr, tile, WORDS: tl.constexpr, TILE: tl.constexpr):
    at = tile * TILE + tl.arange(0, TILE)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < WORDS), mask=at < WORDS)


@triton.jit
def _leave(
    counter_ptr, own_ptr, place, from_ptr, words, signal, word, peers_ptr, peer,
    PARTS: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """Publish a chunk that is in place, or put it there if it was staged."""
    signals = tl.full((), signal, tl.int64)
    if PUT:
        if last_of(counter_ptr, PARTS):
            to_signal = (own_ptr + signals).to(tl.pointer_type(tl.int64))
            put_and_signal(own_ptr + place, from_ptr, words, to_signal, word, peer)
    else:
        to_signal = (_arena_of(peers_ptr, peer) + signals).to(tl.pointer_type(tl.int64))
        publish(counter_ptr, PARTS, to_signal, word)


@triton.jit
def _signal(arena_ptr, REGION: tl.constexpr, message):
    return (arena_ptr + REGION).to(tl.pointer_type(tl.int64)) + message


@triton.jit
def _send(
    unit, epoch, lane, rank, query_ptr, items_ptr, units_of_ptr, route_units_ptr, pairs_ptr,
    tables_ptr, own_ptr, peers_ptr, counters_ptr,
    W: tl.constexpr, WP: tl.constexpr, BP: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr, QUERY: tl.constexpr, LIST: tl.constexpr, LISTS: tl.constexpr,
    E: tl.constexpr, INBOX_CHUNK: tl.constexpr, QUERY_SIGNALS: tl.constexpr, OUTBOX: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """The tiles of a chunk that are one part's.

    A tile's words are read while those of the tile before it are written, and its item while those
    of two before it are: else a few CTAs would wait for memory most of the time.
    """
    LIST_TILES: tl.constexpr = (E + TILE - 1) // TILE
    TILES: tl.constexpr = (QUERY + TILE - 1) // TILE
    BEFORE: tl.constexpr = LISTS * QUERY - _HEAD  # of a chunk's words, where its head is
    part, chunk, peer = _part(unit, rank, W, PARTS)
    ranks = tl.arange(0, WP)
    before, count = _share(tl.load(pairs_ptr + ranks, mask=ranks < W, other=0), peer)
    rows = tl.minimum(count - chunk * CHUNK, CHUNK)
    if (rows > 0) | (chunk == 0):
        mine = _message(epoch, rank, chunk, W, CHUNKS)
        place = mine * INBOX_CHUNK
        from_ptr = own_ptr + OUTBOX + _message(epoch, peer, chunk, W, CHUNKS) * INBOX_CHUNK
        to_ptr = from_ptr if PUT else _arena_of(peers_ptr, peer) + place
        if (chunk == 0) & (part == 0):
            tl.store(to_ptr + BEFORE, tl.load(tables_ptr))
        rows = tl.maximum(rows, 0)
        first = before + chunk * CHUNK
        at = tl.arange(0, TILE)
        item = _item_of(items_ptr, first, part, rows, TILES)
        next_item = _item_of(items_ptr, first, part + PARTS, rows, TILES)
        words = _query_tile(query_ptr, item, part, rows, at, QUERY, TILE, TILES)
        for t in range(part, rows * LIST_TILES, PARTS):
            row, tile = t // LIST_TILES, t % LIST_TILES
            length = tl.minimum(tl.load(units_of_ptr + first + row), E)
            all_seats = tl.arange(0, BP)
            earlier = tl.load(units_of_ptr + all_seats, mask=all_seats < first + row, other=0)
            to_list = to_ptr + BEFORE - (row + 1) * LIST
            of_list = tile * TILE + at
            from_list = route_units_ptr + tl.sum(earlier, axis=0) + of_list
            listed = tl.load(from_list, mask=of_list < length)
            tl.store(to_list + _LIST_HEAD + of_list, listed, mask=of_list < length)
            tl.store(to_list, length)
        for t in range(part, rows * TILES, PARTS):
            next_words = _query_tile(query_ptr, next_item, t + PARTS, rows, at, QUERY, TILE, TILES)
            next_item = _item_of(items_ptr, first, t + 2 * PARTS, rows, TILES)
            of_row = t % TILES * TILE + at
            to_row = to_ptr + (LISTS + t // TILES) * QUERY
            tl.store(to_row + of_row, words, mask=of_row < QUERY)
            words = next_words
        skipped = BEFORE - rows * LIST
        _leave(counters_ptr + peer * CHUNKS + chunk, own_ptr, place + skipped, from_ptr + skipped,
               _HEAD + rows * (LIST + QUERY), QUERY_SIGNALS + 2 * mine,
               (stamp_of(epoch, lane) << 16) | count, peers_ptr, peer, PARTS, PUT)  # fmt: skip


@triton.jit
def _item_of(items_ptr, first, t, rows, TILES: tl.constexpr):
    """The item whose query tile t of a chunk is of; `first` is its first row's place in the list."""
    return tl.load(items_ptr + first + t // TILES, mask=t < rows * TILES, other=0).to(tl.int64)


@triton.jit
def _query_tile(
    query_ptr, item, t, rows, at, QUERY: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr
):
    of_row = t % TILES * TILE + at
    return tl.load(
        query_ptr + item * QUERY + of_row, mask=(of_row < QUERY) & (t < rows * TILES), other=0
    )


@triton.jit
def _headers(
    epoch, lane, rank, own_ptr, peers_ptr, status_ptr, budget_ns,
    W: tl.constexpr, WP: tl.constexpr, CHUNKS: tl.constexpr, QUERY_SIGNALS: tl.constexpr,
    ABORT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Wait for all messages to begin: how many rows (ranks,) came, and an abort code or 0."""
    counts = tl.zeros((WP,), tl.int32)
    fault = tl.full((), 0, tl.int64)
    for other in range(W):
        if other != rank:
            header = _signal(own_ptr, QUERY_SIGNALS, _message(epoch, other, 0, W, CHUNKS))
            count, code = wait_for(header, stamp_of(epoch, lane), other, peers_ptr, status_ptr,
                                   budget_ns, rank, ABORT, W)  # fmt: skip
            if (code == 0) & (count > N):
                code = tl.full((), (_UNTRUE << 16) + 1, tl.int64) + other
                tell_abort(code, peers_ptr, status_ptr, ABORT, W)
                count = 0
            counts = tl.where(tl.arange(0, WP) == other, count, counts)
            fault = tl.maximum(fault, code)
    return counts, fault


@triton.jit
def _known_headers(
    epoch, lane, rank, own_ptr,
    W: tl.constexpr, WP: tl.constexpr, CHUNKS: tl.constexpr, QUERY_SIGNALS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """As `_headers` after a launch that waited: what did not come then is missing, and blamed."""
    ranks = tl.arange(0, WP)
    others = (ranks < W) & (ranks != rank)
    words = tl.load(_signal(own_ptr, QUERY_SIGNALS, _message(epoch, ranks, 0, W, CHUNKS)), mask=others,
                    other=0)  # fmt: skip
    counts = (words & 0xFFFF).to(tl.int32)
    there = ((words >> 16) == stamp_of(epoch, lane)) & (counts <= N)
    missing = tl.sum((others & (there == 0)).to(tl.int64), axis=0)
    return tl.where(others & there, counts, 0), missing


@triton.jit
def _accept(
    unit, counts, code, epoch, lane, rank, units_ptr, lengths_ptr, query_of_ptr, num_rows_ptr,
    tables_ptr, own_ptr, peers_ptr, status_ptr, budget_ns,
    W: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, QUERY: tl.constexpr,
    LIST: tl.constexpr, LISTS: tl.constexpr, E: tl.constexpr, INBOX_CHUNK: tl.constexpr,
    QUERY_SIGNALS: tl.constexpr, ABORT: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """GROUP rows of a chunk, for which their one signal is waited."""
    BEFORE: tl.constexpr = LISTS * QUERY - _HEAD
    GROUPS: tl.constexpr = (N + GROUP - 1) // GROUP
    COLUMNS: tl.constexpr = TILE // GROUP
    first, source = unit % GROUPS * GROUP, unit // GROUPS
    source += (source >= rank).to(tl.int32)
    before, count = _share(counts, source)
    if first == 0:
        if code == 0:
            head = own_ptr + _message(epoch, source, 0, W, CHUNKS) * INBOX_CHUNK
            if tl.load(head + BEFORE) != tl.load(tables_ptr):
                untrue = tl.full((), (_UNTRUE << 16) + 1, tl.int64) + source
                tell_abort(untrue, peers_ptr, status_ptr, ABORT, W)
        tl.store(num_rows_ptr, tl.sum(counts, axis=0), mask=unit == 0)
    if first < count:
        message = _message(epoch, source, first // CHUNK, W, CHUNKS)
        arrived, code = wait_for(
            _signal(own_ptr, QUERY_SIGNALS, message), stamp_of(epoch, lane), source, peers_ptr,
            status_ptr, budget_ns, rank, ABORT, W,
        )  # fmt: skip
        seat = first + tl.arange(0, GROUP)
        row, used = seat % CHUNK, seat < count
        from_list = own_ptr + message * INBOX_CHUNK + BEFORE - (row + 1) * LIST
        length = tl.load(from_list, mask=used & (arrived > 0), other=0)
        length = tl.minimum(tl.maximum(length, 0), E)
        m = before + seat
        to_list = units_ptr + m.to(tl.int64) * E
        for tile in range((tl.max(length, axis=0) + COLUMNS - 1) // COLUMNS):
            at = tile * COLUMNS + tl.arange(0, COLUMNS)
            some = at[None, :] < length[:, None]
            listed = tl.load(from_list[:, None] + _LIST_HEAD + at[None, :], mask=some)
            tl.store(to_list[:, None] + at[None, :], listed, mask=some)
        tl.store(lengths_ptr + m, length, mask=used)
        place = (message * (LISTS + CHUNK) + LISTS + row).to(tl.int32)
        tl.store(query_of_ptr + m, place, mask=used)


@triton.jit
def _add(lses, outs, top, total, acc):
    """One more partial of these heads, (HEADS,) and (HEADS, CP); nothing of an empty one can leak."""
    # The maximum may skip a NaN; the shares do not.
    new_top = tl.maximum(top, lses)
    safe_top = tl.where(new_top == -float("inf"), 0.0, new_top)
    share, decay = tl.exp(lses - safe_top), tl.exp(top - safe_top)
    weighted = tl.where(share[:, None] == 0.0, 0.0, outs.to(tl.float32) * share[:, None])
    return new_top, total * decay + share, acc * decay[:, None] + weighted


@triton.jit
def _cut(begin, end, size):
    """First part, and number of parts, of a row whose tiles are [begin, end), of parts of `size`."""
    first = begin // size
    return first, (end - 1) // size - first + 1


@triton.jit
def _parts_from(
    i, m, first, parts, heads, used, columns, out_ptr, lse_ptr, w_out_ptr, w_lse_ptr,
    H: tl.constexpr, C: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The i-th and next parts of a row, AT_ONCE in all: lses (HEADS,) and outs (HEADS, CP) of each."""
    whole = parts == 1
    lses, outs = (), ()
    for j in tl.static_range(AT_ONCE):
        seat = ((first + i + j) * 2 + tl.where(i + j == 0, 1, 0)).to(tl.int64)
        some = used & (i + j < parts)
        lse_at = tl.where(whole, lse_ptr + m * H, w_lse_ptr + seat * H)
        out_at = tl.where(whole, out_ptr + m * H * C, w_out_ptr + seat * H * C)
        rows = tl.multiple_of(out_at, 16) + heads[:, None] * C + columns[None, :]
        lses += (tl.load(lse_at + heads, mask=some, other=-float("inf")),)  # type: ignore[assignment]
        some_columns = some[:, None] & (columns < C)[None, :]
        outs += (tl.load(rows, mask=some_columns, other=0.0),)  # type: ignore[assignment]
    return lses, outs


@triton.jit
def _gathered(
    lses, outs, m, first, parts, heads, used, columns, out_ptr, lse_ptr, w_out_ptr, w_lse_ptr,
    H: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Running maximum (HEADS,), sum (HEADS,) and values (HEADS, CP) of some heads of a row, over the
    parts it was cut into, of which the first are read already."""
    top = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, CP), tl.float32)
    for j in tl.static_range(AT_ONCE):
        top, total, acc = _add(lses[j], outs[j], top, total, acc)
    for i in range(AT_ONCE, parts, AT_ONCE):
        more_lses, more_outs = _parts_from(i, m, first, parts, heads, used, columns, out_ptr, lse_ptr,
                                           w_out_ptr, w_lse_ptr, H, C, AT_ONCE)  # fmt: skip
        for j in tl.static_range(AT_ONCE):
            top, total, acc = _add(more_lses[j], more_outs[j], top, total, acc)
    return top, total, acc


@triton.jit
def _covered_parts(m, first, parts, covered_ptr, w_covered_ptr, PP: tl.constexpr):
    """What the parts of a row cover together, (2,)."""
    every, both = tl.arange(0, PP), tl.arange(0, 2)
    seats = (first + every) * 2 + (every == 0).to(tl.int32)
    found = tl.load(
        w_covered_ptr + seats[:, None] * 2 + both[None, :],
        mask=((every < parts) & (parts > 1))[:, None], other=0,
    )  # fmt: skip
    whole = tl.load(covered_ptr + m * 2 + both, mask=parts == 1, other=0)
    return tl.sum(found, axis=0) + whole


@triton.jit
def _answer(
    unit, counts, code, epoch, lane, rank, out_ptr, lse_ptr, covered_ptr, w_out_ptr, w_lse_ptr,
    w_covered_ptr, first_tile_ptr, own_ptr, peers_ptr, counters_ptr, status_ptr, budget_ns,
    W: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr, M: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, PP: tl.constexpr, HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr, ANSWER: tl.constexpr, RECORD: tl.constexpr, WINDOW: tl.constexpr,
    QUERY_SIGNALS: tl.constexpr,
    ANSWER_SIGNALS: tl.constexpr, OUTGOING: tl.constexpr, ABORT: tl.constexpr,
    PARTS: tl.constexpr, TILE: tl.constexpr, PUT: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """The tiles of a chunk of answers that are one part's, as soon as its queries are there.

    With PP the rows come in parts, and a tile is HEADS of a row's heads; else they are copied.
    """
    TILES: tl.constexpr = (H + HEADS - 1) // HEADS if PP > 0 else 1 + (ANSWER + TILE - 1) // TILE
    part, chunk, source = _part(unit, rank, W, PARTS)
    before, count = _share(counts, source)
    rows = tl.minimum(count - chunk * CHUNK, CHUNK)
    if WAITS & (rows > 0):
        signal = _signal(own_ptr, QUERY_SIGNALS, _message(epoch, source, chunk, W, CHUNKS))
        _, missing = wait_for(signal, stamp_of(epoch, lane), source, peers_ptr, status_ptr,
                              budget_ns, rank, ABORT, W)  # fmt: skip
        code = tl.maximum(code, missing)
    if (code == 0) & ((rows > 0) | (chunk == 0)):
        rows = tl.maximum(rows, 0)
        mine = _message(epoch, rank, chunk, W, CHUNKS)
        place = WINDOW + mine * (CHUNK * RECORD)
        theirs = _message(epoch, source, chunk, W, CHUNKS)
        from_ptr = own_ptr + OUTGOING + theirs * (CHUNK * RECORD)
        to_ptr = from_ptr if PUT else _arena_of(peers_ptr, source) + place
        first_m = before + chunk * CHUNK
        if PP > 0:
            _merge_answers(
                part, rows, first_m, to_ptr, out_ptr, lse_ptr, covered_ptr, w_out_ptr, w_lse_ptr,
                w_covered_ptr, first_tile_ptr, H, M, C, CP, PP, HEADS, AT_ONCE, ANSWER, RECORD, PARTS,
                TILES,
            )  # fmt: skip
        else:
            for t in range(part, rows * TILES, PARTS):
                row, tile = t // TILES, t % TILES
                m = (first_m + row).to(tl.int64)
                record = to_ptr + row * RECORD
                if tile == 0:
                    _copy(record + ANSWER, lse_ptr + m * H, 0, H, triton.next_power_of_2(H))
                    both = tl.arange(0, 2)
                    tl.store(record + ANSWER + H + both, tl.load(covered_ptr + m * 2 + both))
                else:
                    _copy(record, out_ptr + m * ANSWER, tile - 1, ANSWER, TILE)
        _leave(counters_ptr + (W + source) * CHUNKS + chunk, own_ptr, place, from_ptr, rows * RECORD,
               ANSWER_SIGNALS + 2 * mine, (stamp_of(epoch, lane) << 16) | rows, peers_ptr, source,
               PARTS, PUT)  # fmt: skip


@triton.jit
def _merge_answers(
    part, rows, first_m, to_ptr, out_ptr, lse_ptr, covered_ptr, w_out_ptr, w_lse_ptr, w_covered_ptr,
    first_tile_ptr,
    H: tl.constexpr, M: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, PP: tl.constexpr,
    HEADS: tl.constexpr, AT_ONCE: tl.constexpr, ANSWER: tl.constexpr, RECORD: tl.constexpr,
    PARTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Merge rows from the parts they were cut into, straight to where their answer goes.

    What the next tile is made of is read before this one is merged and written.
    """
    size = tl.load(first_tile_ptr + M + 1)
    end_t, columns, both = rows * TILES, tl.arange(0, CP), tl.arange(0, 2)
    m, heads, used = _tile_of(part, end_t, first_m, H, HEADS, TILES)
    first, parts = _cut(tl.load(first_tile_ptr + m), tl.load(first_tile_ptr + m + 1), size)
    lses, outs = _parts_from(0, m, first, parts, heads, used, columns, out_ptr, lse_ptr, w_out_ptr,
                             w_lse_ptr, H, C, AT_ONCE)  # fmt: skip
    next_m, next_heads, next_used = _tile_of(part + PARTS, end_t, first_m, H, HEADS, TILES)
    begin, end = tl.load(first_tile_ptr + next_m), tl.load(first_tile_ptr + next_m + 1)
    for t in range(part, end_t, PARTS):
        next_first, next_parts = _cut(begin, end, size)
        next_lses, next_outs = _parts_from(
            0, next_m, next_first, next_parts, next_heads, next_used, columns, out_ptr, lse_ptr,
            w_out_ptr, w_lse_ptr, H, C, AT_ONCE,
        )  # fmt: skip
        after_m, after_heads, after_used = _tile_of(t + 2 * PARTS, end_t, first_m, H, HEADS, TILES)
        begin, end = tl.load(first_tile_ptr + after_m), tl.load(first_tile_ptr + after_m + 1)

        top, total, acc = _gathered(lses, outs, m, first, parts, heads, used, columns, out_ptr,
                                    lse_ptr, w_out_ptr, w_lse_ptr, H, C, CP, HEADS, AT_ONCE)  # fmt: skip
        record = to_ptr + t // TILES * RECORD
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to_row = record.to(out_ptr.dtype) + heads[:, None] * C + columns[None, :]
        tl.store(to_row, out.to(out_ptr.dtype.element_ty),
                 mask=used[:, None] & (columns < C)[None, :])  # fmt: skip
        tl.store((record + ANSWER).to(lse_ptr.dtype) + heads, top + tl.log(total), mask=used)
        if t % TILES == 0:
            tl.store(record + ANSWER + H + both,
                     _covered_parts(m, first, parts, covered_ptr, w_covered_ptr, PP))  # fmt: skip
        m, heads, used, first, parts = next_m, next_heads, next_used, next_first, next_parts
        lses, outs = next_lses, next_outs
        next_m, next_heads, next_used = after_m, after_heads, after_used


@triton.jit
def _tile_of(t, end_t, first_m, H: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr):
    """Row, heads, and which of them there are, of a chunk's tile t; none behind the last."""
    at = tl.minimum(t, tl.maximum(end_t - 1, 0))
    heads = at % TILES * HEADS + tl.arange(0, HEADS)
    return (first_m + at // TILES).to(tl.int64), heads, (heads < H) & (t < end_t)


@triton.jit
def _receive(
    unit, epoch, lane, rank, outs_ptr, lses_ptr, out_ptr, lse_ptr, fault_ptr, lacking_ptr,
    w_out_ptr, w_lse_ptr, first_tile_ptr, items_ptr, pairs_ptr, expected_ptr,
    own_ptr, peers_ptr, status_ptr, budget_ns,
    W: tl.constexpr, WP: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, ANSWER: tl.constexpr, RECORD: tl.constexpr,
    WINDOW: tl.constexpr, ANSWER_SIGNALS: tl.constexpr, ABORT: tl.constexpr, N: tl.constexpr,
    NP: tl.constexpr, P: tl.constexpr, IN_PARTS: tl.constexpr, AT_ONCE: tl.constexpr,
    HEADS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """HEADS heads of an item. Its own partials are merged before anybody is waited for.

    With IN_PARTS they lie as `attend` cut them.
    """
    item, heads = unit // GROUPS, unit % GROUPS * HEADS + tl.arange(0, HEADS)
    used, columns = heads < H, tl.arange(0, CP)
    top = tl.full((HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, CP), tl.float32)
    if IN_PARTS:
        begin, end = tl.load(first_tile_ptr + item), tl.load(first_tile_ptr + item + 1)
        first, parts = _cut(begin, end, tl.load(first_tile_ptr + N + 1))
        m = item.to(tl.int64)
        own_lses, own_outs = _parts_from(0, m, first, parts, heads, used, columns, outs_ptr, lses_ptr,
                                         w_out_ptr, w_lse_ptr, H, C, AT_ONCE)  # fmt: skip
        top, total, acc = _gathered(
            own_lses, own_outs, m, first, parts, heads, used, columns, outs_ptr, lses_ptr, w_out_ptr,
            w_lse_ptr, H, C, CP, HEADS, AT_ONCE,
        )  # fmt: skip
    else:
        for p in range(P):
            row = (p * N + item).to(tl.int64) * H + heads
            rows = outs_ptr + row[:, None] * C + columns[None, :]
            lses = tl.load(lses_ptr + row, mask=used, other=-float("inf"))
            outs = tl.load(rows, mask=used[:, None] & (columns < C)[None, :], other=0.0)
            top, total, acc = _add(lses, outs, top, total, acc)
    aborted = tl.full((), 0, tl.int64)
    fault = tl.full((), 0, tl.int32)
    if lacking_ptr is not None:
        fault = tl.load(lacking_ptr + item)
    ranks = tl.arange(0, WP)
    pairs = tl.load(pairs_ptr + ranks, mask=ranks < W, other=0)
    for holder in range(W):
        if holder != rank:
            before, count = _share(pairs, holder)
            seats = tl.arange(0, NP)
            asked = tl.load(items_ptr + before + seats, mask=seats < count, other=-1)
            seat = tl.max(tl.where(asked == item, seats, -1), axis=0)
            # The first of them waits for everybody: without this credit a rank that asks nothing
            # could write over what the others have not read yet.
            if (seat >= 0) | (unit == 0):
                chunk = tl.maximum(seat, 0) // CHUNK
                message = _message(epoch, holder, chunk, W, CHUNKS)
                answered, code = wait_for(
                    _signal(own_ptr, ANSWER_SIGNALS, message), stamp_of(epoch, lane), holder,
                    peers_ptr, status_ptr, budget_ns, rank, ABORT, W,
                )  # fmt: skip
                aborted = tl.maximum(aborted, code)
                there = (seat >= 0) & (seat % CHUNK < answered)
                record = own_ptr + WINDOW + message * (CHUNK * RECORD)
                record += tl.maximum(seat, 0) % CHUNK * RECORD
                found = tl.load(record + ANSWER + H, mask=there, other=0)
                found_mix = tl.load(record + ANSWER + H + 1, mask=there, other=0)
                wanted = expected_ptr + (item * W + holder) * 2
                differs = (found != tl.load(wanted)) | (found_mix != tl.load(wanted + 1))
                fault = tl.where((seat >= 0) & differs, holder + 1, fault)
                rows = record.to(outs_ptr.dtype) + heads[:, None] * C + columns[None, :]
                some = used & there
                lses = tl.load((record + ANSWER).to(lses_ptr.dtype) + heads, mask=some,
                               other=-float("inf"))  # fmt: skip
                outs = tl.load(rows, mask=some[:, None] & (columns < C)[None, :], other=0.0)
                top, total, acc = _add(lses, outs, top, total, acc)
    broken = (aborted != 0) | (fault != 0)
    lse = tl.where(broken, float("nan"), top + tl.log(total))
    scale = tl.where(broken, float("nan"), 1.0 / tl.where(total == 0.0, 1.0, total))
    row = item.to(tl.int64) * H + heads
    out = (acc * scale[:, None]).to(out_ptr.dtype.element_ty)
    place = out_ptr + row[:, None] * C + columns[None, :]
    tl.store(place, out, mask=used[:, None] & (columns < C)[None, :])
    tl.store(lse_ptr + row, lse, mask=used)
    tl.store(fault_ptr + item, fault, mask=unit % GROUPS == 0)


@triton.jit
def _advance(epoch_ptr, epoch, counter_ptr):
    """Count the epoch up once every CTA of the launch has read it; no later one reads it again."""
    if last_of(counter_ptr, tl.num_programs(0)):
        tl.store(epoch_ptr, epoch)


@triton.jit
def _note(ring_ptr, epoch, stamp: tl.constexpr, RING: tl.constexpr):
    """The time now, if it is the latest of this stamp and epoch."""
    if RING > 0:
        now = cuda.globaltimer()
        tl.atomic_max(ring_ptr + (epoch % RING) * _STAMPS + stamp, now, sem="relaxed")


@triton.jit(do_not_specialize=["lane", "rank", "budget_ns"])  # so every rank compiles the same
def _exchange_kernel(
    query, items, units_of, route_units, pairs, expected, units, lengths, query_of, num_rows,
    partial_out, partial_lse, covered, part_outs, part_lses, part_covered, first_tile,
    own_outs, own_lses, out, lse, fault, lacking, own_part_outs, own_part_lses, own_first_tile,
    arena, peers, epoch_ptr, counters, tables, status, ring, lane, rank, budget_ns,
    W: tl.constexpr, WP: tl.constexpr, BP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, H: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, E: tl.constexpr, P: tl.constexpr, M: tl.constexpr, PP: tl.constexpr,
    QUERY: tl.constexpr, ANSWER: tl.constexpr,
    LIST: tl.constexpr, LISTS: tl.constexpr, INBOX_CHUNK: tl.constexpr, RECORD: tl.constexpr,
    WINDOW: tl.constexpr, QUERY_SIGNALS: tl.constexpr, ANSWER_SIGNALS: tl.constexpr,
    ABORT: tl.constexpr, OUTBOX: tl.constexpr, OUTGOING: tl.constexpr, RING: tl.constexpr,
    SENDS: tl.constexpr, ACCEPTS: tl.constexpr, ANSWERS: tl.constexpr, RECEIVES: tl.constexpr,
    GROUP: tl.constexpr, SEND_PARTS: tl.constexpr, ANSWER_PARTS: tl.constexpr, ANSWER_HEADS: tl.constexpr,
    AT_ONCE: tl.constexpr, IN_PARTS: tl.constexpr, OWN_AT_ONCE: tl.constexpr,
    TILE: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, PUT: tl.constexpr,
):  # fmt: skip
    """Every CTA takes its units of each role, role after role; it has sent before it waits."""
    cta, ctas = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(epoch_ptr) + 1
    if SENDS > 0:
        if cta == 0:
            _note(ring, epoch, 0, RING)
        for first in range(0, SENDS, ctas):
            if first + cta < SENDS:
                _send(
                    first + cta, epoch, lane, rank, query, items, units_of, route_units, pairs,
                    tables, arena, peers, counters, W, WP, BP, CHUNKS, CHUNK, QUERY, LIST, LISTS, E,
                    INBOX_CHUNK, QUERY_SIGNALS, OUTBOX, SEND_PARTS, TILE, PUT,
                )  # fmt: skip
        _note(ring, epoch, 1, RING)
    idle = ctas - 1 - cta  # from behind: the last CTAs have the fewest tiles to copy
    if ACCEPTS + ANSWERS > 0:
        if ACCEPTS > 0:
            counts, code = _headers(epoch, lane, rank, arena, peers, status, budget_ns, W, WP, CHUNKS,
                                    QUERY_SIGNALS, ABORT, ROWS)  # fmt: skip
        else:
            counts, code = _known_headers(
                epoch, lane, rank, arena, W, WP, CHUNKS, QUERY_SIGNALS, ROWS
            )
        for first in range(0, ACCEPTS, ctas):
            if first + idle < ACCEPTS:
                _accept(
                    first + idle, counts, code, epoch, lane, rank, units, lengths, query_of,
                    num_rows, tables, arena, peers, status, budget_ns, W, CHUNKS, CHUNK, QUERY,
                    LIST, LISTS, E, INBOX_CHUNK, QUERY_SIGNALS, ABORT, ROWS, TILE, GROUP,
                )  # fmt: skip
        if ACCEPTS > 0:
            _note(ring, epoch, 2, RING)
        for first in range(0, ANSWERS, ctas):
            if first + cta < ANSWERS:
                _answer(
                    first + cta, counts, code, epoch, lane, rank, partial_out, partial_lse, covered,
                    part_outs, part_lses, part_covered, first_tile, arena, peers, counters, status,
                    budget_ns, W, CHUNKS, CHUNK, H, M, C, CP, PP, ANSWER_HEADS, AT_ONCE, ANSWER,
                    RECORD, WINDOW, QUERY_SIGNALS, ANSWER_SIGNALS, OUTGOING, ABORT, ANSWER_PARTS, TILE, PUT,
                    ACCEPTS > 0,
                )  # fmt: skip
        if ANSWERS > 0:
            _note(ring, epoch, 3, RING)
    if RECEIVES > 0:
        _advance(epoch_ptr, epoch, counters + 2 * W * CHUNKS)
        for first in range(0, RECEIVES, ctas):
            if first + idle < RECEIVES:
                _receive(
                    first + idle, epoch, lane, rank, own_outs, own_lses, out, lse, fault, lacking,
                    own_part_outs, own_part_lses, own_first_tile, items, pairs, expected,
                    arena, peers, status, budget_ns, W, WP, CHUNKS, CHUNK, H, C,
                    CP, ANSWER, RECORD, WINDOW, ANSWER_SIGNALS, ABORT, N, NP, P,
                    IN_PARTS, OWN_AT_ONCE, HEADS, GROUPS,
                )  # fmt: skip
        _note(ring, epoch, 4, RING)


def exchange(
    ends: Ends,
    routes: Routes,
    *,
    send: Tensor | None = None,
    accept: Accepted | None = None,
    answer: Partials | None = None,
    receive: Merge | None = None,
    ctas: int | None = None,
) -> None:
    """Launch the given roles as one kernel; on the stream they must follow in their order.

    Args:
        send: the queries (N, H, D) of this rank's items, rope applied.
        accept: where to list what the others ask; its rows beyond `num_rows` are not written.
        answer: partials of the accepted rows, of `send`'s dtype.
        receive: own partials in, the merged result out.
        ctas: run on so many SMs only, with as many threads each as one takes, so that an attention
            on the others goes on beside it. By default all SMs help.
    Raises:
        ValueError: on shapes, dtypes or devices that do not fit the wire, or on no role.
    """
    wire, device = ends.wire, ends.arena.device
    others, items = wire.world_size - 1, len(routes.expected)
    roles = (send, accept, answer, receive)
    if all(role is None for role in roles):
        raise ValueError("give at least one of send, accept, answer and receive")
    _check(ends, routes, send, accept, answer, receive)
    if ctas is not None and not 1 <= ctas <= _multiprocessors(device):
        raise ValueError(f"ctas must be 1 to {_multiprocessors(device)}, got {ctas}")
    parts = None if answer is None else answer.parts
    wide = 1 if ctas is None else _WIDE
    tile, chunks = wide * _TILE, others * wire.chunks
    resident = ctas or _multiprocessors(device) * _CTAS_OF_SM
    # Few CTAs take their turns evenly if all chunks have as many parts as make up whole rounds.
    most = ctas // math.gcd(ctas, chunks) if ctas else min(max(resident // chunks, 1), _MOST_PARTS)
    most_heads = wide * _HEADS
    # Who receives does not read ahead, and has the registers for twice as many.
    heads = _heads_of(items, wire.heads, resident, 2 * most_heads)
    answer_heads = _heads_of(others * wire.rows, wire.heads, resident, most_heads)
    groups = triton.cdiv(wire.heads, heads)
    list_tiles, query_tiles = triton.cdiv(wire.units, tile), triton.cdiv(wire.query_words, tile)
    row_tiles = 1 + triton.cdiv(wire.answer_words, tile)
    if parts is not None:
        row_tiles = triton.cdiv(wire.heads, answer_heads)
    send_parts = _even(wire.chunk_rows * (list_tiles + query_tiles), most)
    answer_parts = _even(wire.chunk_rows * row_tiles, most)
    group = 1
    while ctas and wire.chunk % (2 * group) == 0 and others * wire.rows >= 2 * group * ctas:
        group *= 2  # rows that a CTA accepts together: else some would have several turns
    units = (
        chunks * send_parts if send is not None else 0,
        others * triton.cdiv(wire.rows, group) if accept is not None else 0,
        chunks * answer_parts if answer is not None else 0,
        items * groups if receive is not None else 0,
    )
    nothing = ends.counters  # what a role that does not take part points to
    query = nothing if send is None else send.view(torch.int32)
    asked = accept or Accepted(nothing, nothing, nothing, nothing)
    merge = receive or Merge(nothing, nothing, nothing, nothing, nothing)
    answered, merged_parts = [nothing] * 7, [nothing] * 3
    own_parts = merge.parts
    if own_parts is not None:
        merged_parts = [own_parts.out, own_parts.lse, own_parts.first_tile]
    columns = 1 if receive is None else merge.outs.shape[-1]
    if answer is not None and parts is None:  # copied as words, whatever they hold
        answered[:3] = [t.view(torch.int32) for t in answer[:3]]
    elif answer is not None and parts is not None:
        columns = answer.out.shape[-1]
        answered = [*answer[:3], *parts]
    column_room, threads = triton.next_power_of_2(columns), 32 * wide * _WARPS
    ctas = min(max(*units, units[2] + units[3]), resident)
    options: dict[str, Any] = {"num_stages": 1, "maxnreg": _REGISTERS}
    numbers = 32  # of parts that a thread may hold
    if wide == 1 and ctas <= 2 * _multiprocessors(device):
        options["maxnreg"], numbers = 2 * _REGISTERS - 1, 64
    if ends.put is not None:
        options["extern_libs"] = {"libnvshmem_device": ends.put}
    _exchange_kernel[(ctas,)](
        query, routes.items, routes.units_of, routes.route_units, routes.pairs, routes.expected,
        *asked, *answered, *merge[:6], *merged_parts,
        ends.arena, ends.peers, ends.epoch, ends.counters, ends.tables, ends.status, ends.ring,
        ends.lane, ends.rank, ends.budget_ns,
        W=wire.world_size, WP=triton.next_power_of_2(wire.world_size),
        BP=triton.next_power_of_2(wire.world_size * items), N=items,
        NP=triton.next_power_of_2(items), ROWS=wire.rows, CHUNKS=wire.chunks, CHUNK=wire.chunk,
        H=wire.heads, C=columns, CP=column_room, E=wire.units,
        P=0 if receive is None else len(merge.outs), M=others * wire.rows,
        PP=0 if parts is None else triton.next_power_of_2(len(parts.out)),
        QUERY=wire.query_words,
        ANSWER=wire.answer_words, LIST=wire.list_words, LISTS=wire.list_rows,
        INBOX_CHUNK=wire.inbox_chunk, RECORD=wire.record, WINDOW=wire.window,
        QUERY_SIGNALS=wire.query_signals, ANSWER_SIGNALS=wire.answer_signals, ABORT=wire.abort,
        OUTBOX=wire.outbox, OUTGOING=wire.outgoing,
        RING=0 if ends.ring is None else len(ends.ring),
        SENDS=units[0], ACCEPTS=units[1], ANSWERS=units[2], RECEIVES=units[3],
        GROUP=group, SEND_PARTS=send_parts, ANSWER_PARTS=answer_parts, ANSWER_HEADS=answer_heads,
        AT_ONCE=_at_once(answer_heads, column_room, threads, numbers),
        IN_PARTS=own_parts is not None,
        OWN_AT_ONCE=_at_once(heads, column_room, threads, numbers),
        TILE=tile, HEADS=heads, GROUPS=groups, PUT=ends.put is not None, num_warps=threads // 32,
        **options,
    )  # fmt: skip


def _heads_of(rows: int, heads: int, ctas: int, most: int) -> int:
    """How many heads of a row a CTA merges: fewer where else some CTAs had nothing to do."""
    return int(
        min(
            triton.next_power_of_2(triton.cdiv(rows * heads, ctas)),
            most,
            triton.next_power_of_2(heads),
        )
    )


def _at_once(heads: int, columns: int, threads: int, numbers: int) -> int:
    """How many parts of so many heads' columns a CTA reads together, `numbers` a thread at most."""
    return int(min(max(numbers * threads // (heads * columns), 1), 8))


def _even(tiles: int, most: int) -> int:
    """As many parts, `most` of them, as a chunk's tiles fall into evenly."""
    return int(triton.cdiv(tiles, triton.cdiv(tiles, most)))


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check(
    ends: Ends,
    routes: Routes,
    send: Tensor | None,
    accept: Accepted | None,
    answer: Partials | None,
    receive: Merge | None,
) -> None:
    wire, device = ends.wire, ends.arena.device
    i32, f32, heads = torch.int32, torch.float32, wire.heads
    items = len(routes.expected)
    if not 1 <= items <= wire.rows:
        raise ValueError(f"expected must be of 1 to {wire.rows} items, got {items}")
    pairs = wire.world_size * items
    shape: tuple[int | None, ...]
    listed: list[tuple[str, Tensor | None, tuple[int | None, ...], torch.dtype | None]] = [
        ("items", routes.items, (pairs,), i32),
        ("units_of", routes.units_of, (pairs,), i32),
        ("route_units", routes.route_units, (None,), i32),
        ("pairs", routes.pairs, (wire.world_size,), i32),
        ("expected", routes.expected, (items, wire.world_size, 2), i32),
    ]
    if send is not None:
        listed += [("send", send, (items, heads, None), None)]
        _words("send", send, wire.query_words)
    rows: int | None = None
    if accept is not None:
        rows = (wire.world_size - 1) * wire.rows
        listed += [
            ("units", accept.units, (rows, wire.units), i32),
            ("lengths", accept.lengths, (rows,), i32),
            ("query_of", accept.query_of, (rows,), i32),
            ("num_rows", accept.num_rows, (1,), i32),
        ]
    if answer is not None:
        rows = (wire.world_size - 1) * wire.rows
        listed += [
            ("partial out", answer.out, (rows, heads, None), None),
            ("partial lse", answer.lse, (rows, heads), f32),
            ("covered", answer.covered, (rows, 2), i32),
        ]
        _words("partial out", answer.out, wire.answer_words)
        if answer.parts is not None:
            parts, columns = len(answer.parts.out), answer.out.shape[-1]
            shape = (parts, 2, heads, columns)
            listed += [
                ("parts.out", answer.parts.out, shape, answer.out.dtype),
                ("parts.lse", answer.parts.lse, shape[:-1], f32),
                ("parts.covered", answer.parts.covered, (parts, 2, 2), i32),
                ("parts.first_tile", answer.parts.first_tile, (rows + 2,), i32),
            ]
    if receive is not None:
        columns, partials = receive.outs.shape[-1], len(receive.outs)
        listed += [
            ("outs", receive.outs, (partials, items, heads, columns), None),
            ("lses", receive.lses, (partials, items, heads), f32),
            ("out", receive.out, (items, heads, columns), None),
            ("lse", receive.lse, (items, heads), f32),
            ("fault", receive.fault, (items,), i32),
            ("lacking", receive.lacking, (items,), i32),
        ]
        _words("outs", receive.outs.flatten(0, 1), wire.answer_words)
        if receive.parts is not None:
            parts = len(receive.parts.out)
            if partials != 1:
                raise ValueError(f"rows in parts are of one partial, got {partials}")
            own_shape = (parts, 2, heads, columns)
            listed += [
                ("parts.out", receive.parts.out, own_shape, receive.outs.dtype),
                ("parts.lse", receive.parts.lse, own_shape[:-1], f32),
                ("parts.first_tile", receive.parts.first_tile, (items + 2,), i32),
            ]
    for name, tensor, shape, dtype in listed:
        check_tensor(tensor, name, shape, dtype, device)


def _words(name: str, rows: Tensor, words: int) -> None:
    got = rows.stride(0) * rows.element_size()
    if got != 4 * words:
        raise ValueError(f"{name}: a row must have {4 * words} bytes on this wire, got {got}")
