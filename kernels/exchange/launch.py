"""An exchange of routed queries and their answers: launcher and kernels over peer memory.

Letters: W ranks, N items of this rank, M rows that arrived, H heads, D query columns, C value
columns, E units of a list, P partials of this rank's own.

Four roles, in this order on the stream, each of them a launch or together with its neighbours:

    send      query rows and unit lists, from the plan, into the inboxes of their holders
    accept    wait for the queries of all other ranks; one dense list of them for `attend`
    answer    partials of the accepted rows into the windows of who asked
    receive   wait for the answers to each item, check their coverage, merge them with its own

Every message has at least its first chunk, and every first chunk is answered, if only by a bare
signal. This is the credit of the flow control: an exchange ends when all answers to it came, so no rank
can be more than one exchange ahead, and a message of this parity finds its place read. The epoch is a
word on the device, counted up once every CTA in the launch of `receive` has read it; replays need no
host.

A CTA waits for other ranks only, and they wait for what this rank has sent, never for what it waits
for; and a launch has no more CTAs than are resident, so that all of them do send.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_tensor
from ..pdl import early, let_next_begin, wait
from .roles import (
    accept_rows,
    advance,
    answer_part,
    headers,
    known_headers,
    note,
    receive_heads,
    send_part,
)
from .types import Accepted, Ends, Merge, Partials, Routes

_WARPS = 4
_REGISTERS = 128  # of a thread, so that an SM holds four CTAs
_CTAS_OF_SM = 65536 // (_REGISTERS * 32 * _WARPS)
_TILE = 2048  # words a CTA copies at once, four accesses of 16 bytes a thread
_WIDE = 4  # so many times a CTA's threads and tile where only a few CTAs may run
_HEADS = 4  # the most that a CTA merges
_MOST_PARTS = 128  # CTAs that copy a chunk; each of them counts, one after another


# Not specialised, so that every rank compiles the same.
@triton.jit(do_not_specialize=["channel_tag", "rank", "budget_ns"])
def _exchange_kernel(
    query, items, units_of, route_units, pairs, expected, units, lengths, query_of, num_rows,
    partial_out, partial_lse, covered, part_outs, part_lses, part_covered, first_tile,
    own_outs, own_lses, out, lse, fault, lacking, own_part_outs, own_part_lses, own_first_tile,
    arena, peers, epoch_ptr, counters, tables, status, ring, channel_tag, rank, budget_ns,
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
    EARLY: tl.constexpr,
):  # fmt: skip
    """Every CTA takes its tasks of each role, role after role; it has sent before it waits."""
    wait(EARLY)
    if ACCEPTS == 0:
        let_next_begin(EARLY)
    cta, ctas = tl.program_id(0), tl.num_programs(0)
    epoch = tl.load(epoch_ptr) + 1
    if SENDS > 0:
        if cta == 0:
            note(ring, epoch, 0, RING)
        for first in range(0, SENDS, ctas):
            if first + cta < SENDS:
                send_part(
                    first + cta, epoch, channel_tag, rank, query, items, units_of, route_units, pairs,
                    tables, arena, peers, counters, W, WP, BP, CHUNKS, CHUNK, QUERY, LIST, LISTS, E,
                    INBOX_CHUNK, QUERY_SIGNALS, OUTBOX, SEND_PARTS, TILE, PUT,
                )  # fmt: skip
        note(ring, epoch, 1, RING)
    idle = ctas - 1 - cta  # from behind: the last CTAs have the fewest tiles to copy
    if ACCEPTS + ANSWERS > 0:
        if ACCEPTS > 0:
            counts, code = headers(epoch, channel_tag, rank, arena, peers, status, budget_ns, W, WP, CHUNKS,
                                    QUERY_SIGNALS, ABORT, ROWS)  # fmt: skip
            # Not sooner: if a rank is late, those SMs are for work that waits for no other rank.
            let_next_begin(EARLY)
        else:
            counts, code = known_headers(
                epoch, channel_tag, rank, arena, W, WP, CHUNKS, QUERY_SIGNALS, ABORT, ROWS
            )
        for first in range(0, ACCEPTS, ctas):
            if first + idle < ACCEPTS:
                accept_rows(
                    first + idle, counts, code, epoch, channel_tag, rank, units, lengths, query_of,
                    num_rows, tables, arena, peers, status, budget_ns, W, CHUNKS, CHUNK, QUERY,
                    LIST, LISTS, E, INBOX_CHUNK, QUERY_SIGNALS, ABORT, ROWS, TILE, GROUP,
                )  # fmt: skip
        if ACCEPTS > 0:
            note(ring, epoch, 2, RING)
        for first in range(0, ANSWERS, ctas):
            if first + cta < ANSWERS:
                answer_part(
                    first + cta, counts, code, epoch, channel_tag, rank, partial_out, partial_lse, covered,
                    part_outs, part_lses, part_covered, first_tile, arena, peers, counters, status,
                    budget_ns, W, CHUNKS, CHUNK, H, M, C, CP, PP, ANSWER_HEADS, AT_ONCE, ANSWER,
                    RECORD, WINDOW, QUERY_SIGNALS, ANSWER_SIGNALS, OUTGOING, ABORT, ANSWER_PARTS, TILE, PUT,
                    ACCEPTS > 0,
                )  # fmt: skip
        if ANSWERS > 0:
            note(ring, epoch, 3, RING)
    if RECEIVES > 0:
        advance(epoch_ptr, epoch, counters + 2 * W * CHUNKS)
        for first in range(0, RECEIVES, ctas):
            if first + idle < RECEIVES:
                receive_heads(
                    first + idle, epoch, channel_tag, rank, own_outs, own_lses, out, lse, fault, lacking,
                    own_part_outs, own_part_lses, own_first_tile, items, pairs, expected,
                    arena, peers, status, budget_ns, W, WP, CHUNKS, CHUNK, H, C,
                    CP, ANSWER, RECORD, WINDOW, ANSWER_SIGNALS, ABORT, N, NP, P,
                    IN_PARTS, OWN_AT_ONCE, HEADS, GROUPS,
                )  # fmt: skip
        note(ring, epoch, 4, RING)


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
    most_heads = wide * _HEADS
    # Who receives does not read ahead, and has the registers for twice as many.
    heads = _heads_of(items, wire.heads, resident, 2 * most_heads)
    answer_heads = _heads_of(others * wire.rows, wire.heads, resident, most_heads)
    groups = triton.cdiv(wire.heads, heads)
    list_tiles, query_tiles = triton.cdiv(wire.units, tile), triton.cdiv(wire.query_words, tile)
    row_tiles = 1 + triton.cdiv(wire.answer_words, tile)
    if parts is not None:
        row_tiles = triton.cdiv(wire.heads, answer_heads)
    # Of what this rank can have to send; others may send up to the wire's rows.
    sent, sent_rows = others * triton.cdiv(items, wire.chunk), min(items, wire.chunk)
    send_parts = _even(sent_rows * (list_tiles + query_tiles), _most_parts(sent, ctas, resident))
    answer_parts = _even(wire.chunk_rows * row_tiles, _most_parts(chunks, ctas, resident))
    group = 1
    while ctas and wire.chunk % (2 * group) == 0 and others * wire.rows >= 2 * group * ctas:
        group *= 2  # rows that a CTA accepts together: else some would have several turns
    tasks = (
        sent * send_parts if send is not None else 0,
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
        rows = (answer.out, answer.lse, answer.covered)
        answered[:3] = [tensor.view(torch.int32) for tensor in rows]
    elif answer is not None and parts is not None:
        columns = answer.out.shape[-1]
        answered = [answer.out, answer.lse, answer.covered, *parts]
    column_room, threads = triton.next_power_of_2(columns), 32 * wide * _WARPS
    ctas = min(max(*tasks, tasks[2] + tasks[3]), resident)
    options: dict[str, Any] = {"num_stages": 1, "maxnreg": _REGISTERS, **early(device)}
    numbers = 32  # of parts that a thread may hold
    if wide == 1 and ctas <= 2 * _multiprocessors(device):
        options["maxnreg"], numbers = 2 * _REGISTERS - 1, 64
    if ends.put is not None:
        options["extern_libs"] = {"libnvshmem_device": ends.put}
    _exchange_kernel[(ctas,)](
        query, routes.items, routes.units_of, routes.route_units, routes.pairs, routes.expected,
        *asked, *answered,
        merge.outs, merge.lses, merge.out, merge.lse, merge.fault, merge.lacking, *merged_parts,
        ends.arena, ends.peers, ends.epoch, ends.counters, ends.tables, ends.status, ends.ring,
        ends.channel_tag, ends.rank, ends.budget_ns,
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
        SENDS=tasks[0], ACCEPTS=tasks[1], ANSWERS=tasks[2], RECEIVES=tasks[3],
        GROUP=group, SEND_PARTS=send_parts, ANSWER_PARTS=answer_parts, ANSWER_HEADS=answer_heads,
        AT_ONCE=_at_once(answer_heads, column_room, threads, numbers),
        IN_PARTS=own_parts is not None,
        OWN_AT_ONCE=_at_once(heads, column_room, threads, numbers),
        TILE=tile, HEADS=heads, GROUPS=groups, PUT=ends.put is not None, num_warps=threads // 32,
        **options,
    )  # fmt: skip


def _most_parts(chunks: int, ctas: int | None, resident: int) -> int:
    """Into how many a chunk may be cut. Few CTAs take their turns evenly if all chunks have as many
    parts as make up whole rounds."""
    if ctas:
        return ctas // math.gcd(ctas, chunks)
    return min(max(resident // chunks, 1), _MOST_PARTS)


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
