"""The pool: bitwise round trips, append-only writes, generations, and threads that write at a time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from block_stores import B, codec_of, ids, rows_for, store_of
from hypothesis import given
from hypothesis import strategies as st

from qroam.partition import codec as codec_module
from qroam.partition import pool
from qroam.partition.codec import CODEC_NAMES, make_codec
from qroam.partition.pool import BlockStore


def state(store: BlockStore, layer: int) -> tuple[list[int], bytes]:
    everything = store.rows(layer, torch.arange(store.first_lease))
    return store.fill[layer].tolist(), everything.numpy().tobytes()


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_rows_are_kept_where_the_store_is_told_to(name: str) -> None:
    codec = codec_of(name)
    memory = torch.zeros(64 + 4 * B * codec.entry_bytes, dtype=torch.uint8)
    store, usual = (
        BlockStore([codec], num_slots=4, num_keys=8, block_tokens=B, storage=given)
        for given in ([memory[64:]], None)
    )
    written, rows = torch.arange(3 * B, 3 * B + 5, dtype=torch.int32), rows_for(codec, 5)
    for one in (store, usual):
        one.assign(torch.tensor([3]), torch.tensor([2]))
        one.write(0, written, rows)
    assert (store.num_bytes, store.held_bytes) == (usual.num_bytes, usual.held_bytes)
    kept = memory[64:].view(4, -1)
    assert torch.equal(
        kept[2, : 5 * codec.planes[0]], usual._storage[0].view(4, -1)[2, : 5 * codec.planes[0]]
    )
    assert not bool(kept[[0, 1, 3]].any())
    assert torch.equal(store.rows(0, store.resolve(0, written)[0]), rows)


def test_storage_of_another_size_is_refused() -> None:
    codec = codec_of("fp32")
    exact = 4 * B * codec.entry_bytes
    for other in ([], [torch.zeros(exact - 1).byte()], [torch.zeros(exact)]):
        with pytest.raises(ValueError, match="storage must be uint8 of"):
            BlockStore([codec], num_slots=4, num_keys=8, block_tokens=B, storage=other)


def test_versions_tell_what_changed() -> None:
    store = store_of(codec_of("fp32"), codec_of("fp32"))
    assert (store.version, store.fill_versions) == (0, [0, 0])
    store.assign(torch.tensor([5]), torch.tensor([0]))
    store.write(1, ids(5 * B), rows_for(codec_of("fp32"), 1))
    assert (store.version, store.fill_versions) == (1, [0, 1])
    store.touch(torch.tensor([0]))
    store.copy_in(0, torch.tensor([0]), rows_for(codec_of("fp32"), B)[None], ids(B))
    store.release(torch.tensor([5]))
    assert (store.version, store.fill_versions) == (2, [1, 1])


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_rows_come_back_bitwise_from_any_slot(name: str) -> None:
    codec = codec_of(name)
    store = store_of(None, codec)
    store.assign(torch.tensor([5, 2, 0]), torch.tensor([0, 3, 1]))
    written = torch.cat([torch.arange(5 * B, 6 * B), torch.arange(2 * B, 2 * B + 3), ids(0)])
    rows = rows_for(codec, len(written))
    store.write(1, written.to(torch.int32), rows)

    index, valid = store.resolve(1, written.to(torch.int32))
    assert bool(valid.all())
    assert index[[0, B, B + 3]].tolist() == [0, 3 * B, 1 * B]
    assert torch.equal(store.rows(1, index), rows)
    shuffled = torch.randperm(len(written), generator=torch.Generator().manual_seed(1))
    assert torch.equal(store.rows(1, index[shuffled]), rows[shuffled])
    again = store.read(1, index[None], torch.float64)
    assert torch.equal(again[0], codec.decode(rows, torch.float64))
    assert torch.equal(store.identify(index)[0], written.long())


def test_two_planes_lie_plane_by_plane() -> None:
    codec = codec_of("fp8_index")
    store = store_of(codec, slots=2)
    store.assign(torch.tensor([1]), torch.tensor([1]))
    rows = rows_for(codec, B)
    store.write(0, torch.arange(B, 2 * B, dtype=torch.int32), rows)
    block = store._storage[0].view(2, -1)[1]
    values, scales = rows.split((32, 4), dim=1)
    assert torch.equal(block, torch.cat((values.reshape(-1), scales.reshape(-1))))


@given(data=st.data())
def test_appending_in_any_interleaving_gives_the_blocks(data: st.DataObject) -> None:
    codec = codec_of("fp32")
    store = store_of(codec)
    store.assign(torch.tensor([3, 6]), torch.tensor([2, 0]))
    whole = {key: rows_for(codec, B, seed=key) for key in (3, 6)}
    fill = {3: 0, 6: 0}
    while data.draw(st.booleans()) and min(fill.values()) < B:
        at: list[int] = []
        for key in (3, 6):
            end = data.draw(st.integers(fill[key], B))
            at += range(key * B + fill[key], key * B + end)
            fill[key] = end
        at = data.draw(st.permutations(at))
        rows = [whole[i // B][i % B] for i in at]
        store.write(0, ids(*at), torch.stack(rows) if rows else rows_for(codec, 0))
    for key in (3, 6):
        index, valid = store.resolve(0, torch.arange(key * B, (key + 1) * B))
        assert valid.tolist() == [offset < fill[key] for offset in range(B)]
        assert torch.equal(store.rows(0, index[valid]), whole[key][: fill[key]])


BAD_WRITES: dict[str, tuple[str, list[int]]] = {
    "gap": ("in order", [2 * B + 4]),
    "gap-within": ("in order", [2 * B + 3, 2 * B + 5]),
    "overwrite": ("in order", [2 * B + 2]),
    "overwrite-and-append": ("in order", [2 * B + 2, 2 * B + 3]),
    "twice": ("in order", [2 * B + 3, 2 * B + 3]),
    "twice-and-a-gap": ("in order", [2 * B + 3, 2 * B + 3, 2 * B + 5]),
    "good-then-foreign-block": ("not held", [2 * B + 3, 4 * B]),
    "negative": ("not held", [-1]),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_a_bad_write_changes_nothing(case: str) -> None:
    message, bad = BAD_WRITES[case]
    codec = codec_of("fp32")
    store = store_of(codec)
    store.assign(torch.tensor([2]), torch.tensor([1]))
    store.write(0, ids(*range(2 * B, 2 * B + 3)), rows_for(codec, 3))
    before = state(store, 0)
    with pytest.raises(ValueError, match=message):
        store.write(0, ids(*bad), rows_for(codec, len(bad), seed=9))
    assert state(store, 0) == before
    store.write(0, ids(2 * B + 3), rows_for(codec, 1))


@pytest.mark.parametrize("rows", ["short", "narrow", "float"])
def test_rows_of_another_shape_or_dtype_are_refused(rows: str) -> None:
    codec = codec_of("fp32")
    store = store_of(codec, None)
    store.assign(torch.tensor([2]), torch.tensor([1]))
    good = rows_for(codec, 2)
    bad = {"short": good[:1], "narrow": good[:, 1:], "float": good.float()}[rows]
    before = state(store, 0)
    with pytest.raises(ValueError, match=r"rows must be uint8 \(2, 20\)"):
        store.write(0, ids(2 * B, 2 * B + 1), bad)
    with pytest.raises(ValueError, match="stores nothing"):
        store.write(1, ids(2 * B), good[:1])
    assert state(store, 0) == before


def test_a_released_block_is_gone_and_its_slot_has_another_generation() -> None:
    codec = codec_of("fp32")
    store = store_of(codec)
    store.assign(torch.tensor([2]), torch.tensor([1]))
    store.write(0, ids(2 * B), rows_for(codec, 1))
    index, _ = store.resolve(0, ids(2 * B))
    _, old = store.identify(index)
    store.release(torch.tensor([2]))
    assert not bool(store.resolve(0, ids(2 * B))[1].any())
    assert not bool(store.holds(ids(2 * B)).any())

    store.assign(torch.tensor([5]), torch.tensor([1]))
    assert not bool(store.resolve(0, ids(2 * B, 5 * B))[1].any())  # nothing was written yet
    store.write(0, ids(5 * B), rows_for(codec, 1, seed=1))
    assert store.resolve(0, ids(2 * B, 5 * B))[1].tolist() == [False, True]
    identity, new = store.identify(index)
    assert identity.tolist() == [5 * B]
    assert int(new) == int(old) + 1


def test_ids_outside_the_table_are_absent() -> None:
    store = store_of(codec_of("fp32"))
    store.assign(torch.tensor([0, 7]), torch.tensor([0, 3]))
    foreign = torch.tensor([[-1, -(2**31), 8 * B], [2**31 - 1, 3 * B, 7 * B]], dtype=torch.int32)
    assert not bool(store.resolve(0, foreign)[1].any())


def test_a_slot_in_use_is_not_given_away() -> None:
    store = store_of(codec_of("fp32"))
    store.assign(torch.tensor([0]), torch.tensor([2]))
    with pytest.raises(AssertionError):
        store.assign(torch.tensor([1]), torch.tensor([2]))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"slots": 0}, "slots must be >= 1"),
        ({"keys": 2**31 // B}, r"below 2\*\*31"),
    ],
    ids=["no-slot", "ids-beyond-int32"],
)
def test_absurd_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        store_of(codec_of("fp32"), **sizes)
    with pytest.raises(ValueError, match="several planes"):
        store_of(codec_of("fp8_index"), lease_entries=1)


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_full_pool_is_its_blocks_encoded_bytes(name: str) -> None:
    codec = codec_of(name)
    slots = 64
    store = store_of(codec, codec, None, slots=slots, keys=slots)
    encoded = 2 * slots * len(rows_for(codec, B).flatten())
    assert encoded <= store.num_bytes <= 1.05 * encoded


@pytest.mark.parametrize("name", CODEC_NAMES)
def test_a_whole_block_is_copied_as_its_rows_are(name: str) -> None:
    codec = codec_of(name)
    one, other = store_of(codec), store_of(codec)
    for store, slot in ((one, 2), (other, 3)):
        store.assign(ids(1), ids(slot))
    one.write(0, torch.arange(B, 2 * B), rows_for(codec, B))
    blocks = torch.empty(2, B, codec.entry_bytes, dtype=torch.uint8)
    one.copy_out(0, ids(2, 2), blocks)
    rows = rows_for(codec, B)
    assert torch.equal(blocks, torch.stack([rows, rows]))
    other.copy_in(0, ids(3), blocks[:1], ids(B - 2))
    index, valid = other.resolve(0, torch.arange(B, 2 * B))
    assert valid.tolist() == [True] * (B - 2) + [False] * 2
    assert torch.equal(other.rows(0, index[:-2]), rows[:-2])
    with pytest.raises(ValueError, match="once"):
        other.copy_in(0, ids(2, 3), blocks, ids(B, B))
    assert other.fill[0, 2] == 0


def test_changes_of_a_store_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads append to different blocks; the first is interrupted before it says so."""
    codec = make_codec("fp32", dim=2, rope_dim=0)
    store = BlockStore([codec], num_slots=3, num_keys=3, block_tokens=4)
    store.assign(torch.arange(2), torch.arange(2))
    scatter, second = codec_module.scatter_rows, threading.Event()

    def slow(*args: Any) -> None:
        scatter(*args)
        if not second.is_set():
            second.set()
            other.start()
            other.join(0.3)

    monkeypatch.setattr(pool, "scatter_rows", slow)
    ids, rows = torch.arange(8, dtype=torch.int32), codec.encode(torch.randn(8, 2))
    other = threading.Thread(target=lambda: store.write(0, ids[4:], rows[4:]))
    store.write(0, ids[:4], rows[:4])
    other.join()
    index, valid = store.resolve(0, ids)
    assert bool(valid.all())
    assert torch.equal(store.rows(0, index), rows)
