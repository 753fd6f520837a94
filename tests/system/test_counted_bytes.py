"""The cost model's bytes against the bytes that the transport counted."""

from __future__ import annotations

import pytest
import torch
from ranks import run_loopback

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.cost.model import (
    COVERAGE_BYTES,
    HEADER_BYTES,
    MARK_BYTES,
    QUERY_META_BYTES,
    UNIT_ID_BYTES,
    LayerFacts,
)
from qroam.runtime.transport.base import Transport

QUERIES, UNITS = 64, 32


def counted(mode: str, unit_tokens: int) -> list[tuple[int, int]]:
    """(attend, attend-answer) bytes that each of two ranks sent; rank 0 alone asks, all remote."""

    def work(end: Transport) -> tuple[int, int]:
        config = RuntimeConfig(
            model=uniform_model(named_layout("mla-tiny"), 1),
            max_blocks=128,
            mode=mode,  # type: ignore[arg-type]
            deadline_s=20.0,
        )
        with Runtime.open(config, end) as runtime:
            document = runtime.add_document("a", tokens=128 * 64)
            runtime.load_document("a", 0, torch.randn(128 * 64, 80), torch.randn(128 * 64, 32))
            if end.rank == 0:
                per_block = 64 // unit_tokens
                blocks = torch.arange(1, document.num_blocks, 2)  # rank 1 owns the odd blocks
                remote = (blocks[:, None] * per_block + torch.arange(per_block)).flatten()
                ids = remote[: QUERIES * UNITS].view(QUERIES, UNITS).to(torch.int32)
                scope = runtime.scope(documents=["a"], queries=QUERIES)
                selection = runtime.selection(ids, scope, unit_tokens=unit_tokens)
                runtime.attend(0, torch.randn(QUERIES, 4, 80), selection)
            else:
                runtime.idle_attend(0)
            stats = runtime.stats()
            sent = stats["bytes_sent"]
            assert stats["bytes_to"] == {1 - end.rank: sum(sent.values())}
            return sent["attend"], sent["attend-answer"]

    return run_loopback(2, work)


@pytest.mark.parametrize("unit_tokens", [1, 2])
def test_routed_and_fetched_bytes_are_what_the_model_prices(unit_tokens: int) -> None:
    layout = named_layout("mla-tiny")
    facts = LayerFacts.of(layout, entry_bytes=320, element_bytes=4)
    form = facts.forms[0]
    listed = QUERIES * UNITS * UNIT_ID_BYTES
    (out, _), (_, back) = counted("always-route", unit_tokens)
    priced_out = HEADER_BYTES + QUERIES * (form.out_bytes + QUERY_META_BYTES) + listed
    priced_back = HEADER_BYTES + QUERIES * (form.back_bytes + COVERAGE_BYTES)
    assert out == pytest.approx(priced_out, rel=0.01)
    assert back == pytest.approx(priced_back, rel=0.01)

    (asked, _), (_, came) = counted("always-fetch", unit_tokens)
    entries = QUERIES * UNITS * unit_tokens
    assert asked == pytest.approx(HEADER_BYTES + listed, rel=0.02)
    assert came == pytest.approx(HEADER_BYTES + entries * (320 + MARK_BYTES), rel=0.01)
