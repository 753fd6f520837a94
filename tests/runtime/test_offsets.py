"""Documents at other positions: the rotation itself, YaRN, the door, leases and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import dense
import pytest
import torch
from ranks import run_loopback
from torch import Tensor

from qroam.indexer import hadamard, rotate_index, scores
from qroam.partition.codec import make_codec
from qroam.partition.layout import IndexLayout, ModelLayout, Pairing, Rope, Yarn
from qroam.partition.presets import named_layout, uniform_model, with_codec
from qroam.partition.rope import apply_rope, inverse_frequencies, rotate
from qroam.runtime import CoverageError, PeerError, Runtime, RuntimeConfig
from qroam.runtime.scope import MAX_OFFSETS
from qroam.runtime.transport.base import Transport

B, DI, HI = 4, 32, 4
LAYOUT = with_codec(named_layout("mla-tiny"), "fp64", "fp64")
H, D = LAYOUT.heads, LAYOUT.key_dim


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config(**changes: Any) -> RuntimeConfig:
    sizes: dict[str, Any] = {
        "model": uniform_model(LAYOUT, 2),
        "max_blocks": 8,
        "block_tokens": B,
        "private_blocks": 4,
        "request_blocks": 4,
        "dtype": torch.float64,
        "deadline_s": 10.0,
    }
    return RuntimeConfig(**(sizes | changes))


# The rotation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("yarn", [None, Yarn(factor=40.0, original_positions=4096)])
def test_rotating_moves_a_key_from_one_position_to_another(
    pairing: Pairing, yarn: Yarn | None
) -> None:
    rope = Rope(dim=16, pairing=pairing, yarn=yarn)
    x, by = numbers(7, 3, 16), torch.tensor([0, 1, -1, 5, -300, 2000, 7])
    at = torch.tensor([0, 3, 9, 100, 400, 17, 50])
    frequencies = inverse_frequencies(rope)

    def there(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return apply_rope(x, angles.cos(), angles.sin(), pairing=pairing)

    assert float((rotate(there(at), by, rope) - there(at + by)).abs().max()) < 1e-12
    assert torch.equal(rotate(x, torch.zeros(7), rope), x)
    assert torch.equal(rotate(x[:0], by[:0], rope), x[:0])


@pytest.mark.parametrize("magnitude", [{}, {"mscale": 1.0, "mscale_all_dim": 0.8}])
def test_yarns_magnitude_is_never_applied_twice(magnitude: dict[str, float]) -> None:
    """Against the tables of transformers, whose cos and sin have YaRN's magnitude in them."""
    rope_init = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import DeepseekV3Config

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **magnitude,
    }
    model = DeepseekV3Config(
        qk_rope_head_dim=64, rope_parameters=parameters, max_position_embeddings=163840
    )
    model.head_dim = 64
    theirs, factor = rope_init.ROPE_INIT_FUNCTIONS["yarn"](model, torch.device("cpu"))
    rope = Rope(dim=64, pairing="half", yarn=Yarn(factor=40.0, original_positions=4096))
    ours = inverse_frequencies(rope)
    assert factor != 1.0
    assert float(((ours - theirs) / theirs).abs().max()) < 1e-6  # theirs are fp32
    x = numbers(5, 64)

    def there(position: int) -> Tensor:
        angles = (position * ours).expand(5, -1)
        return apply_rope(x, angles.cos() * factor, angles.sin() * factor, pairing="half")

    moved = rotate(there(11), torch.full((5,), 500), rope)
    assert float((moved - there(511)).abs().max()) < 1e-12
    assert float((moved.norm(dim=-1) / x.norm(dim=-1) - factor).abs().max()) < 1e-12


def test_v32_has_the_frequencies_of_its_config() -> None:
    assert named_layout("mla-v3.2").rope == Rope(
        dim=64, pairing="interleaved", yarn=Yarn(factor=40.0, original_positions=4096)
    )


@pytest.mark.parametrize(
    "wrong", [{"factor": 0.5}, {"original_positions": 0}, {"beta_fast": 0.5}, {"beta_slow": 0.0}]
)
def test_impossible_yarns_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="YaRN needs"):
        Yarn(**{"factor": 4.0, "original_positions": 16, **wrong})


def test_a_quantised_index_query_is_rotated_behind_its_hadamard_matrix() -> None:
    index = IndexLayout(heads=2, head_dim=16, rope_dim=8, pairing="half", top_k=1, quantized=True)
    rope = Rope(dim=8, pairing="half")
    query, keys, weights = numbers(3, 2, 16), numbers(9, 16, seed=1), numbers(3, 2, seed=2)
    by = torch.full((3,), -6)
    turned = rotate_index(hadamard(query), by, index, rope)
    moved = rotate_index(hadamard(keys), torch.full((9,), 6), index, rope)
    plain = torch.cat((rotate(keys[:, :8], torch.full((9,), 6), rope), keys[:, 8:]), dim=1)
    expected = scores(query, weights, plain, tile_bytes=1 << 20)
    for found in (
        scores(turned, weights, hadamard(keys), tile_bytes=1 << 20),
        scores(hadamard(query), weights, moved, tile_bytes=1 << 20),
    ):
        assert float((found - expected).abs().max()) < 1e-12


# Documents at offsets ----------------------------------------------------------------------------


def opened(transport: Transport | None = None, **changes: Any) -> Runtime:
    """A runtime with documents a and b of two blocks, both at position 10."""
    runtime = Runtime.open(config(**changes), transport)
    for seed, name in enumerate("ab"):
        runtime.add_document(name, tokens=2 * B, position=10)
        for layer, layout in enumerate(runtime.config.model.layers):
            keys = numbers(2 * B, DI, seed=9 + seed) if layout.index else None
            runtime.load_document(name, layer, numbers(2 * B, D, seed=seed), keys)
    return runtime


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("quantized", [False, True])
def test_attached_and_leased_documents_give_what_a_prefill_there_would(
    world: int, quantized: bool
) -> None:
    """One document by offset, by lease, and written at the place it is moved to: all the same."""
    index = replace(LAYOUT.index, quantized=quantized) if LAYOUT.index else None
    layout = replace(LAYOUT, index=index)
    rope = layout.index_rope
    assert index is not None
    assert rope is not None
    offset = 37
    by = torch.full((2 * B,), offset)

    def worker(transport: Transport) -> None:
        runtime = opened(transport, model=uniform_model(layout, 2))
        there = runtime.add_document("there", tokens=2 * B, position=10 + offset)
        entries, keys = numbers(2 * B, D), numbers(2 * B, DI, seed=9)
        moved = dense.moved_keys(entries, offset, layout.rope)
        moved_keys = rotate_index(keys, by, index, rope)
        for layer in range(2):
            runtime.load_document("there", layer, moved, moved_keys)
        request = runtime.request([("b", 10 + offset - 2 * B)])  # it ends where the lease begins
        assert request.position == 10 + offset
        ids = runtime.copy_document(request, "a")
        assert ids is not None
        assert request.position == 10 + offset + 2 * B
        own = runtime.scope(requests=[(request, ids[-1:])])
        places = [
            (runtime.scope(documents=["there"], queries=1), there.ids()),
            (
                runtime.scope(documents=[("a", 10 + offset)], queries=1),
                runtime.documents()[0].ids(),
            ),
            (own, ids),
        ]
        query, weights = numbers(1, HI, DI, seed=5), numbers(1, HI, seed=6).abs()
        results = []
        for scope, listed in places:
            for layer in range(2):
                out = runtime.attend(
                    layer, numbers(1, H, D, seed=7), runtime.selection(listed[None], scope)
                )
                results.append((layer, out))
        for layer, out in results:
            assert float((out - results[layer][1]).abs().max()) < 1e-12
        found = [
            runtime.select(0, query, weights, scope=scope, top_k=3).ids[0]
            for scope, _ in places[:2]
        ]
        assert (found[0] - there.start).tolist() == (found[1] - 0).tolist()
        runtime.release(request)

    run_loopback(world, worker)


def test_a_lease_names_the_holders_that_lack_something() -> None:
    def worker(transport: Transport) -> None:
        runtime = opened(transport)
        runtime.add_document("empty", tokens=B)
        request = runtime.request()
        lacking = r"'empty': rank 0 lacked 4 entries"

        def act() -> None:
            runtime.copy_document(request, "empty" if runtime.rank == 1 else "a")
            runtime.idle_attend(0)  # what rank 1 found is told to all

        with pytest.raises((CoverageError, PeerError), match=lacking):
            act()

    run_loopback(2, worker)


def test_index_keys_and_entries_of_any_codec_survive_a_lease_in_place() -> None:
    """At offset 0 nothing is rotated, and what is stored comes back bit for bit."""
    for codec, index_codec in (("bf16", "fp8_index"), ("fp32", "fp32"), ("fp64", "fp64")):
        model = uniform_model(with_codec(LAYOUT, codec, index_codec), 2)
        with opened(model=model) as runtime:
            runtime.add_document("first", tokens=2 * B, position=0)
            rows = numbers(2 * B, D, seed=3)
            for layer in range(2):
                runtime.load_document("first", layer, rows, numbers(2 * B, DI, seed=4))
            request = runtime.request()
            ids = runtime.copy_document(request, "first")
            assert ids is not None
            world = runtime._world
            source = runtime.documents()[-1].ids()
            for layer in range(2):
                for store in (world.stores.entries, world.stores.index):
                    index = [store.resolve(layer, part)[0] for part in (source, ids)]
                    assert torch.equal(*(store.rows(layer, at) for at in index))


MIXED = ModelLayout(
    layers=(LAYOUT, replace(LAYOUT, rope=None, projection=None)), index_source=(0, 1)
)
BAD: dict[str, tuple[str, dict[str, Any], Callable[[Runtime], object]]] = {
    "negative-position": ("position >= 0", {}, lambda r: r.request([("a", -1)])),
    "no-number": ("position >= 0", {}, lambda r: r.request([("a", 1.5)])),  # type: ignore[list-item]
    "no-pair": ("position >= 0", {}, lambda r: r.request([("a", 1, 2)])),  # type: ignore[list-item]
    "twice": ("attached twice", {}, lambda r: r.request(["a", ("a", 9)])),
    "no-rope": ("no rope", {"model": MIXED}, lambda r: r.request([("a", 9)])),
    "copy-no-rope": ("no rope", {"model": MIXED}, lambda r: r.copy_document(r.request(), "a")),
    "copy-half": ("or neither", {}, lambda r: r.copy_document(r.request(), None)),
    "copy-into": (
        "private tokens only",
        {},
        lambda r: r.copy_document(r.request(into="a"), "b"),
    ),
    "copy-room": (
        "cannot append 8 tokens",
        {"request_blocks": 1},
        lambda r: r.copy_document(r.request(), "a"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_attachments_are_refused(case: str) -> None:
    message, changes, act = BAD[case]
    with opened(**changes) as runtime:
        epoch = runtime._world.progress.epoch
        with pytest.raises(ValueError, match=message):
            act(runtime)
        assert runtime._world.progress.epoch == epoch


def test_a_request_has_so_many_offsets_at_most() -> None:
    with Runtime.open(config(max_blocks=70, block_tokens=1)) as runtime:
        for number in range(MAX_OFFSETS + 1):
            runtime.add_document(str(number), tokens=1)
        places = [(str(number), 2 * number) for number in range(MAX_OFFSETS + 1)]
        runtime.request(places[:-1])
        with pytest.raises(ValueError, match="at 64 offsets at once, got 65"):
            runtime.request(places)


def test_v32_rows_lose_nothing_but_the_rope_columns_rounding_when_moved() -> None:
    """The latent of FlashMLA's fp8 row is decoded and encoded again without a change."""
    layout = named_layout("mla-v3.2")
    codec = make_codec(layout.codec, dim=layout.entry_dim, rope_dim=layout.rope_dim)
    rows = codec.encode(numbers(32, layout.entry_dim).float())
    numbers_kept = codec.decode(rows, torch.float32)
    again = codec.decode(codec.encode(numbers_kept), torch.float32)
    assert torch.equal(again, numbers_kept)
