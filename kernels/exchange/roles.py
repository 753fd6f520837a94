"""What CTAs do in the four roles of an exchange; `launch.py` launches them.

Letters as there: W ranks, N items of this rank, M rows that arrived, H heads, C value columns, E units
of a list. QUERY, ANSWER, LIST and RECORD are words of a row's messages, a chunk is CHUNK rows in PARTS
or TILES. Every function is of one CTA and one task of its role.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda

from .layout import HEAD, LIST_HEAD
from .nvshmem_put import put_and_signal
from .signals import INVALID, last_of, publish, set_abort, stamp_of, wait_for

STAMPS = ("begun", "sent", "arrived", "answered", "merged")
_HEAD: tl.constexpr = tl.constexpr(HEAD)
_LIST_HEAD: tl.constexpr = tl.constexpr(LIST_HEAD)
_INVALID: tl.constexpr = tl.constexpr(INVALID)
_STAMPS: tl.constexpr = tl.constexpr(len(STAMPS))


@triton.jit
def _share(counts, peer):
    """Of counts (ranks,), how many rows are of ranks before `peer`, and how many are its own."""
    ranks = tl.arange(0, counts.shape[0])
    before = tl.sum(tl.where(ranks < peer, counts, 0), axis=0)
    return before, tl.sum(tl.where(ranks == peer, counts, 0), axis=0)


@triton.jit
def _part(task, rank, W: tl.constexpr, PARTS: tl.constexpr):
    """Which of the PARTS of which chunk for which rank; first all first chunks, the next rank first."""
    part, turn = task % PARTS, task // PARTS
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
def send_part(
    task, epoch, channel_tag, rank, query_ptr, items_ptr, units_of_ptr, route_units_ptr, pairs_ptr,
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
    part, chunk, peer = _part(task, rank, W, PARTS)
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
               (stamp_of(epoch, channel_tag) << 16) | count, peers_ptr, peer, PARTS, PUT)  # fmt: skip


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
def headers(
    epoch, channel_tag, rank, own_ptr, peers_ptr, status_ptr, budget_ns,
    W: tl.constexpr, WP: tl.constexpr, CHUNKS: tl.constexpr, QUERY_SIGNALS: tl.constexpr,
    ABORT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Wait for all messages to begin: how many rows (ranks,) came, and an abort code or 0."""
    counts = tl.zeros((WP,), tl.int32)
    fault = tl.full((), 0, tl.int64)
    for other in range(W):
        if other != rank:
            header = _signal(own_ptr, QUERY_SIGNALS, _message(epoch, other, 0, W, CHUNKS))
            count, code = wait_for(header, stamp_of(epoch, channel_tag), other, peers_ptr, status_ptr,
                                   budget_ns, rank, ABORT, W)  # fmt: skip
            if (code == 0) & (count > N):
                code = tl.full((), (_INVALID << 16) + 1, tl.int64) + other
                set_abort(code, peers_ptr, status_ptr, ABORT, W)
                count = 0
            counts = tl.where(tl.arange(0, WP) == other, count, counts)
            fault = tl.maximum(fault, code)
    return counts, fault


@triton.jit
def known_headers(
    epoch, channel_tag, rank, own_ptr,
    W: tl.constexpr, WP: tl.constexpr, CHUNKS: tl.constexpr, QUERY_SIGNALS: tl.constexpr,
    ABORT: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """As `headers` after a launch that waited: what did not come then is missing, and blamed.

    If that launch gave up on a rank, no rank is answered, though the header may be here by now: the rows
    to be answered were not attended.
    """
    ranks = tl.arange(0, WP)
    others = (ranks < W) & (ranks != rank)
    words = tl.load(_signal(own_ptr, QUERY_SIGNALS, _message(epoch, ranks, 0, W, CHUNKS)), mask=others,
                    other=0)  # fmt: skip
    counts = (words & 0xFFFF).to(tl.int32)
    there = ((words >> 16) == stamp_of(epoch, channel_tag)) & (counts <= N)
    missing = tl.sum((others & (there == 0)).to(tl.int64), axis=0)
    code = tl.load((own_ptr + ABORT).to(tl.pointer_type(tl.int64)))
    return tl.where(others & there, counts, 0), tl.maximum(missing, code)


@triton.jit
def accept_rows(
    task, counts, code, epoch, channel_tag, rank, units_ptr, lengths_ptr, query_of_ptr, num_rows_ptr,
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
    first, source = task % GROUPS * GROUP, task // GROUPS
    source += (source >= rank).to(tl.int32)
    before, count = _share(counts, source)
    if first == 0:
        if code == 0:
            head = own_ptr + _message(epoch, source, 0, W, CHUNKS) * INBOX_CHUNK
            if tl.load(head + BEFORE) != tl.load(tables_ptr):
                invalid = tl.full((), (_INVALID << 16) + 1, tl.int64) + source
                set_abort(invalid, peers_ptr, status_ptr, ABORT, W)
        tl.store(num_rows_ptr, tl.sum(counts, axis=0), mask=task == 0)
    if first < count:
        message = _message(epoch, source, first // CHUNK, W, CHUNKS)
        arrived, code = wait_for(
            _signal(own_ptr, QUERY_SIGNALS, message), stamp_of(epoch, channel_tag), source, peers_ptr,
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
def answer_part(
    task, counts, code, epoch, channel_tag, rank, out_ptr, lse_ptr, covered_ptr, w_out_ptr, w_lse_ptr,
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
    part, chunk, source = _part(task, rank, W, PARTS)
    before, count = _share(counts, source)
    rows = tl.minimum(count - chunk * CHUNK, CHUNK)
    if WAITS & (rows > 0):
        signal = _signal(own_ptr, QUERY_SIGNALS, _message(epoch, source, chunk, W, CHUNKS))
        _, missing = wait_for(signal, stamp_of(epoch, channel_tag), source, peers_ptr, status_ptr,
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
               ANSWER_SIGNALS + 2 * mine, (stamp_of(epoch, channel_tag) << 16) | rows, peers_ptr, source,
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
def receive_heads(
    task, epoch, channel_tag, rank, outs_ptr, lses_ptr, out_ptr, lse_ptr, fault_ptr, lacking_ptr,
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
    item, heads = task // GROUPS, task % GROUPS * HEADS + tl.arange(0, HEADS)
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
            # The first of them waits for all ranks: without this credit a rank that asks nothing
            # could write over what the others have not read yet.
            if (seat >= 0) | (task == 0):
                chunk = tl.maximum(seat, 0) // CHUNK
                message = _message(epoch, holder, chunk, W, CHUNKS)
                answered, code = wait_for(
                    _signal(own_ptr, ANSWER_SIGNALS, message), stamp_of(epoch, channel_tag), holder,
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
    tl.store(fault_ptr + item, fault, mask=task % GROUPS == 0)


@triton.jit
def advance(epoch_ptr, epoch, counter_ptr):
    """Count the epoch up once every CTA of the launch has read it; no later one reads it again."""
    if last_of(counter_ptr, tl.num_programs(0)):
        tl.store(epoch_ptr, epoch)


@triton.jit
def note(ring_ptr, epoch, stamp: tl.constexpr, RING: tl.constexpr):
    """The time now, if it is the latest of this stamp and epoch."""
    if RING > 0:
        now = cuda.globaltimer()
        tl.atomic_max(ring_ptr + (epoch % RING) * _STAMPS + stamp, now, sem="relaxed")
