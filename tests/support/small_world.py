"""A small world with one document of 64 tokens, in which every rank knows the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import dense
import torch
from torch import Tensor

from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.scope import Selection

TOKENS = 64


class Small(NamedTuple):
    """A runtime over one document, two queries over all of it, and their answers by layer."""

    runtime: Runtime
    query: Tensor
    selection: Selection
    expected: list[Tensor]
    entries: Tensor  # of layer 0

    @property
    def rank(self) -> int:
        return self.runtime.rank

    def check(self, layer: int = 0) -> None:
        out = self.runtime.attend(layer, self.query, self.selection)
        assert float((out - self.expected[layer]).abs().max()) <= 1e-12


def small_config(**changes: Any) -> RuntimeConfig:
    layout = replace(named_layout("mla-tiny"), codec="fp64", projection=None, index=None)
    facts: dict[str, Any] = {
        "dtype": torch.float64,
        "max_blocks": 8,
        "block_tokens": 8,
        "mode": "random",
    }
    facts |= {"deadline_s": 10.0, "layers": 1} | changes
    return RuntimeConfig(model=uniform_model(layout, facts.pop("layers")), **facts)


def small(runtime: Runtime) -> Small:
    layout = runtime.config.model.layers[0]
    g = torch.Generator().manual_seed(5)
    runtime.add_document("doc", tokens=TOKENS)
    query = torch.randn(2, layout.heads, layout.key_dim, generator=g, dtype=torch.float64)
    everything = torch.ones(2, 1, TOKENS, dtype=torch.bool)
    layers = len(runtime.config.model.layers)
    shape = (layers, TOKENS, 1, layout.entry_dim)
    entries = torch.randn(shape, generator=g, dtype=torch.float64)
    for layer in range(layers):
        runtime.load_document("doc", layer, entries[layer])
    expected = [dense.attend(layout, query, of_layer, everything) for of_layer in entries]
    ids = torch.arange(TOKENS, dtype=torch.int32).repeat(2, 1)
    scope = runtime.scope(documents=["doc"], queries=2)
    return Small(runtime, query, runtime.selection(ids, scope), expected, entries[0])


# The document lies at rank 0.
ONE_HOLDER: dict[str, Any] = {"placement": Placement(policy="document-affine"), "corpus_slots": 8}
