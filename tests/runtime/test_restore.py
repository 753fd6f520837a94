"""Restoring: onto other ranks and placements, beside what is there already, and what a world lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from effort import slow_between
from faults import die
from incarnations import Lives, known, threads
from ranks import run_loopback
from small_world import small, small_config
from snapshot_world import B, add, attended, contents, refused, world
from snapshots import restore, save

from qroam.partition.snapshot.verify import verify
from qroam.runtime import BlocksLostError, PeerError, Runtime, SnapshotError


def test_what_nobody_has_is_named_and_comes_back_from_a_snapshot(tmp_path: Path) -> None:
    lives, config = Lives(), small_config(max_blocks=16)

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            world = small(runtime)
            runtime.pin("doc")
            runtime.add_document("other", tokens=8)  # its only block is at rank 2
            runtime.snapshot(tmp_path / "s")
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                world.check()
            runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
            named = {"doc": (range(1, 2), range(4, 5), range(7, 8))}
            assert runtime.lost_blocks() == named
            with pytest.raises(BlocksLostError, match="blocks 1, 4, 7 of 'doc'") as raised:
                world.check()
            assert raised.value.blocks == named
            restored(runtime)

    def newcomer() -> None:
        with Runtime.open(config, lives.end(1, 1, 3), incarnation=1) as runtime:
            assert [document.name for document in runtime.documents()] == ["doc", "other"]
            assert runtime.pinned() == {"doc"}
            restored(runtime)

    def restored(runtime: Runtime) -> None:
        runtime.idle_attend(0)  # nobody was hurt by the question
        with pytest.raises(SnapshotError, match="no documents nothing"):
            runtime.restore(tmp_path / "s", documents=["nothing"])
        with pytest.raises(SnapshotError, match="copy of blocks 1, 4, 7 of 'doc': restore"):
            runtime.snapshot(tmp_path / "s")  # it would be the end of what the last one has
        report = runtime.restore(tmp_path / "s", documents=runtime.lost_blocks())
        assert report.documents == {"doc": 64}
        assert runtime.lost_blocks() == {}
        assert runtime.pinned() == {"doc"}
        known(runtime).check()

    works: list[Callable[[], None]] = [partial(survivor, r) for r in range(3)]
    threads([*works, newcomer])


@pytest.mark.parametrize("newer", ["blocks", "document"])
def test_what_is_left_is_not_replaced_by_an_older_snapshot(tmp_path: Path, newer: str) -> None:
    lives, config = Lives(), small_config(max_blocks=16)
    entries = torch.randn(64, 1, config.model.layers[0].entry_dim, dtype=torch.float64)

    def add(runtime: Runtime, tokens: int) -> None:
        runtime.add_document("doc", tokens=tokens)
        runtime.load_document("doc", 0, entries[:tokens])

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            if newer == "document":
                add(runtime, 56)
                runtime.snapshot(tmp_path / "s")
                runtime.remove_document("doc")
                add(runtime, 64)
            else:
                runtime.add_document("doc", tokens=64)
                request = runtime.request(into="doc") if rank == 0 else None
                for start, end in ((0, 16), (16, 61)):
                    if request is not None:
                        ids = runtime.append(request, end - start)
                        runtime.write(0, ids, entries[start:end])
                    if start == 0:
                        runtime.snapshot(tmp_path / "s")
                runtime.idle_attend(0)
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                runtime.idle_attend(0)
            runtime.rejoin(lives.end(1, min(rank, 1), 2), incarnation=1)
            lost = runtime.lost_blocks()
            held = runtime._world.stores.entries.fill.clone()
            reason = {
                "blocks": "rank 0: blocks .* of 'doc' are here, and not in the snapshot",
                "document": "'doc' is another one in the snapshot",
            }[newer]
            with pytest.raises(SnapshotError, match=reason):
                runtime.restore(tmp_path / "s", documents=lost)
            assert torch.equal(runtime._world.stores.entries.fill, held)
            assert runtime.lost_blocks() == lost != {}
            runtime.remove_document("doc")
            report = runtime.restore(tmp_path / "s", documents=["doc"])
            assert report.documents == {"doc": 56 if newer == "document" else 16}

    threads([partial(survivor, r) for r in range(3)])


def test_what_nobody_has_is_not_shared_with_new_documents(tmp_path: Path) -> None:
    lives, config = Lives(), small_config(max_blocks=32)
    layout = config.model.layers[0]
    text, entries = range(64), torch.randn(64, 1, layout.entry_dim, dtype=torch.float64)
    query = torch.randn(1, layout.heads, layout.key_dim, dtype=torch.float64)

    def attended(runtime: Runtime, name: str) -> torch.Tensor:
        ids = runtime._world.directory.document(name).ids()[None]
        scope = runtime.scope(documents=[name], queries=1)
        return runtime.attend(0, query, runtime.selection(ids, scope))

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            runtime.add_document("a", token_ids=text)
            runtime.load_document("a", 0, entries)
            runtime.add_document("b", token_ids=text)
            expected = attended(runtime, "b")
            runtime.snapshot(tmp_path / "s")
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                attended(runtime, "b")
            runtime.rejoin(lives.end(1, rank, 3), incarnation=1)
            restored(runtime, expected)

    def newcomer() -> None:
        with Runtime.open(config, lives.end(1, 1, 3), incarnation=1) as runtime:
            restored(runtime, None)

    def restored(runtime: Runtime, expected: torch.Tensor | None) -> None:
        lost = runtime.lost_blocks()
        assert set(lost) == {"a", "b"}
        assert runtime.add_document("again", token_ids=text).shared == lost["a"][0].start == 1
        runtime.load_document("again", 0, entries)
        assert runtime.restore(tmp_path / "s", documents=["a"]).documents == {"a": 64}
        assert set(runtime.lost_blocks()) == {"b"}
        runtime.remove_document("again")
        assert runtime.restore(tmp_path / "s", documents=["b"]).documents == {"b": 64}
        assert (runtime.lost_blocks(), runtime._world.directory.num_blocks) == ({}, 8)
        for name in ("a", "b"):
            found = attended(runtime, name)
            assert expected is None or float((found - expected).abs().max()) <= 1e-12
        runtime.snapshot(tmp_path / "s")

    works: list[Callable[[], None]] = [partial(survivor, r) for r in range(3)]
    threads([*works, newcomer])


# What was saved, and what it is restored onto: other ranks, placements, copies, index placements.
PAIRS = [
    (Case(seed=1, world=1), {"world": 3, "copies": 2}),
    (Case(seed=2, world=3, prefilled=2, layers=2, picks="select"), {"world": 2}),
    (
        Case(seed=3, world=4, picks="select", index_placement="replicated", copies=2),
        {"world": 3, "index_placement": "with-blocks", "policy": "document-affine"},
    ),
    (
        Case(seed=4, world=2, picks="select", storage="fp8-fp64", prefilled=1),
        {"world": 4, "index_placement": "replicated", "policy": "balanced"},
    ),
    (
        Case(seed=5, world=4, architecture="mlra-4", policy="branch-split", prefilled=1),
        {"world": 3, "policy": "contiguous", "lease_entries": 40},
    ),
    (Case(seed=6, world=3, architecture="mixed", storage="bf16"), {"world": 1}),
]


@pytest.mark.parametrize(
    ("case", "changes"), slow_between(2, PAIRS), ids=[str(c.seed) for c, _ in PAIRS]
)
def test_what_was_saved_is_restored_onto_another_world(
    case: Case, changes: dict[str, Any], tmp_path: Path
) -> None:
    other = replace(case, **changes)
    saved = run_loopback(case.world, partial(save, case=case, folder=tmp_path / "s"))
    found = run_loopback(other.world, partial(restore, case=other, folder=tmp_path / "s"))
    for report, hashes in found:
        assert hashes == saved[0][1], "blocks differ from those that were saved"
        assert list(report.documents.values()) == list(case.documents)
    verified = verify(tmp_path / "s")
    assert verified.damage == ()
    assert verified.unclosed == 0
    assert verified.records == sum(report.written for report, _ in saved)


TEXT = tuple(range(100, 114))  # 14 tokens: three blocks and a half


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    """Order, groups, pins, quotas; shared beginnings once, though who stored them first is gone."""
    folder = tmp_path / "s"

    def first(runtime: Runtime) -> tuple[int, int]:
        runtime.add_document("a", token_ids=TEXT, position=5, salt="x")
        runtime.add_document("b", token_ids=(*TEXT[:8], 1, 2, 3), position=5, salt="x", group="g")
        runtime.add_document("c", token_ids=TEXT[:9], position=5, salt="x", group="g")
        runtime.add_document("d", tokens=3)
        for layer in range(2):
            runtime.load_document("a", layer, contents("a", 14, layer))
            runtime.load_document("b", layer, contents("a", 11, layer))
            runtime.load_document("c", layer, contents("a", 9, layer))
            runtime.load_document("d", layer, contents("d", 3, layer))
        runtime.remove_document("a")
        runtime.pin("c")
        runtime.set_quota("g", 4)  # fewer than it has
        runtime.set_quota("h", 1)
        return runtime.snapshot(folder).closed, runtime._world.directory.num_blocks

    def later(runtime: Runtime) -> None:
        runtime.add_document("own", tokens=6)  # other ids, slots and serial numbers than before
        runtime.set_quota("h", 2)
        report = runtime.restore(folder)
        assert list(report.documents.items()) == [("b", 11), ("c", 9), ("d", 3)]
        own, b, c, d = runtime.documents()
        assert [doc.name for doc in (own, b, c, d)] == ["own", "b", "c", "d"]
        assert [(doc.position, doc.group) for doc in (b, c, d)] == [(5, "g"), (5, "g"), (0, "")]
        assert c.blocks[:2] == b.blocks[:2]
        assert (b.shared, c.shared, runtime._world.directory.num_blocks) == (0, 2, 7)
        assert runtime.pinned() == {"c"}
        assert runtime._world.directory.quotas == {"g": 4, "h": 2}
        for name, tokens, seed in (("b", 11, "a"), ("c", 9, "a"), ("d", 3, "d")):
            attended(runtime, name, tokens, seed=seed)
        with pytest.raises(ValueError, match="has 6 of its 4"):
            runtime.add_document("e", tokens=1, group="g")
        # What they say is known too: another document shares it.
        e = runtime.add_document("e", token_ids=(*TEXT[:8], 1, 2, 3, 4), position=5, salt="x")
        assert e.shared == 2
        assert e.blocks[:2] == b.blocks[:2]
        runtime.remove_document("e")
        assert all(check.is_sound for check in runtime.verify_copies())
        assert runtime.snapshot(folder).written == 0

    saved = world(2, first)
    assert sum(closed for closed, _ in saved) == saved[0][1] == 5  # b, c and d: shared ones once
    world(3, later)
    assert verify(folder).damage == ()


def test_what_is_here_already_is_shared_and_not_read_again(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> tuple[int, int]:
        runtime.add_document("a", token_ids=TEXT)
        for layer in range(2):
            runtime.load_document("a", layer, contents("a", 14, layer))
        runtime.add_document("b", token_ids=TEXT[:10])
        for layer in range(2):
            runtime.load_document("b", layer, contents("a", 10, layer))
        runtime.snapshot(tmp_path / "s")
        runtime.remove_document("a")
        held = runtime.documents()
        before = runtime.scope(documents=["b"], queries=1)
        with pytest.raises(SnapshotError, match="'b' exists already"):
            runtime.restore(tmp_path / "s")
        assert runtime.documents() == held
        runtime.remove_document("b")
        runtime.add_document("c", token_ids=TEXT[:9])
        for layer in range(2):
            runtime.load_document("c", layer, contents("a", 9, layer))
        report = runtime.restore(tmp_path / "s")
        nothing = torch.empty(1, 0, dtype=torch.int32)
        with pytest.raises(ValueError, match="removed since"):  # another one of that name
            runtime.attend(0, torch.zeros(1, 2, 8).double(), runtime.selection(nothing, before))
        for name, tokens in (("a", 14), ("b", 10), ("c", 9)):
            attended(runtime, name, tokens, seed="a")
        return report.read_bytes, runtime._world.directory.num_blocks

    results = world(2, work)
    block_bytes = 2 * B * 64
    assert sum(read for read, _ in results) == (2 + 1) * block_bytes  # the rest of a and of b
    assert results[0][1] == 3 + 2 + 1


def test_what_is_shared_counts_as_far_as_it_is_here(tmp_path: Path) -> None:
    def work(runtime: Runtime) -> None:
        runtime.add_document("a", token_ids=TEXT)
        for layer in range(2):
            runtime.load_document("a", layer, contents("a", 14, layer))
        runtime.snapshot(tmp_path / "s")
        runtime.remove_document("a")
        runtime.add_document("b", token_ids=TEXT)
        request = runtime.request(into="b") if runtime.rank == 0 else None
        for layer in range(2):  # what is saved as a whole is written here now
            if request is not None:
                ids = runtime.append(request, 9) if layer == 0 else request.ids(0, 9)
                runtime.write(layer, ids, contents("a", 9, layer))
        assert runtime.restore(tmp_path / "s").documents == {"a": 9 // B * B}
        attended(runtime, "a", 9 // B * B)

    world(2, work)


def test_damage_found_late_ends_the_world_on_every_rank(tmp_path: Path) -> None:
    folder = tmp_path / "s"

    def save_a(runtime: Runtime) -> None:
        add(runtime, "a", 12)
        runtime.snapshot(folder)

    world(2, save_a)
    (victim,) = folder.glob("*-00001-*.safetensors")
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)

    def work(runtime: Runtime) -> str:
        said = refused(lambda: runtime.restore(folder))
        with pytest.raises(PeerError, match="half restored"):
            runtime.idle_attend(0)
        return said

    first, *others = world(3, work)
    assert f"{victim}: record 0: its bytes are not those of its hash" in first
    assert others == [first, first]
