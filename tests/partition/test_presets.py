"""Layouts of published models: payload bytes, stored bytes, scale, pairing and branches."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from qroam.partition.codec import make_codec
from qroam.partition.layout import Form, Pairing
from qroam.partition.presets import LAYOUT_NAMES, mlra, named_layout, with_codec


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
