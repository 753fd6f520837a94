"""A loopback world whose rank 1 spoils what it sends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

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
