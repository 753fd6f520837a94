"""What a rank stores: entries that are missing are an error, and a full pool has the size of its blocks."""

from __future__ import annotations

import pytest
import torch
from ranks import run_loopback
from two_documents import ENTRIES, KEYS, QUERY, TOKENS, config

from qroam.partition.placement import Placement
from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import CoverageError, Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport


@pytest.mark.parametrize("of", ["document", "private"])
def test_entries_that_were_never_written_are_an_error_not_a_smaller_answer(of: str) -> None:
    with Runtime.open(config()) as runtime:
        runtime.add_document("a", tokens=TOKENS["a"])
        runtime.load_document("a", 0, ENTRIES["a"], KEYS["a"])
        request = runtime.request()
        at = runtime.append(request, 1)
        if of == "document":
            listed = torch.tensor([[0, 1]], dtype=torch.int32)
            scope = runtime.scope(documents=["a"], queries=1)
        else:
            listed, scope = at[None], runtime.scope(requests=[(request, at)])
        with pytest.raises(CoverageError, match="layer 1: query 0 at rank 0"):
            runtime.attend(1, QUERY[:1], runtime.selection(listed, scope))


@pytest.mark.parametrize("copies", [1, 2])
def test_a_full_pool_is_hardly_larger_than_its_blocks(copies: int) -> None:
    """Bytes per rank at most 1.05 x the encoded bytes of the blocks it holds, replicas included."""
    full = RuntimeConfig(
        model=uniform_model(named_layout("mla-tiny"), 2),
        max_blocks=32,
        private_blocks=0,
        placement=Placement(policy="block-cyclic", run=2, copies=copies),
        deadline_s=10.0,
    )

    def work(transport: Transport) -> float:
        with Runtime.open(full, transport) as runtime:
            runtime.add_document("a", tokens=20 * 64)
            runtime.add_document("b", tokens=12 * 64)
            stats = runtime.stats()
            return float(stats["pool_bytes"] / stats["block_bytes"])

    assert max(run_loopback(4, work)) <= 1.05
