"""The exchange kernels, rank after rank in one process: movement bitwise, merge against its definition."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime.errors import InterpreterError
from wires import asked, connected, due, partials_of, room, target

from qroam.kernels.attend import AttendWorkspace
from qroam.kernels.exchange import roles, signals
from qroam.kernels.exchange.launch import exchange
from qroam.kernels.exchange.layout import Wire
from qroam.kernels.exchange.roles import STAMPS
from qroam.kernels.exchange.signals import INVALID, SILENT, blame
from qroam.kernels.exchange.types import Accepted, Ends, Merge, Partials

COLUMNS = 16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = TypeVar("T")


def moved(given: T, device: torch.device = DEVICE) -> T:
    """A tensor, or all tensors of a tuple, on the device."""
    if isinstance(given, Tensor):
        return given.to(device)  # type: ignore[return-value]
    if isinstance(given, tuple):
        parts = [moved(part, device) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    return given


def small_wire(world: int, *, rows: int = 5, chunk: int = 2, units: int = 7) -> Wire:
    """4 heads of 24 query columns and 16 value columns, fp16."""
    return Wire(
        world_size=world,
        rows=rows,
        heads=4,
        query_words=4 * 24 // 2,
        answer_words=4 * COLUMNS // 2,
        units=units,
        chunk=chunk,
    )


def queries(ends: Ends, accepted: Accepted) -> tuple[Tensor, Tensor]:
    """The accepted rows' queries (M, H, D) and list lengths (M,)."""
    rows = int(accepted.num_rows)
    inbox = ends.inbox.view(torch.float16).view(-1, ends.wire.heads, 24)
    return inbox[accepted.query_of[:rows].long()], accepted.lengths[:rows]


def full(wire: Wire, answer: Partials) -> Partials:
    """With capacity for all that can arrive, poisoned."""
    rows = (wire.world_size - 1) * wire.rows
    padded = [torch.full((rows, *t.shape[1:]), 77).to(t.dtype) for t in answer[:3]]
    for to, given in zip(padded, answer[:3], strict=True):
        to[: len(given)] = given
    out, lse, covered = padded
    return Partials(out, lse, covered)


@pytest.mark.parametrize(("world", "items"), [(2, 5), (2, 1), (3, 5), (4, 2)])
def test_every_row_arrives_and_every_answer_returns(world: int, items: int) -> None:
    wire = small_wire(world)
    ends = connected(wire, [DEVICE] * world)
    for epoch in range(3):
        given = [
            asked(wire, r, items, columns=COLUMNS, seed=epoch, dtype=torch.float16)
            for r in range(world)
        ]
        there = [moved(ask) for ask in given]
        accepted = [room(wire, DEVICE) for _ in ends]
        merged = [target(a) for a in there]
        for end, ask in zip(ends, there, strict=True):
            exchange(end, ask.routes, send=ask.query)
        for end, ask, rows in zip(ends, there, accepted, strict=True):
            exchange(end, ask.routes, accept=rows)
        for holder, (end, ask, came) in enumerate(zip(ends, there, accepted, strict=True)):
            found, lengths = moved(queries(end, came), torch.device("cpu"))
            rows = moved(came, torch.device("cpu"))
            start = 0
            for source in range(world):
                if source == holder:
                    continue
                chosen = given[source].routed[:, holder].nonzero()[:, 0]
                stop = start + len(chosen)
                assert torch.equal(found[start:stop], given[source].query[chosen])
                sizes = given[source].routes.expected[chosen, holder, 0]
                assert torch.equal(lengths[start:stop], sizes)
                before = int(given[source].routes.pairs[:holder].sum())
                listed = int(given[source].routes.units_of[:before].sum())
                for m, size in enumerate(sizes.tolist(), start):
                    units = given[source].routes.route_units[listed : listed + size]
                    assert torch.equal(rows.units[m, :size], units)
                    listed += size
                start = stop
            assert start == int(rows.num_rows)
            answer = full(wire, partials_of(found, lengths, COLUMNS))
            exchange(end, ask.routes, answer=moved(answer))
        for end, ask, wanted, merge in zip(ends, there, given, merged, strict=True):
            exchange(end, ask.routes, receive=merge)
            out, lse = due(wanted, COLUMNS)
            torch.testing.assert_close(merge.out.float().cpu(), out, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(merge.lse.cpu(), lse, rtol=1e-6, atol=1e-6)
            assert not merge.fault.any()
        assert [int(end.epoch) for end in ends] == [epoch + 1] * world
        assert not any(int(end.status) for end in ends)
        assert not any(bool(end.counters.any()) for end in ends)


def cut(answer: Partials, rows: int, *, parts: int, seed: int) -> Partials:
    """These partials as `attend` leaves rows that it cuts: tiles of all rows in one sequence, in
    equal shares, and of a row that is cut a partial in each part that has some of it."""
    g = torch.Generator().manual_seed(seed)
    capacity = len(answer.out)
    tiles = torch.zeros(capacity, dtype=torch.int64)
    tiles[:rows] = torch.randint(1, 6, (rows,), generator=g)
    ends = tiles.cumsum(0)
    chunk = max(-(-int(ends[-1]) // parts), 1)
    made = AttendWorkspace.make(
        rows=capacity, heads=answer.out.shape[1], value_dim=answer.out.shape[2], parts=parts,
        device="cpu", dtype=answer.out.dtype,
    )  # fmt: skip
    for tensor in made:
        tensor.fill_(77)
    made.first_tile[:capacity] = (ends - tiles).int()
    made.first_tile[capacity:] = torch.tensor([int(ends[-1]), chunk])
    whole = answer._replace(out=answer.out.clone(), lse=answer.lse.clone(), parts=made)
    for m in range(rows):
        begin, end = int(ends[m] - tiles[m]), int(ends[m])
        first, last = begin // chunk, (end - 1) // chunk
        if first == last:
            continue
        shares = torch.rand(last - first + 1, generator=g)
        shares[0] = 0.0  # a part of which nothing was there
        shares /= shares.sum()
        for i, share in enumerate(shares):
            seat = (first + i, int(i == 0))
            empty = share == 0 or bool((answer.lse[m] == -torch.inf).all())
            made.out[seat] = torch.nan if empty else answer.out[m]
            made.lse[seat] = answer.lse[m] + share.log()
            made.covered[seat] = answer.covered[m] if i == 1 else 0
        whole.out[m], whole.lse[m] = torch.nan, torch.nan
    whole.covered[whole.lse.isnan().any(1)] = 12345
    return whole


def test_cut_rows_are_merged_as_they_leave() -> None:
    """And own rows as they are received; and few wide CTAs do the same."""
    wire = small_wire(2)
    for epoch, (parts, ctas) in enumerate([(3, None), (9, 2), (40, 3)]):
        ends = connected(wire, [DEVICE] * 2)
        given = [
            asked(wire, r, 4, columns=COLUMNS, seed=epoch, dtype=torch.float16) for r in range(2)
        ]
        there = [moved(ask) for ask in given]
        merged = [target(a) for a in there]
        accepted = [room(wire, DEVICE) for _ in ends]
        lacking = torch.tensor([0, 0, 0, 2], dtype=torch.int32)
        for end, ask in zip(ends, there, strict=True):
            exchange(end, ask.routes, send=ask.query, ctas=ctas)
        for end, ask, rows in zip(ends, there, accepted, strict=True):
            exchange(end, ask.routes, accept=rows, ctas=ctas)
            found, lengths = moved(queries(end, rows), torch.device("cpu"))
            answer = full(wire, partials_of(found, lengths, COLUMNS))
            answer = cut(answer, len(found), parts=parts, seed=epoch)
            exchange(end, ask.routes, answer=moved(answer), ctas=ctas)
        for end, ask, routed, merge in zip(ends, given, there, merged, strict=True):
            own = Partials(ask.outs[0], ask.lses[0], torch.zeros(4, 2, dtype=torch.int32))
            own = moved(cut(own, 4, parts=parts, seed=epoch))
            merge = merge._replace(
                outs=own.out[None], lses=own.lse[None], lacking=moved(lacking), parts=own.parts
            )
            exchange(end, routed.routes, receive=merge)
            out, lse = due(ask, COLUMNS)
            right = lacking == 0
            torch.testing.assert_close(
                merge.out.cpu()[right].float(), out[right], rtol=2e-3, atol=2e-3
            )
            torch.testing.assert_close(merge.lse.cpu()[right], lse[right], rtol=1e-5, atol=1e-5)
            assert merge.fault.tolist() == lacking.tolist()
            assert bool(merge.out[3].isnan().all())
        assert not any(int(end.status) for end in ends)
        assert not any(bool(end.counters.any()) for end in ends)


def run(ends: list[Ends], *, spoil_covered: bool = False) -> list[Merge]:
    """An exchange of two ranks in which each item of rank 0 is asked of rank 1; it is over."""
    wire = ends[0].wire
    given = [
        moved(asked(wire, r, 5, columns=COLUMNS, seed=0, dtype=torch.float16))
        for r in range(len(ends))
    ]
    accepted = [room(wire, DEVICE) for _ in ends]
    merged = [target(a) for a in given]
    for end, ask in zip(ends, given, strict=True):
        exchange(end, ask.routes, send=ask.query)
    for end, ask, rows in zip(ends, given, accepted, strict=True):
        exchange(end, ask.routes, accept=rows)
        answer = partials_of(*moved(queries(end, rows), torch.device("cpu")), COLUMNS)
        if spoil_covered:
            answer.covered[0, 1] += 1
        exchange(end, ask.routes, answer=moved(full(wire, answer)))
    for end, ask, merge in zip(ends, given, merged, strict=True):
        exchange(end, ask.routes, receive=merge)
    return [moved(merge, torch.device("cpu")) for merge in merged]


def test_a_wrong_coverage_becomes_nan_and_is_named() -> None:
    ends = connected(small_wire(2), [DEVICE] * 2)
    for rank, merge in enumerate(run(ends, spoil_covered=True)):
        faulty = merge.fault != 0
        assert int(faulty.sum()) == 1
        assert int(merge.fault[faulty]) == 1 + (1 - rank)
        assert bool(merge.out[faulty].isnan().all())
        assert not bool(merge.out[~faulty].isnan().any())


def test_time_stamps_of_the_last_epochs_are_kept_in_order(clock: None) -> None:
    ends = connected(small_wire(2), [DEVICE] * 2, ring=2)
    for epoch in range(1, 4):
        run(ends)
        for end in ends:
            assert end.ring is not None
            stamps = end.ring[epoch % 2].tolist()  # begun, sent, arrived, answered, merged
            assert stamps == sorted(stamps)
            assert 0 < stamps[0] < stamps[-1]
            before = end.ring[(epoch - 1) % 2].tolist()
            assert before[-1] < stamps[0] if epoch > 1 else before == [0] * len(STAMPS)


class Clock:
    """For the interpreter, which has none: every look at it is a quarter of an hour later."""

    now = 0

    @classmethod
    def globaltimer(cls) -> Any:
        cls.now += 10**12
        return tl.full((), cls.now, tl.int64)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(signals, "cuda", Clock)
        monkeypatch.setattr(roles, "cuda", Clock)


def test_other_tables_are_refused(clock: None) -> None:
    ends = connected(small_wire(2), [DEVICE] * 2)
    ends[1].tables.fill_(2)
    merged = run(ends)
    assert all(blame(int(end.status))[1] == INVALID for end in ends)
    assert int(ends[0].status) == (INVALID << 16) + 2
    assert all(bool(merge.out.isnan().any()) for merge in merged)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a clock that jumps")
def test_who_was_given_up_gets_no_answer_when_it_comes_late(clock: None) -> None:
    """Its header is here when the answers leave, but nothing was attended for it: what lies there is of
    the step before, and would cover the same lists."""
    wire = small_wire(2)
    ends = connected(wire)
    given = [asked(wire, r, 5, columns=COLUMNS, seed=1, dtype=torch.float16) for r in range(2)]
    accepted = [room(wire) for _ in ends]
    answers = []
    for end, ask in zip(ends, given, strict=True):
        exchange(end, ask.routes, send=ask.query)
    for end, ask, rows in zip(ends, given, accepted, strict=True):
        exchange(end, ask.routes, accept=rows)
        answers.append(full(wire, partials_of(*queries(end, rows), COLUMNS)))
        exchange(end, ask.routes, answer=answers[-1])
    for end, ask in zip(ends, given, strict=True):
        exchange(end, ask.routes, receive=target(ask))

    (first, late), (ask, other) = ends, [g._replace(query=g.query * -1.5) for g in given]
    exchange(first, ask.routes, send=ask.query)
    exchange(first, ask.routes, accept=accepted[0])
    assert blame(int(first.status)) == (1, SILENT)
    exchange(late, other.routes, send=other.query)
    exchange(first, ask.routes, answer=answers[0])
    exchange(late, other.routes, accept=accepted[1])
    merge = target(other)
    exchange(late, other.routes, answer=answers[1])
    exchange(late, other.routes, receive=merge)
    asked_of_first = other.routed[:, 0]
    assert bool(asked_of_first.any())
    assert bool(merge.out[asked_of_first].isnan().all())
    assert blame(int(late.status)) == (1, SILENT)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter refuses to wait")
def test_who_asked_nothing_waits_for_the_bare_answer_all_the_same() -> None:
    """That is the credit. Here a wait for what never comes ends at the clock it cannot read."""
    ends = connected(small_wire(2))
    given = [
        asked(ends[0].wire, r, 5, columns=COLUMNS, seed=2, dtype=torch.float16) for r in (0, 1)
    ]
    assert not bool(given[0].routed.any())
    for end, ask in zip(ends, given, strict=True):
        exchange(end, ask.routes, send=ask.query)
    accepted = room(ends[0].wire)
    exchange(ends[0], given[0].routes, accept=accepted)
    exchange(
        ends[0],
        given[0].routes,
        answer=full(ends[0].wire, partials_of(*queries(ends[0], accepted), COLUMNS)),
    )
    with pytest.raises(InterpreterError):
        exchange(ends[0], given[0].routes, receive=target(given[0]))


def test_refusals_say_what_is_allowed() -> None:
    wire = small_wire(2)
    ends = connected(wire)[0]
    ask = asked(wire, 0, 5, columns=COLUMNS, seed=0, dtype=torch.float16)
    with pytest.raises(ValueError, match="at least one of send, accept, answer and receive"):
        exchange(ends, ask.routes)
    with pytest.raises(ValueError, match="a row must have 192 bytes on this wire, got 384"):
        exchange(ends, ask.routes, send=ask.query.float())
    with pytest.raises(ValueError, match=r"lses must be \(1, 5, 4\)"):
        exchange(ends, ask.routes, receive=target(ask)._replace(lses=ask.lses[:, :4]))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("world_size", 1, "world_size must be 2 to 64, got 1"),
        ("rows", 0, "rows must be 1 to 1024, got 0"),
        ("chunk", 9, "chunk must be 1 to 8, got 9"),
        ("query_words", 6, "query_words must be a positive multiple of 4, got 6"),
    ],
)
def test_wire_refuses(field: str, value: int, says: str) -> None:
    facts: dict[str, Any] = {
        "world_size": 2,
        "rows": 4,
        "heads": 4,
        "query_words": 48,
        "answer_words": 32,
    }
    with pytest.raises(ValueError, match=says):
        Wire(**facts | {"units": 7, field: value})


@pytest.mark.parametrize("staged", [False, True])
def test_regions_of_the_arena_do_not_overlap(staged: bool) -> None:
    wire = Wire(
        world_size=3, rows=64, heads=128, query_words=36864, answer_words=32768, units=2048,
        staged=staged,
    )  # fmt: skip
    messages = 2 * 3 * wire.chunks
    sizes = [
        (0, messages * wire.inbox_chunk),
        (wire.window, messages * wire.window_chunk),
        (wire.query_signals, 2 * messages),
        (wire.answer_signals, 2 * messages),
        (wire.abort, 2),
    ]
    if staged:
        sizes += [
            (wire.outbox, messages * wire.inbox_chunk),
            (wire.outgoing, messages * wire.window_chunk),
        ]
    ends = [begin + size for begin, size in sizes]
    assert all(
        end <= begin for end, (begin, _) in zip(ends, [*sizes[1:], (wire.words, 0)], strict=True)
    )
    assert all(begin % 32 == 0 for begin, _ in sizes)
    assert wire.query_rows * wire.query_words == sizes[0][1]


def test_blame_reads_what_the_kernels_write() -> None:
    assert blame((SILENT << 16) + 3) == (2, SILENT)
