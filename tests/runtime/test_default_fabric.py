"""Which fabric profile a configuration has, by default and as it was given."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from costs import paper

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import RuntimeConfig
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.predicate import Demand, Mode, decide, predict_step
from qroam.runtime.cost.profile import load_profile


def text_of(name: str) -> str:
    return (files("qroam.runtime.cost") / "profiles" / f"{name}.toml").read_text()


def config(**changes: Any) -> RuntimeConfig:
    """Of V3.2's attention in bf16."""
    layout = replace(named_layout("mla-v3.2"), codec="bf16", index=None)
    sizes: dict[str, Any] = {"model": uniform_model(layout, 1), "max_blocks": 4096}
    return RuntimeConfig(**(sizes | {"private_blocks": 0, "dtype": torch.bfloat16} | changes))


def test_the_default_fabric_follows_the_device(tmp_path: Path) -> None:
    cpu = config()
    assert cpu.fabric_profile == load_profile("loopback")
    assert config(device="cuda").fabric_profile == load_profile("nvlink4")
    assert replace(cpu, device="cuda").fabric_profile == load_profile("nvlink4")
    # What was given stays.
    path = tmp_path / "mine.toml"
    path.write_text(text_of("ibgda-ndr200"))
    for spelling in ("ibgda-ndr200", str(path), paper()):
        chosen = config(fabric=spelling)
        assert chosen.fabric == chosen.fabric_profile == paper()
        assert replace(chosen, device="cuda").fabric_profile == paper()
    path.unlink()
    assert replace(chosen, seed=1).fabric_profile == paper()


def test_ranks_compare_the_profile_in_use_and_not_how_it_was_given() -> None:
    by_default, by_name = config(), config(fabric="loopback")
    assert by_default.described() == by_name.described()
    assert by_default.fingerprint(2) == by_name.fingerprint(2)
    lines = config(fabric="nvlink4").described()
    assert "fabric.name='nvlink4'" in lines
    assert "fabric.path.probe_s=5.7e-06" in lines
    assert sum(line.startswith("fabric.") for line in lines) == len(
        [line for line in by_default.described() if line.startswith("fabric.")]
    )
    assert config(device="cuda").described() == config(device="cuda", fabric="nvlink4").described()


@pytest.mark.parametrize("mode", ["auto", "always-route"])
def test_the_default_of_cuda_predicts_a_measured_step(mode: Mode) -> None:
    """143.6 us for 64 queries x 2048 entries, half of them of one other rank, plan included
    (`docs/performance.md`, step on two GPUs): 65,536 random entries of 131,072, about 51,600 different.
    """
    listed, held = 64 * 1024, 131_072
    different = round(held * (1 - (1 - 1 / held) ** listed))
    pairs = torch.full((64, 2), 1024)
    demand = Demand(
        pairs_units=pairs,
        unique_units=torch.full((2,), different),
        fair_units=pairs.double() * different / listed,
    )

    def predicted_us(device: Literal["cpu", "cuda"]) -> float:
        chosen = config(device=device)
        layout = chosen.model.layers[0]
        facts = LayerFacts.of(layout, entry_bytes=1152, element_bytes=chosen.dtype.itemsize)
        model = CostModel(facts=facts, profile=chosen.fabric_profile)
        way = decide(demand, model, rank=0, mode=mode).way
        return float(predict_step(way, demand, model, rank=0).total) * 1e6

    assert 143.6 / 3 < predicted_us("cuda") < 143.6 * 3
    assert predicted_us("cpu") > 1e6
