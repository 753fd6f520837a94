"""A loopback world whose rank 1 spoils what it sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from ranks import run_loopback
from torch import Tensor

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header

Spoil = Callable[[str, str, Tensor], Tensor]  # (kind of message, column, rows) -> rows


def spoiling(spoil: Spoil) -> type[LoopbackTransport]:
    class Spoiling(LoopbackTransport):
        def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
            if self.rank == 1:
                shares = [
                    {name: spoil(header.kind, name, rows) for name, rows in share.items()}
                    for share in shares
                ]
            super().post_shares(header, shares)

    return Spoiling


def on(kind: str, column: str, change: Callable[[Tensor], Tensor]) -> Spoil:
    return lambda k, name, rows: change(rows) if (k, name) == (kind, column) else rows


def said(
    spoil: Spoil, mode: str, *, unit_tokens: int = 1, position: int | None = None
) -> list[str]:
    """What each of two ranks says when rank 1 spoils what it sends in a select and an attend."""
    config = RuntimeConfig(
        model=uniform_model(named_layout("mla-tiny"), 1),
        max_blocks=8,
        mode=mode,  # type: ignore[arg-type]
        deadline_s=10.0,
    )

    def work(end: Transport) -> str:
        generator = torch.Generator().manual_seed(1)
        with Runtime.open(config, end) as runtime:
            runtime.add_document("a", tokens=500)
            entries = torch.randn(500, 80, generator=generator)
            runtime.load_document("a", 0, entries, torch.randn(500, 32, generator=generator))
            index_query = torch.randn(3, 4, 32, generator=generator)
            query = torch.randn(3, 4, 80, generator=generator)
            attached = ["a"] if position is None else [("a", position)]
            try:
                chosen = runtime.select(
                    0, index_query, torch.ones(3, 4), documents=attached, top_k=200,
                    unit_tokens=unit_tokens,
                )  # fmt: skip
                runtime.attend(0, query, chosen)
            except PeerError as error:
                return str(error)
        return "nothing"

    kind = spoiling(spoil)
    return run_loopback(2, work, transports=kind.world(2, deadline_s=10.0))
