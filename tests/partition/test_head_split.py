"""The heads that a tensor-parallel lane keeps of each branch."""

from __future__ import annotations

import pytest

from qroam.partition.head_split import Heads, lane_layout
from qroam.partition.layout import Layout
from qroam.partition.presets import mlra, named_layout
from qroam.runtime.cost.model import LayerFacts


def shape(layout: Layout) -> list[tuple[str, int, int]]:
    return [(branch.name, branch.head_start, branch.heads) for branch in layout.branches]


def test_a_lane_keeps_its_heads_of_each_branch() -> None:
    v32 = lane_layout(named_layout("mla-v3.2"), 112, 16)
    assert (v32.heads, shape(v32)) == (16, [("mla", 0, 16)])
    assert v32.payload_bytes("A") == (147_456 // 8, 131_584 // 8)
    assert v32.index == named_layout("mla-v3.2").index
    four = lane_layout(mlra(4, heads=24), 6, 6)
    assert shape(four) == [(f"latent{b}", 0, 6) for b in range(4)]
    two = mlra(2, heads=24)
    assert shape(lane_layout(two, 0, 12)) == [("latent0", 0, 12), ("latent2", 0, 12)]
    assert shape(lane_layout(two, 18, 6)) == [("latent1", 0, 6), ("latent3", 0, 6)]
    across = [("latent0", 0, 4), ("latent1", 4, 4), ("latent2", 0, 4), ("latent3", 4, 4)]
    assert shape(lane_layout(two, 8, 8)) == across
    assert lane_layout(two, 0, 24) is two
    facts = LayerFacts.of(v32, entry_bytes=656, element_bytes=2)
    whole = LayerFacts.of(named_layout("mla-v3.2"), entry_bytes=656, element_bytes=2)
    assert facts.attend_flop * 8 == whole.attend_flop
    assert facts.entry_bytes == whole.entry_bytes
    assert [form.weight_bytes * 8 for form in facts.forms] == [
        form.weight_bytes for form in whole.forms
    ]


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ((8, 10), r"unequal numbers, \{'latent0': 4, 'latent1': 6, 'latent2': 4, 'latent3': 6\}"),
        ((20, 5), "has 24 heads, not 5 from 20 on"),
        ((-1, 5), "has 24 heads, not 5 from -1 on"),
        ((3, 0), "has 24 heads, not 0 from 3 on"),
    ],
)
def test_heads_that_no_lane_can_have(heads: Heads, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lane_layout(mlra(2, heads=24), *heads)
