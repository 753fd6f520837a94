"""Queries of both payload forms attended where the entries are, and what a step refuses, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_world import HEADS, LAYOUT, B, config, pool_of
from torch import Tensor
from wires import connected

from qroam.kernels import reference
from qroam.kernels.decide import PriceTable
from qroam.kernels.exchange.layout import Wire
from qroam.partition.layout import Form
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.prices import prices_of
from qroam.runtime.cost.profile import load_profile
from qroam.runtime.gpu.payload import Unabsorbed, absorb, project
from qroam.runtime.gpu.step import GpuStep

CPU, F32 = torch.device("cpu"), torch.float32
NOPE, ROPE, LATENT, VALUE = 32, 64, 128, 32
ROWS, LISTED, SLOTS = 6, 80, 20


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights(seed: int = 1) -> tuple[Tensor, Tensor]:
    w_uk = numbers(HEADS, NOPE, LATENT, seed=seed) / 8
    return w_uk, numbers(HEADS, LATENT, VALUE, seed=seed + 50) / 8


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_projections_are_the_references_row_by_row(count: int, dtype: torch.dtype) -> None:
    w_uk, w_uv = (w.to(dtype) for w in weights())
    query = numbers(count, HEADS, NOPE + ROPE, seed=3).to(dtype)
    latent = numbers(count, HEADS, LATENT, seed=4).to(dtype)
    query[-1, 1], latent[-1, 1] = torch.nan, torch.nan  # unused rows hold anything
    absorbed = torch.full((count, HEADS, LATENT + ROPE), torch.nan, dtype=dtype)
    projected = torch.full((count, HEADS, VALUE), torch.nan, dtype=dtype)
    absorb(query, w_uk, out=absorbed)
    project(latent, w_uv, out=projected)
    tolerance = 1e-5 if dtype == F32 else 2e-2
    for found, exact in (
        (absorbed, reference.absorb(query[:, None].double(), w_uk[None].double())[:, 0]),
        (projected, reference.project(latent[:, None].double(), w_uv[None].double())[:, 0]),
    ):
        torch.testing.assert_close(
            found.double(), exact, rtol=tolerance, atol=tolerance, equal_nan=True
        )
    assert torch.equal(absorbed[:-1, :, LATENT:], query[:-1, :, NOPE:])


@pytest.mark.parametrize("arrived", [False, True], ids=["own rows", "rows that arrived"])
@pytest.mark.parametrize("layer", [0, 1])
def test_unabsorbed_rows_are_attended_between_the_projections(arrived: bool, layer: int) -> None:
    """Against the definition; whatever is beyond the counts is poisoned."""
    generator = torch.Generator().manual_seed(layer)
    used = 4 if arrived else ROWS
    entries = numbers(SLOTS * B, LATENT + ROPE, seed=7)
    units = torch.stack(
        [torch.randperm(SLOTS * B, generator=generator)[:LISTED] for _ in range(ROWS)]
    ).int()
    lengths = torch.tensor([80, 0, 33, 64, 70, 9], dtype=torch.int32)
    units[0, ::3] = -1
    lists: dict[str, Any] = {"lengths": lengths}
    inbox = numbers(ROWS, HEADS, NOPE + ROPE, seed=8 + layer)
    query = inbox
    if arrived:  # out of order, among rows that nobody sent
        inbox = torch.full((16, HEADS, NOPE + ROPE), torch.nan)
        seats = torch.tensor([11, 2, 7, 5, 2**31 - 1, 2**31 - 1], dtype=torch.int32)
        inbox[seats[:used].long()] = query[:used]
        lengths[used:] = 2**31 - 1
        lists |= {"num_rows": torch.tensor([used], dtype=torch.int32), "query_of": seats}
    layers = [weights(1), weights(2)]
    options: dict[str, Any] = {"parts": 3, "dtype": F32, "device": CPU}
    rows = Unabsorbed([LAYOUT] * 2, ROWS, weights=layers, **options)
    for _ in range(2):  # the second finds what the first left
        rows.attend(layer, inbox, entries, units, **lists)

    w_uk, w_uv = (w[None].double() for w in layers[layer])
    absorbed = reference.absorb(query[:used, None].double(), w_uk)[:, 0]
    valid = (units >= 0) & (torch.arange(LISTED) < lengths[:, None])
    exact, exact_lse = reference.attend(
        absorbed,
        entries.double()[units[:used].long()],
        valid[:used],
        value_dim=LATENT,
        scale=LAYOUT.softmax_scale,
    )
    exact = reference.project(exact[:, None], w_uv)[:, 0]
    out, lse, covered, parts = rows.partials
    torch.testing.assert_close(out[:used].double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[:used].double(), exact_lse, rtol=1e-5, atol=1e-5)
    assert torch.equal(covered[:used, 0].long(), valid[:used].sum(1))
    assert parts is None


def prices(*forms: Form) -> PriceTable:
    facts = LayerFacts.of(LAYOUT, entry_bytes=4 * (LATENT + ROPE), element_bytes=4)
    model = CostModel(facts=facts, profile=load_profile("nvlink4"))
    return prices_of(model, world=2, forms=forms, device="cpu")


def wire(query: int, answer: int) -> Wire:
    return Wire(
        world_size=2, rows=ROWS, heads=HEADS, query_words=HEADS * query,
        answer_words=HEADS * answer, units=LISTED,
    )  # fmt: skip


FORM_A, FORM_B = wire(LATENT + ROPE, LATENT), wire(NOPE + ROPE, VALUE)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"prices": prices("A")}, r"prices must be of form B alone, way 3; got 1 forms from way 2"),
        ({"prices": prices("A", "B")}, r"form B alone, way 3; got 2 forms"),
        ({"weights": None}, r"prices must be of form A alone, way 2; got 1 forms from way 3"),
        ({"wire": FORM_A}, r"of form B have 384 and 128 words, the wire's have 768 and 512"),
        ({"weights": None, "prices": prices("A")}, r"of form A have 768 and 512 words"),
        ({"weights": [weights()] * 2}, r"weights must be of 1 layers, as layouts, got 2"),
        ({"weights": [weights()[::-1]]}, r"w_uk of layer 0 must be \(4, 32, 128\) .* got \(4, 128"),
        (
            {"dtype": torch.bfloat16},
            r"of form B have 192 and 64 words, the wire's have 384 and 128",
        ),
    ],
)
def test_a_step_refuses_what_is_of_another_form(changes: dict[str, Any], refused: str) -> None:
    given: dict[str, Any] = {"wire": FORM_B, "prices": prices("B"), "weights": [weights()]}
    given |= {"dtype": F32} | changes
    ends = connected(given.pop("wire"))[0]
    with pytest.raises(ValueError, match=refused):
        GpuStep(
            pool_of(config(), 0, 2), [LAYOUT], ends=ends, rank=0, world_size=2, rows=ROWS,
            listed=LISTED, **given,
        )  # fmt: skip


def test_a_layout_without_projections_has_no_form_b() -> None:
    with pytest.raises(ValueError, match="no projection, so no payload form B"):
        GpuStep(
            pool_of(config(), 0, 2), [replace(LAYOUT, projection=None)], prices=prices("B"),
            ends=connected(FORM_B)[0], rank=0, world_size=2, rows=ROWS, listed=LISTED, dtype=F32,
            weights=[weights()],
        )  # fmt: skip
