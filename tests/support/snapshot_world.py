"""Small worlds of one plain layer kind, whose documents have contents that follow from their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from ranks import run_loopback

from qroam.partition.presets import mla, uniform_model
from qroam.partition.snapshot.record import take_records
from qroam.runtime import Runtime, RuntimeConfig, SnapshotError
from qroam.runtime.corpus import snapshot as step
from qroam.runtime.transport.base import Transport

T = Any


B = 4


def config(**changes: Any) -> RuntimeConfig:
    layout = mla(
        name="small", heads=2, latent=6, rope=2, nope=3, value=4, softmax_scale=0.5,
        codec="fp64", index=None, index_codec="fp32",
    )  # fmt: skip
    facts: dict[str, Any] = {
        "model": uniform_model(replace(layout, projection=None), 2),
        "max_blocks": 32,
        "block_tokens": B,
        "dtype": torch.float64,
        "deadline_s": 10.0,
    }
    return RuntimeConfig(**(facts | changes))


def contents(name: str, tokens: int, layer: int) -> torch.Tensor:
    seed = ord(name[0]) * 10 + layer
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(seed)).double()[:tokens]


def add(runtime: Runtime, name: str, tokens: int) -> None:
    runtime.add_document(name, tokens=tokens)
    for layer in range(2):
        runtime.load_document(name, layer, contents(name, tokens, layer))


def attended(runtime: Runtime, name: str, tokens: int, *, seed: str = "") -> None:
    """One query over all of a document, of the contents of `seed`, equals dense attention."""
    document = runtime._world.directory.document(name)
    ids = document.ids(0, tokens)[None]
    query = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(3)).double()
    for layer in range(2):
        scope = runtime.scope(documents=[name], queries=1)
        out = runtime.attend(layer, query, runtime.selection(ids, scope))
        entries = contents(seed or name, tokens, layer)
        expected = torch.softmax(query @ entries.T * 0.5, dim=-1) @ entries[:, :6]
        assert float((out - expected).abs().max()) <= 1e-12


def world(size: int, work: Callable[[Runtime], T], **changes: Any) -> list[T]:
    def opened(end: Transport) -> T:
        with Runtime.open(config(**changes), end) as runtime:
            return work(runtime)

    return run_loopback(size, opened, deadline_s=changes.get("deadline_s", 10.0))


def late_writer(monkeypatch: pytest.MonkeyPatch) -> Event:
    """Snapshots are written once the event is set."""
    let_go = Event()
    take = take_records

    def late(*arguments: Any, **named: Any) -> torch.Tensor:
        assert let_go.wait(10)
        return take(*arguments, **named)

    monkeypatch.setattr(step, "take_records", late)
    return let_go


def refused(work: Callable[[], object]) -> str:
    with pytest.raises(SnapshotError) as caught:
        work()
    return str(caught.value)
