"""Wrong steps must not pass: every mutant here is caught, and which guard catches it is stated.

Three guards: coverage (`CoverageError` names layer, query and holder), the protocol (`PeerError`
names the rank), and the comparison with dense attention, which tells an error of 1e-12 from these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from cases import Case
from player import MismatchError, run_case
from ranks import run_loopback
from torch import Tensor

from qroam.kernels import reference
from qroam.partition.layout import Layout
from qroam.partition.lease_table import LeaseTable
from qroam.partition.pool import BlockStore
from qroam.runtime import CoverageError, PeerError
from qroam.runtime.cpu import answer as holder
from qroam.runtime.cpu import plan, step
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.messages import Header, Message
from qroam.runtime.world import World
from qroam.runtime.writes import Writes

CULPRIT = 1
ROUTE: dict[str, Any] = {"mode": "always-route", "weights": False}
FETCH: dict[str, Any] = {"mode": "always-fetch"}

Answer = dict[str, Tensor]
Inject = Callable[[pytest.MonkeyPatch], None]


class Mutant(NamedTuple):
    """A fault, a case in which it matters, and what must be raised."""

    inject: Inject
    facts: Mapping[str, Any]
    caught_by: type[Exception]
    says: str | None = None


COVERAGE = CoverageError, rf"^layer 0: query \d+ at rank {CULPRIT} "
BY_PEER = PeerError, rf"^rank {CULPRIT}: "
DENSE = (MismatchError,)
NOT_A_NUMBER = PeerError, rf"^rank {CULPRIT}: answered layer \d+ with NaN"


def wrong_answer(spoil: Callable[[Answer], Answer]) -> Inject:
    """The culprit spoils what it answers to every other rank's `attend`."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        def answer(world: World, message: Message) -> Answer:
            right = holder.answer_attend(world, message)
            return spoil(right) if world.rank == CULPRIT and right else right

        patch.setattr(step, "answer_attend", answer)

    return inject


def wrong_work(spoil: Callable[[Answer], Answer]) -> Inject:
    """The culprit does other work than it was asked to."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        def answer(world: World, message: Message) -> Answer:
            if world.rank == CULPRIT:
                message = Message(message.header, spoil(dict(message.columns)))
            return holder.answer_attend(world, message)

        patch.setattr(step, "answer_attend", answer)

    return inject


def each(**changes: Callable[[Tensor], Tensor]) -> Callable[[Answer], Answer]:
    """Change the columns that end in these names, where they came."""

    def spoil(columns: Answer) -> Answer:
        return {
            name: changes[part](rows) if (part := name.split(".")[-1]) in changes else rows
            for name, rows in columns.items()
        }

    return spoil


def replaced(where: object, name: str, wrap: Callable[[Any], Any]) -> Inject:
    """`where.name` becomes `wrap(where.name)`, on every rank."""
    return lambda patch: patch.setattr(where, name, wrap(getattr(where, name)))


def merged_across_branches(patch: pytest.MonkeyPatch) -> None:
    def combine(layout: Layout, out: Tensor, lse: Tensor, sink: Tensor | None) -> Tensor:
        item = torch.arange(len(out)) // layout.num_branches
        total, _ = reference.merge(out, lse, item, len(out) // layout.num_branches)
        return total * sum(branch.weight for branch in layout.branches) / layout.num_branches

    patch.setattr(step, "combine", combine)


def base_2_lse(attend_at: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    def wrong(*args: Any, **offsets: Any) -> tuple[Tensor, Tensor]:
        out, lse = attend_at(*args, **offsets)
        return out, lse / math.log(2)

    return wrong


def dropped(rows: Tensor) -> Tensor:
    return torch.zeros_like(rows)


def dropped_lse(rows: Tensor) -> Tensor:
    return torch.full_like(rows, -torch.inf)


def mixed_up(rows: Tensor) -> Tensor:
    return rows.roll(1, dims=0)


def asked_twice(columns: Answer) -> Answer:
    """Every unit of a routed list comes twice: the sum of exponentials doubles."""
    if "A.units" in columns:
        columns["A.units"] = columns["A.units"].repeat_interleave(2)
        columns["A.count"] = columns["A.count"] * 2
    return columns


def other_blocks(units: Tensor) -> Tensor:
    """The first written entry of the document instead of the one that was asked for."""
    return units // 8 * 8


def stale_blocks(patch: pytest.MonkeyPatch) -> None:
    """The culprit's slots were given to other blocks since: its generations moved on."""
    identify = BlockStore.identify
    spoilt: list[BlockStore] = []

    def answer(world: World, message: Message) -> Answer:
        if world.rank == CULPRIT:
            spoilt.append(world.stores.entries)
        return holder.answer_attend(world, message)

    def later(store: BlockStore, index: Tensor) -> tuple[Tensor, Tensor]:
        ids, generation = identify(store, index)
        return ids, generation + int(any(store is other for other in spoilt))

    patch.setattr(step, "answer_attend", answer)
    patch.setattr(BlockStore, "identify", later)


def stale_results(patch: pytest.MonkeyPatch) -> None:
    """The culprit repeats what it answered to the same rank a step ago, under today's header."""
    kept: list[Answer] = []

    def answer(world: World, message: Message) -> Answer:
        right = holder.answer_attend(world, message)
        if world.rank != CULPRIT:
            return right
        kept.append(right)
        visitors = world.world_size - 1
        return kept[-1 - visitors] if len(kept) > visitors else right

    patch.setattr(step, "answer_attend", answer)


def resent(patch: pytest.MonkeyPatch, *, instead: bool) -> None:
    """The culprit sends its answers twice; or, from the second on, the one before again."""
    post_shares = Transport.post_shares
    kept: list[tuple[Header, Any]] = []

    def post(self: Transport, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
        if self.rank == CULPRIT and header.kind == "attend-answer":
            kept.append((header, shares))
            if not instead:
                post_shares(self, header, shares)
            elif len(kept) > 1:
                header, shares = kept[-2]
        post_shares(self, header, shares)

    patch.setattr(Transport, "post_shares", post)


def neighbour_read(pool_reader: Callable[..., Callable[[Tensor], Tensor]]) -> Any:
    """The holder counts the right entries and reads the ones beside them."""

    def wrong(world: World, layer: int) -> Callable[[Tensor], Tensor]:
        read = pool_reader(world, layer)
        return lambda index: read(index ^ 1)

    return wrong


def padding_as_unit_0(padded_lists: Callable[[Tensor, Tensor], Tensor]) -> Any:
    return lambda values, counts: padded_lists(values, counts).clamp(min=0)


def padding_as_zero_rows(attend: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """Softmax over the padding, whose rows are zero: a share of exp(0) goes nowhere."""

    def wrong(query: Tensor, entries: Tensor, valid: Tensor, **sizes: Any) -> Any:
        entries = torch.where(valid[..., None], entries, 0.0)
        return attend(query, entries, torch.ones_like(valid), **sizes)

    return wrong


def future_attended(unit_entries: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    def wrong(units: Tensor, hidden: Tensor, **sizes: int) -> tuple[Tensor, Tensor]:
        return unit_entries(units, torch.zeros_like(hidden), **sizes)

    return wrong


def unwritten(store: Callable[..., None]) -> Any:
    """The culprit never stores the last tokens of any document."""

    def wrong(
        self: Writes, layer: int, ids: Tensor, entries: Tensor, *rest: Any, push: bool
    ) -> None:
        kept = len(ids) - 3 if self._tables.rank == CULPRIT and not push else len(ids)
        store(self, layer, ids[:kept], entries[:kept], *rest, push=push)

    return wrong


def unwritten_attended(resolve: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """What a block's slot holds beyond its last entry is taken for an entry."""

    def wrong(self: BlockStore, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        fill = self.fill[layer].clone()
        self.fill[layer] = self.block_tokens
        try:
            return resolve(self, layer, ids)
        finally:
            self.fill[layer] = fill

    return wrong


def next_lease(find: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """The table says which lease an id has, and is off by one."""

    def wrong(self: LeaseTable, ids: Tensor, generations: Tensor) -> tuple[Tensor, Tensor]:
        index, found = find(self, ids, generations)
        first = self._first
        return torch.where(found, first + (index - first + 1) % 3, index), found

    return wrong


MUTANTS: dict[str, Mutant] = {
    "LSE across branches": Mutant(
        merged_across_branches, {"architecture": "mlra-4", "heads": 1, "world": 2}, *DENSE
    ),
    "base-2 LSE": Mutant(replaced(holder, "attend_at", base_2_lse), ROUTE, *DENSE),
    "dropped partials": Mutant(
        wrong_answer(each(out=dropped, lse=dropped_lse, covered=dropped)), ROUTE, *COVERAGE
    ),
    "dropped partials, coverage forged": Mutant(
        wrong_answer(each(out=dropped, lse=dropped_lse)), ROUTE, *DENSE
    ),
    "dropped answer": Mutant(wrong_answer(lambda _: {}), ROUTE, *BY_PEER),
    "dropped fetched rows": Mutant(wrong_answer(each(mark=torch.zeros_like)), FETCH, *COVERAGE),
    "doubled units": Mutant(wrong_work(asked_twice), ROUTE, *COVERAGE),
    "doubled answer": Mutant(
        lambda patch: resent(patch, instead=False), {**ROUTE, "repeats": 2}, *BY_PEER
    ),
    "stale block, routed": Mutant(stale_blocks, ROUTE, *COVERAGE),
    "stale block, fetched": Mutant(stale_blocks, FETCH, *COVERAGE),
    "stale message": Mutant(
        lambda patch: resent(patch, instead=True), {**ROUTE, "repeats": 2}, *BY_PEER
    ),
    "stale results": Mutant(stale_results, {**ROUTE, "repeats": 2, "steps": 1}, *DENSE),
    "wrong row read": Mutant(
        replaced(holder, "pool_reader", neighbour_read), ROUTE, *NOT_A_NUMBER
    ),  # the rows between blocks are NaN here
    "wrong row fetched": Mutant(
        wrong_answer(each(rows=mixed_up)), {**FETCH, "picks": "random"}, *DENSE
    ),
    "other ids": Mutant(wrong_work(each(units=other_blocks)), ROUTE, *COVERAGE),
    "pad attended by the holder": Mutant(
        replaced(holder, "padded_lists", padding_as_unit_0),
        {**ROUTE, "picks": "random"},
        CoverageError,
        "^layer 0: query",
    ),
    "pad attended": Mutant(
        replaced(reference, "attend", padding_as_zero_rows), {"picks": "random"}, *DENSE
    ),
    "items mixed up": Mutant(
        wrong_answer(each(out=mixed_up, lse=mixed_up, covered=mixed_up)), ROUTE, *COVERAGE
    ),
    "items mixed up, coverage forged": Mutant(
        wrong_answer(each(out=mixed_up, lse=mixed_up)), ROUTE, *DENSE
    ),
    "unwritten entry, routed": Mutant(replaced(Writes, "write", unwritten), ROUTE, *COVERAGE),
    "unwritten entry, fetched": Mutant(replaced(Writes, "write", unwritten), FETCH, *COVERAGE),
    "unwritten entry, at home": Mutant(
        replaced(Writes, "write", unwritten),
        {"queries": (0, 3, 0), "policy": "document-affine", "copies": 3},
        *COVERAGE,
    ),
    "unwritten entry attended": Mutant(
        replaced(BlockStore, "resolve", unwritten_attended),
        {**ROUTE, "unit_tokens": 8},
        CoverageError,
        "^layer 0: query",
    ),
    "own future attended": Mutant(
        replaced(plan, "unit_entries", future_attended),
        {"unit_tokens": 8, "requests": 2},
        CoverageError,
        "^layer 0: query",
    ),
    "wrong lease": Mutant(
        replaced(LeaseTable, "find", next_lease),
        {**FETCH, "lease_entries": 200, "repeats": 2},
        *DENSE,
    ),
}
FACTS: dict[str, Any] = {"seed": 3, "picks": "all", "requests": 0, "queries": (3, 2, 4), "steps": 2}


def play(facts: Mapping[str, Any]) -> None:
    case = Case(**{**FACTS, **facts})
    run_loopback(case.world, lambda transport: run_case(transport, case), deadline_s=10.0)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    play(mutant.facts)  # the control: without the fault the case passes
    mutant.inject(monkeypatch)
    with pytest.raises(mutant.caught_by, match=mutant.says) as caught:
        play(mutant.facts)
    if isinstance(caught.value, MismatchError):
        assert not caught.value.error < 1e-3, "the case hardly notices"
