"""Layouts: every contradiction is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from qroam.partition.layout import (
    Branch,
    IndexLayout,
    Layout,
    ModelLayout,
    Projection,
    Rope,
    Stream,
)
from qroam.partition.presets import mlra, named_layout, uniform_model

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
