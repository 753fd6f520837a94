"""The life of documents: what is gone is gone, what is shared is stored once, who makes room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from effort import slow_after
from ranks import run_loopback
from torch import Tensor

from qroam.partition.directory import Document
from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model, with_codec
from qroam.runtime import CoverageError, PeerError, Request, Runtime, RuntimeConfig, Scope
from qroam.runtime.transport.base import Transport

B, LAYERS, WORLD = 4, 2, 3
LAYOUT = with_codec(named_layout("mla-tiny"), "fp64", "fp64")
H, D, DI, HI = LAYOUT.heads, LAYOUT.key_dim, 32, 4


def config(**changes: Any) -> RuntimeConfig:
    sizes: dict[str, Any] = {
        "model": uniform_model(LAYOUT, LAYERS),
        "max_blocks": 8,
        "block_tokens": B,
        "private_blocks": 3,
        "request_blocks": 3,
        "placement": Placement(copies=2),
        "dtype": torch.float64,
        "deadline_s": 10.0,
        "mode": "always-fetch",
        "lease_entries": 64,
    }
    return RuntimeConfig(**(sizes | changes))


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Ranks:
    """One rank's hands, and an attention that is easily foretold.

    Every key is 0, so a query takes the mean of the values it sees.
    """

    def __init__(self, transport: Transport, **changes: Any) -> None:
        self.runtime = Runtime.open(config(**changes), transport)

    def add(self, name: str, value: float, tokens: int = 2 * B, **options: Any) -> Document:
        if "token_ids" not in options:
            options["tokens"] = tokens
        document = self.runtime.add_document(name, **options)
        self.load(document, value)
        return document

    def load(self, document: Document, value: float) -> None:
        for layer in range(LAYERS):
            entries = torch.full((document.tokens, D), value, dtype=torch.float64)
            keys = torch.full((document.tokens, DI), value, dtype=torch.float64)
            self.runtime.load_document(document.name, layer, entries, keys)

    def append(self, request: Request, tokens: int, value: float) -> Tensor:
        ids = self.runtime.append(request, tokens)
        for layer in range(LAYERS):
            entries = torch.full((tokens, D), value, dtype=torch.float64)
            keys = torch.full((tokens, DI), value, dtype=torch.float64)
            self.runtime.write(layer, ids, entries, keys)
        return ids

    def means(self, names: Sequence[str], scope: Scope | None = None) -> list[float]:
        """What a query that sees these documents whole gets at each layer, by select and attend."""
        scope = self.runtime.scope(documents=names, queries=1) if scope is None else scope
        return [self.mean(layer, scope) for layer in range(LAYERS)]

    def mean(self, layer: int, scope: Scope) -> float:
        runtime = self.runtime
        query, weights = torch.ones(1, HI, DI, dtype=torch.float64), torch.ones(1, HI)
        selection = runtime.select(layer, query, weights, scope=scope)
        out = runtime.attend(layer, torch.zeros(1, H, D, dtype=torch.float64), selection)
        assert float((out - out[0, 0, 0]).abs().max()) < 1e-12
        return round(float(out[0, 0, 0]), 9)


def on_all(worker: Callable[[Ranks], Any], **changes: Any) -> list[Any]:
    return run_loopback(WORLD, lambda transport: worker(Ranks(transport, **changes)))


@pytest.mark.parametrize("index_placement", slow_after(1, ["with-blocks", "replicated"]))
@pytest.mark.parametrize("mode", ["always-fetch", "always-route"])
def test_what_comes_into_the_same_slots_is_never_mistaken(mode: str, index_placement: str) -> None:
    """Owners, replicas and leases all held the removed document; none of it is ever read again."""

    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        before = ranks.add("a", 1.0, 8 * B)  # fills the corpus
        assert ranks.means(["a"]) == [1.0] * LAYERS
        assert ranks.means(["a"]) == [1.0] * LAYERS  # from leases, when fetching
        runtime.remove_document("a")
        assert runtime.documents() == []
        after = ranks.runtime.add_document("b", tokens=8 * B)
        assert after.blocks == before.blocks
        scope = runtime.scope(documents=["b"], queries=1)
        everything = runtime.selection(after.ids()[None], scope)
        # b is not written yet, and a is not there
        with pytest.raises((CoverageError, PeerError), match=r"lacked|covered 0"):
            runtime.attend(0, torch.zeros(1, H, D, dtype=torch.float64), everything)

    on_all(worker, mode=mode, index_placement=index_placement)

    def rewritten(ranks: Ranks) -> None:
        for round in range(4):
            ranks.add("a", 1.0 + round, 8 * B)
            for _ in range(2):
                assert ranks.means(["a"]) == [1.0 + round] * LAYERS
            ranks.runtime.remove_document("a")

    on_all(rewritten, mode=mode, index_placement=index_placement)


def test_rows_written_for_a_removed_document_never_reach_its_successor() -> None:
    """They were staged for copies elsewhere when the document went."""

    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        for value, writer in ((1.0, 0), (2.0, 1)):
            runtime.add_document("a", tokens=8 * B)
            if runtime.rank == writer:
                request = runtime.request(into="a")
                ranks.append(request, 8 * B, value)
                runtime.release(request)
            if value == 1.0:
                runtime.remove_document("a")
        assert ranks.means(["a"]) == [2.0] * LAYERS

    on_all(worker)


def test_what_was_made_before_a_removal_is_refused() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        ranks.add("a", 1.0)
        ranks.add("b", 2.0)
        runtime.add_document("c", tokens=B)
        reader, prefill = runtime.request(["a", "b"]), runtime.request(["b"], into="c")
        at = ranks.append(reader, 1, 5.0)
        prefill_ids = runtime.append(prefill, 1)
        scope = runtime.scope(documents=["a"], queries=1)
        reading = runtime.scope(requests=[(reader, at)])
        selection = runtime.selection(scope.runs[:, :1, 0].contiguous(), scope)
        query = torch.zeros(1, H, D, dtype=torch.float64)
        index_query = torch.ones(1, HI, DI, dtype=torch.float64), torch.ones(1, HI)
        document = runtime.documents()[0]
        for name in ("a", "c"):
            runtime.remove_document(name)
            ranks.add(name, 9.0, document.tokens)  # in the same blocks, under the same name
        assert runtime.documents()[-2].blocks == document.blocks
        refused: list[Callable[[], object]] = [
            lambda: runtime.attend(0, query, selection),
            lambda: runtime.select(0, *index_query, scope=scope),
            lambda: runtime.select(0, *index_query, scope=reading),
            lambda: runtime.scope(requests=[(reader, at)]),
            lambda: runtime.append(reader, 1),
            lambda: runtime.append(prefill, 1),
            lambda: runtime.write(0, prefill_ids, numbers(1, D, seed=1), numbers(1, DI, seed=1)),
        ]
        for act in refused:
            with pytest.raises(ValueError, match="was removed since"):
                act()
        runtime.release(prefill)
        with pytest.raises(ValueError, match="appended to an open request"):
            refused[-1]()
        runtime.release(reader)
        assert ranks.means(["a", "b"]) == [(9.0 + 2.0) / 2] * LAYERS

    on_all(worker, max_blocks=6)


def test_a_request_that_follows_a_released_one_is_not_mistaken_for_it() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        first = runtime.request()
        at = ranks.append(first, 2, 1.0)
        scope = runtime.scope(requests=[(first, at[-1:])])
        selection = runtime.selection(at[None], scope)
        runtime.release(first)
        second = runtime.request()
        assert ranks.append(second, 2, 2.0).tolist() == at.tolist()
        with pytest.raises(ValueError, match="released"):
            runtime.attend(0, torch.zeros(1, H, D, dtype=torch.float64), selection)

    on_all(worker)


def test_equal_prefixes_are_stored_once_and_outlive_one_another() -> None:
    system, question = list(range(2 * B)), [90, 91, 92, 93, 94]

    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        first = ranks.add("a", 1.0, token_ids=system + question)
        held = runtime.stats()["block_bytes"]
        second = ranks.add("b", 1.0, token_ids=[*system, 7, 8])
        assert (first.shared, second.shared) == (0, 2)
        assert second.blocks[:2] == first.blocks[:2]
        assert second.num_blocks == 3
        third = ranks.add("c", 3.0, token_ids=system, salt="other")
        assert third.shared == 0
        assert set(third.blocks).isdisjoint(first.blocks)
        with pytest.raises(ValueError, match="'b' and 'a' share blocks"):
            runtime.scope(documents=["a", "b"], queries=1)
        with pytest.raises(ValueError, match="share blocks"):
            runtime.request(["a"], into="b")
        with pytest.raises(
            ValueError, match=r"start in document .b. must be a whole number in \[8, 9\]"
        ):
            runtime.request(into="b", start=0)
        assert runtime.request(into="b").length == 2 * B
        assert ranks.means(["b"]) == [1.0] * LAYERS
        runtime.remove_document("a")
        assert ranks.means(["b", "c"]) == [round((10 * 1.0 + 8 * 3.0) / 18, 9)] * LAYERS
        again = runtime.add_document("a", token_ids=system)
        assert again.blocks == first.blocks[:2]  # all of it is there
        assert ranks.means(["a"]) == [1.0] * LAYERS
        for name in ("a", "b", "c"):
            runtime.remove_document(name)
        assert ranks.add("d", 4.0, token_ids=system).shared == 0  # nobody holds it any more
        assert runtime.stats()["block_bytes"] < held

    on_all(worker, mode="always-route")


@pytest.mark.parametrize("index_placement", ["with-blocks", "replicated"])
def test_a_requests_own_tokens_become_a_document_at_home(index_placement: str) -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        ranks.add("a", 1.0, 5)
        request = runtime.request(["a"])
        rows = numbers(LAYERS, B + 2, D, seed=runtime.rank)
        keys = numbers(LAYERS, B + 2, DI, seed=10)
        ids = runtime.append(request, B + 2)
        if runtime.rank == 1:
            with pytest.raises(ValueError, match="token 0 at layer 0 is not written"):
                runtime.publish("p", request)
        for layer in range(LAYERS):
            runtime.write(layer, ids, rows[layer], keys[layer])
        document = runtime.publish("p", request if runtime.rank == 1 else None)
        assert (document.tokens, document.position) == (B + 2, 5)
        owners = runtime._world.directory.owners[list(document.blocks)]
        assert owners[:, 0].tolist() == [1, 1]
        runtime.release(request)
        theirs = numbers(LAYERS, B + 2, D, seed=1)
        query = numbers(1, H, D, seed=3)
        for layer in range(LAYERS):
            scope = runtime.scope(documents=["p"], queries=1)
            out = runtime.attend(layer, query, runtime.selection(document.ids()[None], scope))
            scores = (query[0] @ theirs[layer].T * LAYOUT.softmax_scale).softmax(-1)
            expected = scores @ theirs[layer][:, : LAYOUT.value_dim]
            assert float((out[0] - expected).abs().max()) < 1e-12
            index_query, weights = numbers(1, HI, DI, seed=4), torch.ones(1, HI)
            found = runtime.select(layer, index_query, weights, documents=["p"], top_k=3)
            score = (index_query[0].double() @ keys[layer].T).relu().sum(0)
            best = document.ids()[score.topk(3).indices].sort().values
            assert found.ids[0].tolist() == best.tolist()

    on_all(worker, index_placement=index_placement)


def test_publish_needs_one_request_and_room_on_every_rank() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        request = runtime.request()
        ranks.append(request, B, 1.0)
        with pytest.raises(ValueError, match=r"got ranks \[\]"):
            runtime.publish("p", None)
        with pytest.raises(ValueError, match=r"got ranks \[0, 1, 2\]"):
            runtime.publish("p", request)
        ranks.add("a", 2.0, 8 * B)
        with pytest.raises(ValueError, match="needs 1 blocks, 0 of 8 are free"):
            runtime.publish("p", request if runtime.rank == 0 else None)
        runtime.remove_document("a")
        runtime.publish("p", request if runtime.rank == 2 else None)
        with pytest.raises(ValueError, match="exists already"):
            runtime.publish("p", request if runtime.rank == 2 else None)
        # What rank 0 says of the same tokens is stored already.
        shared = runtime.publish(
            "q", request if runtime.rank == 0 else None, token_ids=[1] * B, group="g"
        )
        again = runtime.publish("r", request if runtime.rank == 1 else None, token_ids=[1] * B)
        assert again.blocks == shared.blocks
        assert ranks.means(["p", "r"]) == [1.0] * LAYERS

    on_all(worker)


def test_pinned_documents_stay() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        ranks.add("a", 1.0, 4 * B)
        ranks.add("b", 2.0, 4 * B)
        runtime.pin("a")
        runtime.pin("a")
        assert runtime.pinned() == {"a"}
        with pytest.raises(ValueError, match="'a' is pinned"):
            runtime.remove_document("a")
        with pytest.raises(ValueError, match=r"pinned or in use: document 'c' needs 5 blocks"):
            runtime.make_room("c", tokens=5 * B)
        assert [document.name for document in runtime.documents()] == ["a", "b"]
        assert runtime.make_room("c", tokens=B) == ["b"]
        runtime.unpin("a")
        assert runtime.make_room("c", tokens=8 * B) == ["a"]
        with pytest.raises(ValueError, match="unknown document 'a'"):
            runtime.pin("a")

    on_all(worker)


def test_eviction_by_age_and_by_reuse_counts_the_uses_of_all_ranks() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        for name in "abc":
            ranks.add(name, 1.0, 2 * B)
        ranks.add("idle", 1.0, 2 * B)
        runtime.remove_document("idle")
        for _ in range(4):  # a, again and again, but only at rank 1
            ranks.means(["a"] if runtime.rank == 1 else ["b"] if runtime.rank == 0 else [])
        ranks.means(["b"])
        ranks.means(["c"])
        assert runtime.make_room("d", tokens=2 * B) == []  # it fits
        by_age = runtime.make_room("d", tokens=4 * B)
        assert by_age == ["a"]
        ranks.add("a", 1.0, 2 * B)
        assert runtime.make_room("d", tokens=4 * B) == ["a"]  # never used
        ranks.add("a", 1.0, 2 * B)
        for _ in range(3):
            ranks.means(["a"])
        ranks.means(["c"] if runtime.rank == 2 else [])
        assert runtime.make_room("d", tokens=6 * B, policy="reuse") == ["c", "b"]
        assert [document.name for document in runtime.documents()] == ["a"]

    on_all(worker, max_blocks=8)


def test_what_an_open_request_of_any_rank_reads_is_not_evicted() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        for name in "abcd":
            ranks.add(name, 1.0, 2 * B)
        names = {0: [], 1: ["a"], 2: []}[runtime.rank]
        request = runtime.request(names)
        prefill = runtime.request(into="b") if runtime.rank == 2 else None
        assert runtime.make_room("e", tokens=2 * B) == ["c"]
        with pytest.raises(ValueError, match="in use"):
            runtime.make_room("e", tokens=5 * B)
        runtime.release(request)
        if prefill is not None:
            runtime.release(prefill)
        assert runtime.make_room("e", tokens=8 * B) == ["a", "b", "d"]

    on_all(worker)


def test_quotas_bound_a_group_and_evict_only_within_it() -> None:
    def worker(ranks: Ranks) -> None:
        runtime = ranks.runtime
        runtime.set_quota("g", 3)
        ranks.add("other", 1.0, B)
        ranks.add("a", 1.0, B, group="g")
        ranks.add("b", 2.0, 2 * B, group="g")
        with pytest.raises(ValueError, match="group 'g' has 3 of its 3"):
            runtime.add_document("c", tokens=1, group="g")
        assert runtime.make_room("c", tokens=2 * B, group="g") == ["a", "b"]
        with pytest.raises(ValueError, match="group 'g' has 0 of its 3"):
            runtime.make_room("c", tokens=4 * B, group="g")
        runtime.set_quota("g", None)
        assert runtime.make_room("c", tokens=7 * B, group="g") == []
        with pytest.raises(ValueError, match=r"the quota of group .* must be a whole number in"):
            runtime.set_quota("g", -1)

    on_all(worker)


BAD: dict[str, tuple[str, Callable[[Runtime], object]]] = {
    "no-size": ("tokens of document .x. must be a whole number in", lambda r: r.add_document("x")),
    "two-sizes": (
        "3 token ids for 4 tokens",
        lambda r: r.add_document("x", tokens=4, token_ids=[1, 2, 3]),
    ),
    "negative-token": (
        "a token id of document .x. must be a whole number in",
        lambda r: r.add_document("x", token_ids=[-1] * B),
    ),
    "name": ("must be a string", lambda r: r.add_document(3, tokens=1)),  # type: ignore[arg-type]
    "long-name": ("up to 256", lambda r: r.add_document("x" * 257, tokens=1)),
    "group": (
        "must be a string",
        lambda r: r.add_document("x", tokens=1, group=None),  # type: ignore[arg-type]
    ),
    "remove-unknown": ("unknown document 'x'; known: a", lambda r: r.remove_document("x")),
    "room-for-what-exists": ("exists already", lambda r: r.make_room("a", tokens=1)),
    "room-by-another-policy": (
        "unknown policy 'fifo'; known: lru, reuse",
        lambda r: r.make_room("x", tokens=1, policy="fifo"),  # type: ignore[arg-type]
    ),
    "publish-nothing": (
        "own private tokens",
        lambda r: r.publish("x", r.request()),
    ),
    "publish-a-prefill": (
        "own private tokens",
        lambda r: r.publish("x", r.request(into="a")),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    message, act = BAD[case]
    with Runtime.open(config(placement=Placement())) as runtime:
        runtime.add_document("a", tokens=B)
        before = runtime._world.directory.version, runtime._world.progress.epoch
        with pytest.raises(ValueError, match=message):
            act(runtime)
        assert (runtime._world.directory.version, runtime._world.progress.epoch) == before
