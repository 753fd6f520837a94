"""Who is refused when a world opens, and what is said about the difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import run_loopback
from torch import Tensor

from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Runtime, RuntimeConfig, load_profile
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.handshake import difference, introduction
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header

MODEL = uniform_model(named_layout("mla-tiny"), 3)
CONFIG = RuntimeConfig(model=MODEL, max_blocks=8, deadline_s=5.0)


def opened(configs: Sequence[RuntimeConfig], ends: Sequence[Transport] | None = None) -> list[str]:
    """What each rank says when they open with these configurations."""

    def work(end: Transport) -> str:
        try:
            Runtime.open(configs[end.rank], end).close()
        except PeerError as error:
            return str(error)
        return "opened"

    return run_loopback(len(configs), work, transports=ends)


def changed(layer: int, **changes: Any) -> RuntimeConfig:
    layers = list(MODEL.layers)
    layers[layer] = replace(layers[layer], **changes)
    return replace(CONFIG, model=replace(MODEL, layers=tuple(layers)))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (replace(CONFIG, seed=5), "seed=5 instead of seed=0"),
        (replace(CONFIG, checked=False), "checked=False instead of checked=True"),
        (
            replace(CONFIG, placement=Placement(run=3)),
            "placement.run=3 instead of placement.run=1",
        ),
        (
            changed(1, softmax_scale=0.25),
            f"model.layers[1].softmax_scale=0.25 instead of "
            f"model.layers[1].softmax_scale={48**-0.5}",
        ),
        (
            changed(2, index=None),
            "model.layers[2].index=None instead of no model.layers[2].index; "
            "no model.layers[2].index.heads instead of model.layers[2].index.heads=4; ",
        ),
        (
            replace(CONFIG, fabric=load_profile("nvlink4")),
            "fabric.name='nvlink4' instead of fabric.name='loopback'; ",
        ),
    ],
    ids=["seed", "checked", "placement", "one layer's scale", "one layer's index", "fabric"],
)
def test_a_rank_with_another_config_is_named_with_field_and_both_values(
    other: RuntimeConfig, said: str
) -> None:
    for told in opened([CONFIG, CONFIG, other]):
        assert told.startswith(f"rank 2: opened with another configuration: {said}"), told


def test_equal_choices_spelt_differently_agree() -> None:
    own = replace(CONFIG, reuse=2, deadline_s=9)
    assert opened([replace(CONFIG, reuse=2.0), own]) == ["opened", "opened"]


class Claiming(LoopbackTransport):
    """Rank 1 introduces itself as somebody else."""

    claim = b""

    def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
        if self.rank == 1:
            text = torch.frombuffer(bytearray(self.claim), dtype=torch.uint8)
            shares = [{"config": text} for _ in shares]
        super().post_shares(header, shares)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (
            introduction(7, 2, CONFIG.described()).encode(),
            "it says 'rank=7', its place in the agreed world of 2 is 1",
        ),
        (
            introduction(1, 8, CONFIG.described()).encode(),
            "opened with another configuration: world_size=8 instead of world_size=2",
        ),
        (b"\xff\xfe", "'utf-8' codec can't decode"),
        (b"x" * (2 << 20), "not a text of at most 1048576 bytes"),
    ],
    ids=["rank outside the world", "another world", "not text", "too long"],
)
def test_a_rank_outside_the_agreed_world_is_refused(
    claim: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = Claiming.world(2, deadline_s=5.0)
    monkeypatch.setattr(Claiming, "claim", claim)
    told = opened([CONFIG, CONFIG], ends)[0]
    assert told.startswith("rank 1: "), told
    assert said in told


def test_a_long_value_is_shown_where_it_differs() -> None:
    usual = "a=" + "x" * 200 + "0" + "y" * 200
    said = difference(usual.replace("0", "1"), usual)
    assert "x1y" in said
    assert "x0y" in said
    assert len(said) < 200


def test_many_differences_are_cut_short() -> None:
    theirs, usual = ("\n".join(f"f{n}={side}" for n in range(50)) for side in "ab")
    assert difference(theirs, usual).count("instead of") == 8
    assert difference(theirs, usual).endswith("; and more")
