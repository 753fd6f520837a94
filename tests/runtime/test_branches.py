"""Heads as items of branches, and branches as one output: by weight, overlapping heads, sinks once."""

from __future__ import annotations

from dataclasses import replace

import torch

from qroam.partition.layout import Branch, Layout, Stream
from qroam.runtime.branches import by_item, combine

STREAM = Stream(name="kv", dim=3, role="kv")
# Heads 0-1 and 1-2: head 1 is in both.
LAYOUT = Layout(
    name="two",
    heads=3,
    branches=tuple(
        Branch(name=f"b{b}", streams=(STREAM,), head_start=b, heads=2, weight=weight)
        for b, weight in enumerate((1.0, 0.5))
    ),
    softmax_scale=1.0,
    codec="fp64",
    rope=None,
    projection=None,
    index=None,
)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_items_are_the_heads_of_each_branch() -> None:
    query = numbers(4, 3, 5)
    items = by_item(query, LAYOUT)
    assert items.shape == (8, 2, 5)
    assert torch.equal(items[0::2], query[:, 0:2])
    assert torch.equal(items[1::2], query[:, 1:3])


def test_branches_add_up_by_weight_where_their_heads_overlap() -> None:
    out, lse = numbers(4 * 2, 2, 3), numbers(4 * 2, 2)
    total = combine(LAYOUT, out, lse, None)
    assert total.shape == (4, 3, 3)
    first, second = out[0::2], out[1::2]
    assert torch.equal(total[:, 0], first[:, 0])
    assert torch.equal(total[:, 1], first[:, 1] + 0.5 * second[:, 0])
    assert torch.equal(total[:, 2], 0.5 * second[:, 1])


def test_a_sink_takes_its_share_of_each_branchs_softmax() -> None:
    out, lse, sink = numbers(4 * 2, 2, 3), numbers(4 * 2, 2), numbers(3)
    total = combine(LAYOUT, out, lse, sink)
    kept = torch.sigmoid(lse[0::2, 0] - sink[0])  # exp(lse) / (exp(lse) + exp(sink))
    assert torch.allclose(total[:, 0], kept[:, None] * out[0::2, 0], atol=1e-15)
    alone = replace(LAYOUT, branches=LAYOUT.branches[:1], heads=2)
    one = combine(alone, out[0::2], lse[0::2], torch.full((2,), -torch.inf, dtype=torch.float64))
    assert torch.equal(one, out[0::2])
