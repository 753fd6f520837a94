"""Layouts: the payload bytes of the design's table, and every contradiction refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from qroam.partition.codec import make_codec
from qroam.partition.layout import (
    Branch,
    Form,
    IndexLayout,
    Layout,
    ModelLayout,
    Pairing,
    Projection,
    Rope,
    Stream,
)
from qroam.partition.presets import LAYOUT_NAMES, mlra, named_layout, uniform_model, with_codec

LATENT = Stream(name="latent", dim=64, role="kv")
ROPE_KEY = Stream(name="rope_key", dim=16, role="k")
VALUE = Stream(name="value", dim=8, role="v")
BRANCH = Branch(name="b0", streams=(LATENT, ROPE_KEY), head_start=0, heads=4)
LAYOUT = Layout(
    name="case",
    heads=4,
    branches=(BRANCH,),
    softmax_scale=0.1,
    codec="fp32",
    rope=Rope(dim=16, pairing="half"),
    projection=Projection(nope_dim=32, out_dim=32),
)
INDEX = IndexLayout(heads=4, head_dim=32, rope_dim=16, pairing="half", top_k=8)


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        ("mla-v3.2", "A", (147_456, 131_584)),
        ("mla-v3.2", "B", (49_152, 33_280)),
        ("glm-5", "A", (73_728, 65_792)),
        ("glm-5", "B", (32_768, 33_024)),
        # MLRA at 24 heads, architectures.md 0.1, per branch, times the four branches.
        ("mlra-4", "A", (4 * 9_216, 4 * 6_240)),
        ("mlra-2", "A", (4 * 4_608, 4 * 3_120)),
    ],
)
def test_payload_bytes_are_those_of_the_design(
    name: str, form: Form, expected: tuple[int, int]
) -> None:
    assert named_layout(name).payload_bytes(form) == expected


@pytest.mark.parametrize(("variant", "expected"), [(4, (24_576, 16_640)), (2, (12_288, 8_320))])
def test_mlra_payload_of_one_branch_at_64_heads(variant: int, expected: tuple[int, int]) -> None:
    out, back = mlra(4 if variant == 4 else 2, heads=64).payload_bytes("A")
    assert (out // 4, back // 4) == expected


def test_mlra_un_absorbed_rows_are_as_large_as_absorbed_ones() -> None:
    layout = mlra(4, heads=24)
    assert layout.payload_bytes("A") == layout.payload_bytes("B")


@pytest.mark.parametrize(
    ("name", "entry_bytes", "scale"),
    [
        ("mla-v3.2", 656, 0.135234),
        ("glm-5", 656, 0.0625),
        ("mlra-4", 384, 192**-0.5),
        ("mlra-2", 384, 192**-0.5),
    ],
)
def test_stored_bytes_and_scale(name: str, entry_bytes: int, scale: float) -> None:
    layout = named_layout(name)
    codec = make_codec(layout.codec, dim=layout.entry_dim, rope_dim=layout.rope_dim)
    assert codec.entry_bytes == entry_bytes
    assert layout.softmax_scale == pytest.approx(scale, abs=5e-7)


@pytest.mark.parametrize(
    ("name", "pairing", "index_pairing"),
    [("mla-v3.2", "interleaved", "half"), ("glm-5", "interleaved", "interleaved")],
)
def test_rope_pairings(name: str, pairing: Pairing, index_pairing: Pairing) -> None:
    layout = named_layout(name)
    assert layout.rope is not None
    assert layout.index is not None
    assert (layout.rope.pairing, layout.index.pairing) == (pairing, index_pairing)


def test_mlra_branches_and_weights() -> None:
    four, two = named_layout("mlra-4"), named_layout("mlra-2")
    assert [(b.head_start, b.heads, b.weight) for b in four.branches] == [(0, 24, 0.5)] * 4
    starts = [(b.head_start, b.heads) for b in two.branches]
    assert starts == [(0, 12), (12, 12), (0, 12), (12, 12)]
    assert all(math.isclose(b.weight, 2**-0.5) for b in two.branches)
    assert four.rope is not None
    assert four.rope.pairing == "half"


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_query_and_output_columns(name: str) -> None:
    layout = named_layout(name)
    assert layout.projection is not None
    assert layout.key_dim == layout.absorbed_dim + layout.rope_dim
    assert layout.query_dim == layout.projection.nope_dim + layout.rope_dim
    assert layout.out_dim == layout.projection.out_dim
    assert layout.routed_dims("A") == (layout.key_dim, layout.value_dim)
    assert layout.routed_dims("B") == (layout.query_dim, layout.out_dim)
    bare = replace(layout, projection=None)
    assert (bare.query_dim, bare.out_dim) == (bare.key_dim, bare.value_dim)
    assert layout.num_branches * layout.branch_heads >= layout.heads


def test_with_codec_changes_only_the_storage() -> None:
    layout = named_layout("mla-tiny")
    assert with_codec(layout, "bf16") == replace(layout, codec="bf16")
    assert with_codec(layout, "bf16", "fp64") == replace(layout, codec="bf16", index_codec="fp64")


CONTRADICTIONS: dict[str, tuple[str, Callable[[], object]]] = {
    "stream-empty": ("dim must be positive", lambda: Stream(name="s", dim=0, role="k")),
    "stream-role": ("v, kv or k", lambda: Stream(name="s", dim=1, role="q")),  # type: ignore[arg-type]
    "branch-no-streams": ("value-only, tied", lambda: replace(BRANCH, streams=())),
    "branch-stream-order": (
        "value-only, tied",
        lambda: replace(BRANCH, streams=(ROPE_KEY, LATENT)),
    ),
    "branch-stream-twice": ("repeat", lambda: replace(BRANCH, streams=(LATENT, LATENT))),
    "branch-no-key": ("key and one value", lambda: replace(BRANCH, streams=(VALUE,))),
    "branch-no-value": ("key and one value", lambda: replace(BRANCH, streams=(ROPE_KEY,))),
    "branch-no-heads": ("head slice", lambda: replace(BRANCH, heads=0)),
    "branch-negative-start": ("head slice", lambda: replace(BRANCH, head_start=-1)),
    "branch-weight-nan": ("finite", lambda: replace(BRANCH, weight=math.nan)),
    "rope-odd": ("even", lambda: Rope(dim=3, pairing="half")),
    "rope-pairing": ("interleaved or half", lambda: Rope(dim=4, pairing="neox")),  # type: ignore[arg-type]
    "rope-theta": ("theta", lambda: Rope(dim=4, pairing="half", theta=1.0)),
    "projection-empty": ("positive", lambda: Projection(nope_dim=0, out_dim=1)),
    "index-top-k": ("positive", lambda: replace(INDEX, top_k=0)),
    "index-rope-odd": ("even", lambda: replace(INDEX, rope_dim=3)),
    "index-rope-wide": ("within head_dim", lambda: replace(INDEX, rope_dim=64)),
    "index-pairing": ("interleaved or half", lambda: replace(INDEX, pairing="both")),  # type: ignore[arg-type]
    "index-hadamard": ("power of two", lambda: replace(INDEX, head_dim=48, quantized=True)),
    "layout-no-branch": ("at least one branch", lambda: replace(LAYOUT, branches=())),
    "layout-scale-zero": ("softmax_scale", lambda: replace(LAYOUT, softmax_scale=0.0)),
    "layout-scale-nan": ("softmax_scale", lambda: replace(LAYOUT, softmax_scale=math.nan)),
    "layout-uneven-branches": (
        "share streams",
        lambda: replace(LAYOUT, branches=(BRANCH, replace(BRANCH, name="b1", streams=(LATENT,)))),
    ),
    "layout-branch-twice": ("names repeat", lambda: replace(LAYOUT, branches=(BRANCH, BRANCH))),
    "layout-head-missing": ("cover heads", lambda: replace(LAYOUT, heads=5)),
    "layout-head-beyond": ("cover heads", lambda: replace(LAYOUT, heads=3)),
    "layout-rope-wider-than-key": (
        "rope of",
        lambda: replace(LAYOUT, rope=Rope(dim=82, pairing="half")),
    ),
    "layout-nothing-to-absorb": (
        "non-rope key",
        lambda: replace(LAYOUT, rope=Rope(dim=80, pairing="half")),
    ),
    "form-b-without-projection": (
        "no payload form B",
        lambda: replace(LAYOUT, projection=None).payload_bytes("B"),
    ),
    "mlra-2-odd-heads": ("in two", lambda: mlra(2, heads=3)),
    "unknown-name": ("known: mla-v3.2", lambda: named_layout("mla")),
    "model-empty": ("needs layers", lambda: ModelLayout(layers=(), index_source=())),
    "model-source-missing": (
        "index source for each",
        lambda: ModelLayout(layers=(LAYOUT, LAYOUT), index_source=(0,)),
    ),
    "model-source-ahead": (
        "not an earlier",
        lambda: ModelLayout(layers=(LAYOUT, LAYOUT), index_source=(1, 1)),
    ),
    "model-source-of-a-source": (
        "not an earlier",
        lambda: ModelLayout(layers=(LAYOUT,) * 3, index_source=(0, 0, 1)),
    ),
    "model-mixed-branches": (
        "same number of branches",
        lambda: ModelLayout(layers=(LAYOUT, mlra(4, heads=4)), index_source=(0, 1)),
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case: str) -> None:
    message, build = CONTRADICTIONS[case]
    with pytest.raises(ValueError, match=message):
        build()


def test_a_model_shares_indexers() -> None:
    model = uniform_model(LAYOUT, 3)
    assert model.index_source == (0, 1, 2)
    assert ModelLayout(layers=(LAYOUT,) * 3, index_source=(0, 0, 2)).num_branches == 1
