"""Leases of entries against a plain model: least recently used first, by generation, within their bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from block_stores import codec_of, ids, rows_for, store_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qroam.partition.lease_table import LeaseTable


class LeaseModel:
    """Leases as a plain list of (id, generation, last use), the stalest and lowest given up first."""

    def __init__(self, capacity: int) -> None:
        self.slots: list[tuple[int, int, int, bytes] | None] = [None] * capacity
        self.tick = 0

    def at(self, id: int, generation: int) -> int | None:
        for slot, lease in enumerate(self.slots):
            if lease is not None and lease[:2] == (id, generation):
                return slot
        return None

    def touch(self, slots: Sequence[int]) -> None:
        self.tick += 1
        for slot in slots:
            lease = self.slots[slot]
            assert lease is not None
            self.slots[slot] = (*lease[:2], self.tick, lease[3])

    def admit(self, leases: Sequence[tuple[int, int, bytes]]) -> None:
        kept = leases[: len(self.slots)]
        new = {id for id, _, _ in kept}
        self.slots = [None if lease and lease[0] in new else lease for lease in self.slots]
        order = sorted(range(len(self.slots)), key=lambda slot: (self.used(slot), slot))
        for slot, (id, generation, row) in zip(order, kept, strict=False):
            self.slots[slot] = (id, generation, 0, row)
        if kept:
            self.touch(order[: len(kept)])

    def used(self, slot: int) -> int:
        lease = self.slots[slot]
        return -1 if lease is None else lease[2]


CAPACITY = 5


lease_ops = st.lists(
    st.one_of(
        st.tuples(st.just("touch"), st.lists(st.integers(0, 11), unique=True, max_size=4)),
        st.tuples(st.just("admit"), st.lists(st.integers(0, 11), unique=True, max_size=7)),
        st.tuples(st.just("raise"), st.lists(st.integers(0, 11), unique=True, max_size=2)),
    ),
    max_size=12,
)


@given(ops=lease_ops)
@settings(max_examples=200)
def test_leases_are_least_recently_used_as_a_plain_model(
    ops: list[tuple[str, list[int]]],
) -> None:
    codec = codec_of("fp32")
    store = store_of(codec, slots=2, lease_entries=CAPACITY)
    leases, model = store.leases(0), LeaseModel(CAPACITY)
    generation = dict.fromkeys(range(12), 0)
    everyone = torch.arange(12)

    def current() -> Tensor:
        return torch.tensor([generation[id] for id in range(12)], dtype=torch.int32)

    for serial, (op, chosen) in enumerate(ops):
        match op:
            case "raise":
                for id in chosen:
                    generation[id] += 1
            case "touch":
                index, found = leases.find(torch.tensor(chosen), current()[chosen])
                leases.touch(index[found])
                model.touch((index[found] - store.first_lease).tolist())
            case _:
                _, found = leases.find(torch.tensor(chosen), current()[chosen])
                new = [id for id, have in zip(chosen, found.tolist(), strict=True) if not have]
                rows = rows_for(codec, len(new), seed=serial)
                leases.admit(torch.tensor(new, dtype=torch.int32), current()[new], rows)
                raw = [row.numpy().tobytes() for row in rows]
                model.admit([(id, generation[id], r) for id, r in zip(new, raw, strict=True)])
        index, found = leases.find(everyone, current())
        for id in range(12):
            slot = model.at(id, generation[id])
            assert bool(found[id]) == (slot is not None)
            if slot is not None:
                lease = model.slots[slot]
                assert lease is not None
                row = store.rows(0, index[id : id + 1])
                assert row.numpy().tobytes() == lease[3]


def test_a_lease_of_another_generation_is_not_found_and_is_replaced() -> None:
    store = store_of(codec_of("fp32"), slots=1, lease_entries=4)
    leases = store.leases(0)
    rows = rows_for(codec_of("fp32"), 2)
    leases.admit(ids(3), ids(0), rows[:1])
    assert leases.find(ids(3), ids(0))[1].tolist() == [True]
    assert leases.find(ids(3), ids(1))[1].tolist() == [False]
    leases.admit(ids(3), ids(1), rows[1:])
    index, found = leases.find(ids(3), ids(1))
    assert found.tolist() == [True]
    assert torch.equal(store.rows(0, index), rows[1:])
    assert leases.find(ids(3), ids(0))[1].tolist() == [False]


def test_admitting_more_than_fits_keeps_the_first_and_counts_evictions() -> None:
    store = store_of(codec_of("fp32"), slots=1, lease_entries=3)
    leases = store.leases(0)
    before = store.num_bytes
    rows = rows_for(codec_of("fp32"), 5)
    assert leases.admit(torch.arange(5), torch.zeros(5), rows) == 0
    assert leases.find(torch.arange(5), torch.zeros(5))[1].tolist() == [True] * 3 + [False] * 2
    assert leases.admit(ids(9), ids(0), rows[:1]) == 1
    assert leases.admit(torch.arange(20, 25), torch.zeros(5), rows) == 3
    assert store.num_bytes == before


def test_without_lease_entries_nothing_is_kept() -> None:
    leases: LeaseTable = store_of(codec_of("fp32")).leases(0)
    assert leases.admit(ids(1), ids(0), rows_for(codec_of("fp32"), 1)) == 0
    assert not bool(leases.find(ids(1, -1), ids(0, 0))[1].any())


def test_padding_is_never_leased() -> None:
    leases = store_of(codec_of("fp32"), lease_entries=2).leases(0)
    assert not bool(leases.find(ids(-1, -1), ids(0, 0))[1].any())
