"""Attention over listed entries on a GPU, of queries as each payload form sends them.

Letters: M queries, H heads, D key columns, C value columns, V output columns. A row of form A has D
columns and its partial C. A row of form B has nope and rope columns: W_UK turns the former into the
first D - rope, W_UV turns the C columns of a partial into V, and it does not matter whether
partials are merged before or after. Queries of both sorts are attended by whoever has the entries,
those of this rank over its own, those of others as they arrived; both classes do it alike:

    partials    what is left of the queries, as `exchange` answers and merges it
    attend      launch it; what lies beyond `num_rows` may hold anything, and does not get further
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attend import AttendWorkspace, Tables, attend
from ...kernels.checks import check_tensor
from ...kernels.exchange.types import Partials
from ...kernels.gather import gather
from ...partition.layout import Layout

Weights = Sequence[
    tuple[Tensor, Tensor]
]  # of each layer W_UK (H, nope, D - rope) and W_UV (H, C, V)


class Absorbed:
    """Form A: queries (M, H, D), partials of C columns.

    Rows that `attend` cuts stay in parts, to be merged as they leave, unless they are `combined`.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        count: int,
        *,
        parts: int,
        combined: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate for M = `count`; `parts` of the device's SMs attend, see `parts_of`."""
        heads, self._value_dim = layouts[0].branch_heads, layouts[0].value_dim
        self._scales = [layout.softmax_scale for layout in layouts]
        self._combined = combined
        self._space = AttendWorkspace.make(
            rows=count, heads=heads, value_dim=self._value_dim, parts=parts, device=device,
            dtype=dtype,
        )  # fmt: skip
        self.partials = Partials(
            torch.empty(count, heads, self._value_dim, dtype=dtype, device=device),
            torch.empty(count, heads, dtype=torch.float32, device=device),
            torch.empty(count, 2, dtype=torch.int32, device=device),
            None if combined else self._space,
        )

    def attend(
        self,
        layer: int,
        query: Tensor,
        entries: Tensor,
        units: Tensor,
        *,
        lengths: Tensor,
        num_rows: Tensor | None = None,
        query_of: Tensor | None = None,
        tables: Tables | None = None,
    ) -> None:
        """As `kernels.attend.attend`, to `partials`."""
        own = self.partials
        attend(
            query, entries, units, value_dim=self._value_dim, scale=self._scales[layer],
            workspace=self._space, lengths=lengths, num_rows=num_rows, query_of=query_of,
            tables=tables, out=own.out, lse=own.lse, covered=own.covered, combined=self._combined,
        )  # fmt: skip


class Unabsorbed:
    """Form B: queries (M, H, nope + rope), partials of V columns, by the weights of each layer."""

    def __init__(
        self,
        layouts: Sequence[Layout],
        count: int,
        *,
        weights: Weights,
        parts: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        layout = layouts[0]
        self._weights = weights
        self._inside = Absorbed(
            layouts, count, parts=parts, combined=True, dtype=dtype, device=device
        )

        def rows(columns: int) -> Tensor:
            return torch.empty(count, layout.branch_heads, columns, dtype=dtype, device=device)

        self._dense, self._query = rows(layout.query_dim), rows(layout.key_dim)
        self.partials = self._inside.partials._replace(out=rows(layout.out_dim))

    def attend(
        self,
        layer: int,
        query: Tensor,
        entries: Tensor,
        units: Tensor,
        *,
        lengths: Tensor,
        num_rows: Tensor | None = None,
        query_of: Tensor | None = None,
        tables: Tables | None = None,
    ) -> None:
        """As `kernels.attend.attend` between W_UK and W_UV, to `partials`."""
        w_uk, w_uv = self._weights[layer]
        if query_of is not None:  # where they arrived they do not lie one after another
            query = gather(query, query_of, count=num_rows, out=self._dense)
        absorb(query, w_uk, out=self._query)
        self._inside.attend(
            layer, self._query, entries, units, lengths=lengths, num_rows=num_rows, tables=tables
        )
        project(self._inside.partials.out, w_uv, out=self.partials.out)


def check_weights(
    weights: Weights, layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device
) -> None:
    """Raise ValueError for weights that are not those of the layouts, or do not fit them."""
    if len(weights) != len(layouts):
        raise ValueError(
            f"weights must be of {len(layouts)} layers, as layouts, got {len(weights)}"
        )
    layout = layouts[0]
    nope = layout.query_dim - layout.rope_dim
    uk = (layout.branch_heads, nope, layout.absorbed_dim)
    uv = (layout.branch_heads, layout.value_dim, layout.out_dim)
    for layer, (w_uk, w_uv) in enumerate(weights):
        check_tensor(w_uk, f"w_uk of layer {layer}", uk, dtype, device)
        check_tensor(w_uv, f"w_uv of layer {layer}", uv, dtype, device)


def absorb(query: Tensor, w_uk: Tensor, *, out: Tensor) -> None:
    """`reference.absorb` of queries (M, H, nope + rope) by (H, nope, latent), to (M, H, latent + rope).

    Each row by itself: what unused ones hold stays there.
    """
    _, nope, latent = w_uk.shape
    torch.bmm(query[..., :nope].transpose(0, 1), w_uk, out=out[..., :latent].transpose(0, 1))
    out[..., latent:].copy_(query[..., nope:])


def project(rows: Tensor, w_uv: Tensor, *, out: Tensor) -> None:
    """`reference.project` of partials (M, H, C) by (H, C, V), to (M, H, V), each row by itself."""
    torch.bmm(rows.transpose(0, 1), w_uv, out=out.transpose(0, 1))
