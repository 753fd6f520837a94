"""The explanation of a hypothetical step: its numbers are the model's, its flips are real."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from qroam.partition.presets import named_layout
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.predicate import Demand, Way, decide
from qroam.runtime.cost.profile import load_profile
from qroam.runtime.tools.explain import MAX_QUERIES, Candidate, Record, explain_step
from qroam.runtime.tools.explain_text import render, render_lines

WAYS = {Way.ROUTE_A: "route A", Way.ROUTE_B: "route B", Way.FETCH: "fetch"}


def explain(**changes: Any) -> list[Record]:
    options: dict[str, Any] = {
        "layout": named_layout("mla-v3.2"),
        "queries": 8,
        "units": 2048,
        "holders": 4,
        "profile": load_profile("ibgda-ndr200"),
        "reuse": 1.0,
        "entry_bytes": 656,
    }
    return explain_step(**{**options, **changes})


def candidate(record: Record, way: str) -> Candidate:
    assert record["kind"] == "decision"
    (found,) = (c for c in record["candidates"] if c["way"] == way)
    return found


def decided_way(queries: int, units: int, holders: int, **options: Any) -> str:
    """The predicate's own answer for disjoint selections."""
    facts = LayerFacts.of(named_layout("mla-v3.2"), entry_bytes=656, element_bytes=2)
    pairs = torch.tensor([0, *[units] * holders]).repeat(queries, 1)
    demand = Demand(pairs, pairs.sum(0), pairs.double())
    reuse = options.pop("reuse", 1.0)
    model = CostModel(facts=facts, profile=load_profile("ibgda-ndr200"), reuse=reuse)
    decision = decide(demand, model, rank=0, **options)
    (way,) = set(decision.way[:, 1:].flatten().tolist())
    return WAYS[Way(way)]


def test_a_step_is_explained() -> None:
    decision, step = explain()
    assert decision["kind"] == "decision"
    assert decision["queries"] == [0, 7]
    assert decision["holders"] == [1, 4]
    assert (decision["units_per_query"], decision["unique_units"]) == (512, 8 * 512)
    assert decision["way"] == decided_way(8, 512, 4)
    for found in decision["candidates"]:
        if found["parts_us"] is not None:
            assert found["total_us"] == pytest.approx(sum(found["parts_us"].values()))
    chosen, other = candidate(decision, "route A"), candidate(decision, "fetch")
    assert chosen["total_us"] is not None
    assert other["total_us"] is not None
    assert decision["margin"] == pytest.approx(other["total_us"] / chosen["total_us"] - 1)
    assert step["kind"] == "step"
    assert step["total_us"]["auto"] <= min(step["total_us"].values())
    assert step["parts_us"]["exchange"] == pytest.approx(chosen["total_us"])


def test_documents_at_other_positions_are_priced_by_rotation_and_by_lease() -> None:
    """V3.2: 128 x 64 bf16 of a query, read and written; an offset of 4 bytes with each listed unit."""
    plain, moved = explain(forms=("A", "B"))[0], explain(forms=("A", "B"), shifted=True)[0]
    device = load_profile("ibgda-ndr200").device
    rotate_us = 8 * 2 * 128 * 64 * 2 / device.splice_bytes_per_s * 1e6
    for way in ("route A", "route B", "fetch"):
        before, after = candidate(plain, way)["parts_us"], candidate(moved, way)["parts_us"]
        assert before is not None
        assert after is not None
        assert before["rotate"] == 0
        assert after["rotate"] == pytest.approx(rotate_us)
        longer = {name for name in after if after[name] > before[name]}
        assert longer == ({"rotate"} if way == "fetch" else {"rotate", "send"})
    lease = candidate(moved, "lease")
    assert lease["parts_us"] is not None
    assert lease["parts_us"]["splice"] > 0
    assert lease["parts_us"]["rotate"] == 0
    assert "Runtime.copy_document" in render([moved])
    assert "lease" not in render([plain])


def test_a_way_that_cannot_be_executed_has_its_reason() -> None:
    decision = explain()[0]
    form_b, recompute = candidate(decision, "route B"), candidate(decision, "recompute")
    assert form_b["total_us"] is not None
    assert form_b["blocked"] == "the holders have no W_UK and W_UV"
    assert recompute["total_us"] is None
    assert recompute["blocked"] is not None
    assert decision["kind"] == "decision"
    assert decision["way"] != "route B"
    opened = explain(forms=("A", "B"))[0]
    assert candidate(opened, "route B")["blocked"] is None
    plain = replace(named_layout("mla-v3.2"), projection=None)
    assert candidate(explain(layout=plain)[0], "route B")["total_us"] is None


@pytest.mark.parametrize("forms", [("A",), ("A", "B")])
@pytest.mark.parametrize("reuse", [1.0, 4.0])
@pytest.mark.parametrize("queries", [1, 3, 8])
def test_flips_are_where_the_predicate_flips(
    forms: tuple[Any, ...], reuse: float, queries: int
) -> None:
    (decision, _) = explain(queries=queries, forms=forms, reuse=reuse)
    assert decision["kind"] == "decision"
    by_queries, by_units = decision["flips"]
    options: dict[str, Any] = {"forms": forms, "reuse": reuse}
    assert decision["way"] == decided_way(queries, 512, 4, **options)
    for flip in (by_queries, by_units):
        for edge, way, back in (
            (flip["down_to"], flip["down_way"], 1),
            (flip["up_to"], flip["up_way"], -1),
        ):
            if edge is None:
                continue

            def at(value: int, is_queries: bool = flip is by_queries) -> str:
                both = (value, 512) if is_queries else (queries, value)
                return decided_way(both[0], both[1], 4, **options)

            assert at(edge) == way != decision["way"]
            assert at(edge + back) == decision["way"]
    assert by_queries["scanned"] == [1, MAX_QUERIES]
    if by_queries["down_to"] is None:
        assert decided_way(1, 512, 4, **options) == decision["way"]


def test_some_flip_is_found() -> None:
    decision = explain()[0]
    assert decision["kind"] == "decision"
    assert decision["flips"][0]["down_way"] == "fetch"
    assert decision["flips"][0]["up_to"] is None


def test_shared_units_are_fetched_once() -> None:
    disjoint, shared = explain()[0], explain(overlap=1.0)[0]
    assert shared["kind"] == disjoint["kind"] == "decision"
    assert (disjoint["way"], shared["way"]) == ("route A", "fetch")
    assert shared["unique_units"] == 512
    half = explain(overlap=0.5)[0]
    assert half["kind"] == "decision"
    assert half["unique_units"] == 256 + 8 * 256


def test_a_remainder_makes_two_groups() -> None:
    records = explain(units=2050)
    groups = [(r["holders"], r["units_per_query"]) for r in records if r["kind"] == "decision"]
    assert groups == [([1, 2], 513), ([3, 4], 512)]


def test_branches_are_items() -> None:
    decision = explain(layout=named_layout("mlra-4"), entry_bytes=384, queries=2)[0]
    assert decision["kind"] == "decision"
    assert decision["unique_units"] == 2 * 512


def test_text_and_json() -> None:
    records = explain(units=2050, reuse=2.0)
    assert json.loads(json.dumps(records)) == records
    text = render(records)
    assert text.isascii()
    lines = text.splitlines()
    assert lines[0].startswith("queries 0-7, holders 1-2 (each the same): FETCH, margin ")
    assert all(len(line) <= 130 for line in lines)
    assert text.count("route B") == text.count("not available: the holders have no W_UK") == 2
    assert text.count("never up to") >= 1
    head = "step of mla-v3.2 on ibgda-ndr200 (5 of 15 constants assumed), reuse 2, overlap 0:"
    assert lines[-3] == head
    assert lines[-2].startswith("    auto ")
    one = render(explain(queries=1, holders=1, units=1))
    assert one.startswith("query 0, holder 1: ")


def test_a_line_has_all_of_its_decision() -> None:
    records = explain(units=2050, queries=2)
    printed = list(render_lines(records))
    heads = [line.split(": ")[0] for line in printed]
    holders = [(1, 2), (3, 4)]  # the first two hold one unit more
    assert heads == [f"query {q}, holder {h}" for group in holders for q in range(2) for h in group]
    for i, line in enumerate(printed):
        record = records[i // 4]
        assert record["kind"] == "decision"
        assert line.isascii()
        assert f": {record['way'].upper()}, margin {record['margin']:.1%}: " in line
        assert record["reason"] in line
        for found in record["candidates"]:
            for name, part in (found["parts_us"] or {}).items():
                assert f"{name} {part:.1f}" in line
            if found["total_us"] is not None:
                assert f"{found['way']} {found['total_us']:.1f} = " in line
            assert found["blocked"] is None or f"({found['blocked']})" in line
        for flip in record["flips"]:
            assert f"{flip['quantity']} (now {flip['now']}): " in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": 0}, r"queries must be in \[1, 4096\], got 0"),
        ({"queries": 4097}, "queries must be in"),
        ({"holders": 0}, "holders must be in"),
        ({"holders": 257}, "holders must be in"),
        ({"units": 3}, r"units must be at least holders \(4\), got 3"),
        ({"units": 1 << 25}, "units must be in"),
        ({"overlap": 1.5}, r"overlap must be in \[0, 1\], got 1.5"),
        ({"reuse": 0.0}, "reuse must be finite and at least 1"),
        ({"entry_bytes": -1}, "entry_bytes and element_bytes must be positive"),
        ({"unit_tokens": 0}, "unit_tokens must be at least 1"),
        ({"forms": ("C",)}, "forms must be some of A, B"),
    ],
)
def test_invalid_arguments(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(**changes)
