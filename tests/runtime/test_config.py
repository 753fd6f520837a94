"""Configurations that are refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from two_documents import LAYOUT, config

from qroam.partition.presets import uniform_model
from qroam.runtime import Runtime

BAD_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "no-blocks": ("max_blocks must be at least 1", {"max_blocks": 0}),
    "no-block-tokens": ("block_tokens", {"block_tokens": 0}),
    "no-slots": ("corpus_slots must be at least 1", {"corpus_slots": 0}),
    "negative-private": ("private_blocks must not be negative", {"private_blocks": -1}),
    "no-request-blocks": ("request_blocks", {"request_blocks": 0}),
    "negative-leases": ("lease_entries must not be negative", {"lease_entries": -1}),
    "unknown-mode": ("unknown mode 'fast'; known: auto", {"mode": "fast"}),
    "unknown-index-placement": ("unknown index placement", {"index_placement": "nowhere"}),
    "reuse-below-one": ("reuse must be", {"reuse": 0.5}),
    "reuse-nan": ("reuse must be", {"reuse": math.nan}),
    "reuse-inf": ("reuse must be", {"reuse": math.inf}),
    "deadline-zero": ("deadline_s must be", {"deadline_s": 0.0}),
    "deadline-nan": ("deadline_s must be", {"deadline_s": math.nan}),
    "deadline-inf": ("deadline_s must be", {"deadline_s": math.inf}),
    "workspace": ("workspace_bytes must be at least 32", {"workspace_bytes": 8}),
    "dtype": ("dtype must be one of", {"dtype": torch.float16}),
    "fabric-number": ("fabric must be a FabricProfile, .* or None, got 4", {"fabric": 4}),
    "fabric-unknown": ("unknown fabric profile 'nvlink9'; known: ", {"fabric": "nvlink9"}),
    "fabric-no-file": ("absent.toml: cannot be read", {"fabric": "absent.toml"}),
    "ids-beyond-int32": ("do not fit int32", {"max_blocks": 2**28}),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_absurd_configs_are_refused(case: str) -> None:
    message, changes = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        config(**changes)


BAD_OPENINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown-codec": ("unknown codec", {"model": uniform_model(replace(LAYOUT, codec="int4"), 1)}),
    "codec-does-not-fit": (
        "multiple of 128",
        {"model": uniform_model(replace(LAYOUT, codec="fp8_v32"), 1)},
    ),
    "index-codec-does-not-fit": (
        "unknown codec",
        {"model": uniform_model(replace(LAYOUT, index_codec="none"), 1)},
    ),
}


@pytest.mark.parametrize("case", BAD_OPENINGS)
def test_a_model_that_cannot_be_stored_is_refused_at_open(case: str) -> None:
    message, changes = BAD_OPENINGS[case]
    with pytest.raises(ValueError, match=message):
        Runtime.open(config(**changes))
