"""`Runtime.select` gives the same units with scores of the same bits in every world and placement."""

from __future__ import annotations

import random
import threading
from typing import Any, NamedTuple

import pytest
import torch
from effort import slow_after
from ranks import run_loopback
from torch import Tensor

from qroam.indexer import hadamard, merge_topk
from qroam.partition.codec import act_quant
from qroam.partition.layout import IndexLayout, Layout
from qroam.partition.placement import PLACEMENT_POLICIES, Placement
from qroam.partition.presets import mla, uniform_model
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.cpu import select
from qroam.runtime.transport.base import Transport

B, TOP_K = 8, 45
DOCUMENTS = {"a": 83, "b": 8, "c": 130, "d": 61}
OFFSETS = {"a": 0, "b": 700, "c": 700, "d": 31}


class Scored(NamedTuple):
    """What one rank selected: (document, token) ids (Q, K), -1 padded, ascending; their scores' bits."""

    ids: Tensor
    bits: Tensor


class World(NamedTuple):
    """Where everything is in one run: how many ranks, in which order documents were added, and how."""

    ranks: int
    order: tuple[str, ...]
    changes: dict[str, Any]


def layout_of(heads: int, dim: int, codec: str) -> Layout:
    return mla(
        name="selected",
        heads=2,
        latent=16,
        rope=8,
        nope=8,
        value=8,
        softmax_scale=0.3,
        codec="fp32",
        index=IndexLayout(
            heads=heads,
            head_dim=dim,
            rope_dim=8,
            pairing="half",
            top_k=TOP_K,
            quantized=codec == "fp8_index",
        ),
        index_codec=codec,
    )


def drawn(layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """index queries (9, Hi, D), weights (9, Hi) and each document's index keys."""
    g = torch.Generator().manual_seed(3)
    index = layout.index
    assert index is not None
    query = torch.randn(9, index.heads, index.head_dim, generator=g, dtype=torch.float64)
    # Mostly positive, so that no zeros are selected: those are ties, which go by the id.
    weights = torch.rand(9, index.heads, generator=g, dtype=torch.float64)
    weights[:, 0] *= -0.1
    keys = {
        name: torch.randn(tokens, index.head_dim, generator=g, dtype=torch.float64)
        for name, tokens in DOCUMENTS.items()
    }
    if index.quantized:
        values, scale = act_quant(hadamard(query))
        query = values.double() * scale
        keys = {name: hadamard(rows) for name, rows in keys.items()}
    return query.to(dtype), weights.to(dtype), {n: rows.to(dtype) for n, rows in keys.items()}


def worlds(seed: str) -> list[World]:
    """One rank with all memory, then 1 to 4 ranks with placements, orders and workspaces at random."""
    rng = random.Random(seed)
    found = [World(1, tuple(DOCUMENTS), {})]
    for ranks in (1, 2, 2, 3, 3, 4, 4):
        changes = {
            "workspace_bytes": rng.choice((512, 20_000, 60_000, 1 << 20)),
            "index_placement": rng.choice(("with-blocks", "with-blocks", "replicated")),
            "placement": Placement(
                policy=rng.choice(PLACEMENT_POLICIES),
                run=rng.randint(1, 3),
                copies=rng.randint(1, ranks),
            ),
        }
        found.append(World(ranks, tuple(rng.sample(list(DOCUMENTS), 4)), changes))
    return found


def selected(
    world: World,
    layout: Layout,
    dtype: torch.dtype,
    *,
    at_offsets: bool,
    unit_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Scored]:
    """What each rank selects: rank r for all queries but the first r (of rank 0 all)."""
    query, weights, keys = drawn(layout, dtype)
    scores = threading.local()

    def keep(score: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores.last, chosen = merge_topk(score, ids, k)
        return scores.last, chosen

    monkeypatch.setattr(select, "merge_topk", keep)

    def worker(transport: Transport) -> Scored:
        config = RuntimeConfig(
            model=uniform_model(layout, 1),
            max_blocks=64,
            block_tokens=B,
            dtype=dtype,
            corpus_slots=64,
            **world.changes,
        )
        with Runtime.open(config, transport) as runtime:
            for name in world.order:
                runtime.add_document(name, tokens=DOCUMENTS[name])
                entries = torch.zeros(DOCUMENTS[name], layout.entry_dim, dtype=dtype)
                runtime.load_document(name, 0, entries, keys[name])
            attached: list[str | tuple[str, int]] = list(DOCUMENTS)
            if at_offsets:
                attached = list(OFFSETS.items())
            at = slice(runtime.rank, None)
            selection = runtime.select(
                0, query[at], weights[at], documents=attached, unit_tokens=unit_tokens
            )
            named = torch.full((64 * B,), -1, dtype=torch.int64)  # document and token of an entry
            for number, document in enumerate(sorted(runtime.documents(), key=lambda d: d.name)):
                tokens = torch.arange(document.tokens)
                named[document.ids().long()] = number * 1000 + tokens
            units = selection.ids.long()
            places = torch.where(units < 0, -1, named[(units * unit_tokens).clamp(min=0)])
            words = {4: torch.int32, 8: torch.int64}[scores.last.element_size()]
            bits = scores.last.contiguous().view(words).long()
            order = places.argsort(dim=1)
            return Scored(places.gather(1, order), bits.gather(1, order))

    return run_loopback(world.ranks, worker)


@pytest.mark.parametrize("at_offsets", [False, True], ids=["in place", "at offsets"])
@pytest.mark.parametrize("unit_tokens", slow_after(1, [1, 4]))
@pytest.mark.parametrize(
    ("heads", "dim", "codec", "dtype"),
    [
        (3, 16, "fp32", torch.float32),
        (3, 16, "fp64", torch.float64),
        (20, 64, "fp32", torch.float32),
        (4, 32, "fp8_index", torch.float32),
        (16, 128, "fp8_index", torch.float64),
        (5, 64, "bf16", torch.bfloat16),
    ],
)
def test_selections_do_not_depend_on_the_world(
    heads: int,
    dim: int,
    codec: str,
    dtype: torch.dtype,
    unit_tokens: int,
    at_offsets: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = layout_of(heads, dim, codec)
    how: dict[str, Any] = {"at_offsets": at_offsets, "unit_tokens": unit_tokens}
    expected: Scored | None = None
    for world in worlds(f"{heads} {dim} {codec} {at_offsets} {unit_tokens}"):
        for rank, found in enumerate(
            selected(world, layout, dtype, monkeypatch=monkeypatch, **how)
        ):
            expected = expected or found
            assert (expected.ids >= 0).all()
            assert torch.equal(found.ids, expected.ids[rank:]), world
            assert torch.equal(found.bits, expected.bits[rank:]), world
