"""A transport that corrupts its answers, to show that the demo's checks notice it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...transport.gloo import TorchTransport
from ...transport.messages import Header

Sabotage = Literal["drop-holder", "wrong-row", "double-answer"]


class SabotagedTransport(TorchTransport):
    """Once armed, rank 1 corrupts the attention that it computes for others.

    drop-holder:    its partials are empty, with the coverage of whole ones: only the comparison of
                    tokens and logits notices;
    wrong-row:      head h gets head h-1's row, coverage intact; likewise only the comparison notices;
    double-answer:  its partials count twice, coverage included; the coverage check notices.
    """

    def __init__(self, *, sabotage: Sabotage | None, **transport: Any) -> None:
        super().__init__(**transport)
        self._sabotage = sabotage if self.rank == 1 else None
        self.armed = False

    def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
        if self.armed and header.kind == "attend-answer":
            shares = [
                {name: self._corrupted(name.split(".")[-1], rows) for name, rows in share.items()}
                for share in shares
            ]
        super().post_shares(header, shares)

    def _corrupted(self, part: str, rows: Tensor) -> Tensor:
        match self._sabotage, part:
            case "drop-holder", "lse":
                return torch.full_like(rows, -torch.inf)
            case "drop-holder", "out" | "rows":
                return torch.zeros_like(rows)
            case "wrong-row", "out":
                return rows.roll(1, dims=1)
            case "wrong-row", "rows":
                return rows.roll(1, dims=0)
            case "double-answer", "lse":
                return rows + math.log(2)
            case "double-answer", "covered":
                return rows * 2
            case "double-answer", "mark":
                return rows * 2
        return rows
