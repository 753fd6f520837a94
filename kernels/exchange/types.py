"""What an exchange reads and writes: this rank's end of a channel, and the tensors of each role.

Letters: W ranks, N items of this rank, M rows that arrived, H heads, C value columns, E units of a
list, E' of a plan's, P partials of this rank's own. No Triton is needed to import this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .layout import Wire

if TYPE_CHECKING:
    from ..attend import AttendWorkspace


class Ends(NamedTuple):
    """This rank's end of a channel. Made once by the transport; the kernels alone change it.

    channel_tag: 16 bits that tell this channel, in this incarnation, from all others; signals carry it.
    arena: (words,) int32, of `wire`'s layout, zero before the first exchange. peers: (W,) int64,
    where each rank's arena is mapped here; with `put` 0 but for this rank's own. epoch: (1,) int64.
    counters: (2 * W * chunks + 1,) int32, zero. tables: (1,) int32, version of the directory.
    status: (1,) int64 that the host can read at any time, an abort code or 0. ring: (R, stamps)
    int64, nanoseconds of `STAMPS` by epoch % R, or None.
    """

    wire: Wire
    rank: int
    channel_tag: int
    arena: Tensor
    peers: Tensor
    epoch: Tensor
    counters: Tensor
    tables: Tensor
    status: Tensor
    ring: Tensor | None
    budget_ns: int
    put: str | None  # path of NVSHMEM's device library where peers cannot be stored to

    @property
    def inbox(self) -> Tensor:
        """(rows, query words) int32, a view of the arena: what `Accepted.query_of` points into."""
        rows, words = self.wire.query_rows, self.wire.query_words
        return self.arena[: rows * words].view(rows, words)


class Routes(NamedTuple):
    """Of a plan, one form: who is asked for what; see `kernels.plan.Plan`.

    items, units_of: (W * N,) int32. route_units: (N * E',) int32. pairs: (W,) int32. expected:
    (N, W, 2) int32.
    """

    items: Tensor
    units_of: Tensor
    route_units: Tensor
    pairs: Tensor
    expected: Tensor


class Accepted(NamedTuple):
    """What others ask, for `attend`: rows by source, then as each source listed them.

    units: (M, E) int32. lengths, query_of: (M,) int32, the latter rows of the inbox. num_rows: (1,).
    """

    units: Tensor
    lengths: Tensor
    query_of: Tensor
    num_rows: Tensor

    @staticmethod
    def make(wire: Wire, device: torch.device | str) -> Accepted:
        """With room for all that can arrive."""
        rows = (wire.world_size - 1) * wire.rows

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.int32, device=device)

        return Accepted(empty(rows, wire.units), empty(rows), empty(rows), empty(1))


class Partials(NamedTuple):
    """Of the accepted rows: out (M, H, C), lse (M, H) fp32, covered (M, 2) int32.

    parts: where `attend` left the rows that it cut; they are merged as they leave.
    """

    out: Tensor
    lse: Tensor
    covered: Tensor
    parts: AttendWorkspace | None = None


class Merge(NamedTuple):
    """Own partials, outs (P, N, H, C) and lses (P, N, H) fp32, and where the result goes.

    out: (N, H, C), lse: (N, H) fp32; NaN where something was missing. fault: (N,) int32, 0, or 1 +
    the last holder whose answer covers something else than was asked. lacking: (N,) int32, faults
    that the own partials have already.

    parts: where `attend` left the own rows that it cut; P is 1 then.
    """

    outs: Tensor
    lses: Tensor
    out: Tensor
    lse: Tensor
    fault: Tensor
    lacking: Tensor | None = None
    parts: AttendWorkspace | None = None
