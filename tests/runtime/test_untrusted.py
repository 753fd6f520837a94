"""A peer whose messages are wrong is named, whatever it sent; nothing of it reaches an output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ranks import run_loopback
from spoiling import Spoil, on, said, spoiling
from torch import Tensor

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport


@pytest.mark.parametrize(
    ("spoil", "mode"),
    [
        (on("select-answer", "id", lambda ids: ids + 4096), "auto"),
        (on("select-answer", "id", torch.zeros_like), "auto"),
        (on("select-answer", "score", lambda rows: rows * torch.nan), "auto"),
        (on("select", "index.query", lambda rows: rows * torch.nan), "auto"),
        (on("select", "index.runs", lambda rows: -rows), "auto"),
        (on("attend", "A.count", lambda rows: rows * 2**24), "always-route"),
        (on("attend", "A.count", torch.zeros_like), "always-route"),
        (on("attend", "A.query", lambda rows: rows[:, :2]), "always-route"),
        (on("attend", "A.query", lambda rows: rows.double()), "always-route"),
        (on("attend-answer", "A.out", lambda rows: rows * torch.inf), "always-route"),
        (on("attend-answer", "A.out", lambda rows: rows[1:]), "always-route"),
        (on("attend-answer", "fetch.rows", lambda rows: rows[:, 1:]), "always-fetch"),
        (on("attend", "fetch", torch.zeros_like), "always-fetch"),
        (on("attend-answer", "fetch.rows", lambda rows: rows * 0 + 255), "always-fetch"),
        (on("attend", "A.query", lambda rows: rows * torch.nan), "always-route"),
        (on("attend", "A.units", lambda rows: rows + 2**20), "always-route"),
        (on("attend", "A.item", lambda rows: -rows - 1), "always-route"),
        (on("attend", "fetch", lambda rows: -rows - 1), "always-fetch"),
        (on("select-answer", "id", lambda ids: (ids + 64).clamp(max=499)), "auto"),
    ],
    ids=[
        "foreign candidates", "repeated candidates", "NaN scores", "NaN index queries",
        "negative runs", "absurd counts", "zero counts", "too few heads", "another dtype",
        "infinite output", "a row short", "short rows", "units fetched twice",
        "fetched NaN", "NaN queries", "units beyond the corpus", "negative items",
        "negative units to fetch", "another rank's candidates",
    ],
)  # fmt: skip
def test_a_wrong_message_names_its_sender(spoil: Spoil, mode: str) -> None:
    told, by_itself = said(spoil, mode)
    assert told.startswith("rank 1: "), told
    assert by_itself.startswith("rank 1: ") or by_itself == "nothing"  # its own step had ended


def test_an_honest_peer_is_not_accused() -> None:
    for mode in ("always-route", "always-fetch"):
        for position in (None, 7):
            assert said(lambda _kind, _name, rows: rows, mode, position=position) == [
                "nothing",
                "nothing",
            ]


SPOILED_LIFE: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "publish": ("publish", lambda rows: rows * 0 - 1),
    "publish-hashes": ("hashes", lambda rows: rows[1:]),
    "evict-heat": ("heat", lambda rows: rows * torch.nan),
    "evict-last": ("last", lambda rows: rows[1:]),
    "copy": ("copy", lambda rows: rows + 4096),
    "copy-twice": ("copy", torch.zeros_like),
    "copy-answer": ("copy.rows", lambda rows: rows[:, 1:]),
    "copy-marks": ("copy.marks", lambda rows: rows.long()),
    "copy-NaN": ("copy.rows", lambda rows: rows * 0 + 255),
    "copy-index-NaN": ("copy_index.rows", lambda rows: rows * 0 + 255),
}


@pytest.mark.parametrize("case", SPOILED_LIFE)
def test_whoever_spoils_the_life_of_documents_is_named(case: str) -> None:
    column, change = SPOILED_LIFE[case]

    def spoil(kind: str, name: str, rows: Tensor) -> Tensor:
        return change(rows) if name == column else rows

    def work(end: Transport) -> str:
        config = RuntimeConfig(
            model=uniform_model(named_layout("mla-tiny"), 1),
            max_blocks=8,
            block_tokens=16,
            deadline_s=10.0,
        )
        with Runtime.open(config, end) as runtime:
            runtime.add_document("a", tokens=64)
            runtime.load_document("a", 0, torch.ones(64, 80), torch.ones(64, 32))
            request = runtime.request()
            runtime.write(0, runtime.append(request, 16), torch.ones(16, 80), torch.ones(16, 32))
            try:
                mine = request if runtime.rank == 1 else None
                runtime.publish("b", mine, token_ids=range(16) if mine else None)
                runtime.make_room("c", tokens=16)
                runtime.copy_document(request, "a")
            except PeerError as error:
                return str(error)
        return "nothing"

    told, by_itself = run_loopback(2, work, transports=spoiling(spoil).world(2, deadline_s=10.0))
    assert told.startswith("rank 1: "), told
    assert by_itself.startswith("rank 1: ") or by_itself == "nothing"
