"""Rotary embeddings: the tables and bits of transformers, rotation by an offset, and YaRN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from at_offsets import numbers
from torch import Tensor
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as hf_v32
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as hf_glm
from transformers_indexer import hf_indexer

from qroam.partition.codec import make_codec
from qroam.partition.layout import Pairing, Rope, Yarn
from qroam.partition.presets import named_layout
from qroam.partition.rope import apply_rope, deinterleave, inverse_frequencies, rope_tables, rotate


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_tables_and_rotation_have_transformers_bits(pairing: Pairing) -> None:
    _, rotary = hf_indexer(pairing)
    positions = torch.tensor([0, 1, 77, 4095, 163839])
    cos, sin = rotary(torch.zeros(1), positions[None])
    ours = rope_tables(positions, 16, 1e4, torch.float32)
    assert torch.equal(ours[0], cos[0, :, :8])
    assert torch.equal(ours[1], sin[0, :, :8])
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))
    rotated = apply_rope(x, *ours, pairing=pairing)
    if pairing == "half":
        want, _ = hf_v32.apply_rotary_pos_emb(x, x, cos[0], sin[0])
        assert torch.equal(rotated, want)
    else:
        want, _ = hf_glm.apply_rotary_pos_emb_interleave(x, x, cos[0], sin[0])
        assert torch.equal(deinterleave(rotated), want)
    assert torch.equal(apply_rope(x[:, 0], *ours, pairing=pairing), rotated[:, 0])


def test_rope_rejects() -> None:
    cos, sin = rope_tables(torch.arange(3), 4, 1e4, torch.float32)
    with pytest.raises(ValueError, match="even"):
        rope_tables(torch.arange(3), 5, 1e4, torch.float32)
    with pytest.raises(ValueError, match="cos and sin"):
        apply_rope(torch.zeros(2, 4), cos, sin, pairing="half")
    with pytest.raises(ValueError, match="cos and sin"):
        apply_rope(torch.zeros(3, 8), cos, sin, pairing="half")
    with pytest.raises(ValueError, match="pairing"):
        apply_rope(torch.zeros(3, 4), cos, sin, pairing="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("yarn", [None, Yarn(factor=40.0, original_positions=4096)])
def test_rotating_moves_a_key_from_one_position_to_another(
    pairing: Pairing, yarn: Yarn | None
) -> None:
    rope = Rope(dim=16, pairing=pairing, yarn=yarn)
    x, by = numbers(7, 3, 16), torch.tensor([0, 1, -1, 5, -300, 2000, 7])
    at = torch.tensor([0, 3, 9, 100, 400, 17, 50])
    frequencies = inverse_frequencies(rope)

    def there(position: Tensor) -> Tensor:
        angles = position[:, None] * frequencies
        return apply_rope(x, angles.cos(), angles.sin(), pairing=pairing)

    assert float((rotate(there(at), by, rope) - there(at + by)).abs().max()) < 1e-12
    assert torch.equal(rotate(x, torch.zeros(7), rope), x)
    assert torch.equal(rotate(x[:0], by[:0], rope), x[:0])


@pytest.mark.parametrize("magnitude", [{}, {"mscale": 1.0, "mscale_all_dim": 0.8}])
def test_yarns_magnitude_is_never_applied_twice(magnitude: dict[str, float]) -> None:
    """Against the tables of transformers, whose cos and sin have YaRN's magnitude in them."""
    rope_init = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import DeepseekV3Config

    parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        **magnitude,
    }
    model = DeepseekV3Config(
        qk_rope_head_dim=64, rope_parameters=parameters, max_position_embeddings=163840
    )
    model.head_dim = 64
    theirs, factor = rope_init.ROPE_INIT_FUNCTIONS["yarn"](model, torch.device("cpu"))
    rope = Rope(dim=64, pairing="half", yarn=Yarn(factor=40.0, original_positions=4096))
    ours = inverse_frequencies(rope)
    assert factor != 1.0
    assert float(((ours - theirs) / theirs).abs().max()) < 1e-6  # theirs are fp32
    x = numbers(5, 64)

    def there(position: int) -> Tensor:
        angles = (position * ours).expand(5, -1)
        return apply_rope(x, angles.cos() * factor, angles.sin() * factor, pairing="half")

    moved = rotate(there(11), torch.full((5,), 500), rope)
    assert float((moved - there(511)).abs().max()) < 1e-12
    assert float((moved.norm(dim=-1) / x.norm(dim=-1) - factor).abs().max()) < 1e-12


def test_v32_has_the_frequencies_of_its_config() -> None:
    assert named_layout("mla-v3.2").rope == Rope(
        dim=64, pairing="interleaved", yarn=Yarn(factor=40.0, original_positions=4096)
    )


@pytest.mark.parametrize(
    "wrong", [{"factor": 0.5}, {"original_positions": 0}, {"beta_fast": 0.5}, {"beta_slow": 0.0}]
)
def test_impossible_yarns_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="YaRN needs"):
        Yarn(**{"factor": 4.0, "original_positions": 16, **wrong})


def test_v32_rows_lose_nothing_but_the_rope_columns_rounding_when_moved() -> None:
    """The latent of FlashMLA's fp8 row is decoded and encoded again without a change."""
    layout = named_layout("mla-v3.2")
    codec = make_codec(layout.codec, dim=layout.entry_dim, rope_dim=layout.rope_dim)
    rows = codec.encode(numbers(32, layout.entry_dim).float())
    numbers_kept = codec.decode(rows, torch.float32)
    again = codec.decode(codec.encode(numbers_kept), torch.float32)
    assert torch.equal(again, numbers_kept)
