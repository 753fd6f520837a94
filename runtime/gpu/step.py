"""One layer-step on the device, in the order the data travels: decide, move, attend, merge.

Letters: N items of this rank (a query each), K listed entries, H heads, D query columns, C value
columns, W ranks. Everything between the selection and the merged output is launched without a look
at the device, so a step is captured in one CUDA graph and replayed with new queries and selections;
`runtime/step.py` tells the same story on CPUs.

    main stream    plan   send, accept    others' rows   answer, receive
    own stream          \\ pull, own rows             /

What this rank has and what it pulled is attended beside the exchange: queries are sent by a few SMs,
the others attend meanwhile. Rows that `attend` cuts stay in parts: they are merged as answers leave,
and as answers are received.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attend import Workspace, attend, parts_of
from ...kernels.decide import Mode, PriceTable
from ...kernels.exchange import Accepted, Ends, Merge, Partials, Routes, exchange
from ...kernels.fetch import compose, fetch
from ...kernels.plan import Plan, num_sms, plan
from ...kernels.plan import Workspace as PlanWorkspace
from ...partition.layout import Layout
from .pool import GpuPool

SENDERS = 16  # SMs that move queries while the others attend


class GpuStep:
    """The step of up to N queries a rank, of K entries each.

    Every rank of the world runs the same sequence of steps, idle ones without units. The buffers:

    query (N, H, D), units (N, K) int32 stored entry ids, distinct in a row, -1 anywhere, and hidden
    (N, 2) int32, entry ids ahead of each query, are what it reads. out (N, H, C), lse (N, H) fp32 and
    fault (N,) int32, 0 or 1 + a holder whose entries were not all there, are what it leaves; out and
    lse of a query with a fault are NaN. `plan` is the last step's, `lacking` (N,) int32 the faults of
    what was fetched or is here.
    """

    def __init__(
        self,
        pool: GpuPool,
        layouts: Sequence[Layout],
        *,
        prices: PriceTable,
        ends: Ends | None,
        rank: int,
        world_size: int,
        rows: int,
        listed: int,
        dtype: torch.dtype,
    ) -> None:
        """Allocate for N = `rows` and K = `listed`; nothing is launched.

        Args:
            layouts: of each layer, of equal shapes. prices: what decides, of `world_size` ranks.
            ends: this rank's end of a channel; None in a world of one.
        Raises: ValueError for sizes that do not fit one another.
        """
        if (ends is None) != (world_size == 1):
            raise ValueError(
                f"a world of {world_size} needs {'no' if ends else 'an'} end of a channel"
            )
        if ends is not None and (rows > ends.wire.rows or listed > ends.wire.units):
            raise ValueError(
                f"{rows} rows of {listed} entries do not fit a wire of {ends.wire.rows} rows of "
                f"{ends.wire.units}"
            )
        layout, device = layouts[0], pool.memory.device
        heads, columns = layout.branch_heads, layout.value_dim
        self._pool, self._prices, self._ends = pool, prices, ends
        self._rank = rank
        self._value_dim = columns
        self._scales = [given.softmax_scale for given in layouts]

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        def results(count: int) -> tuple[Tensor, Tensor, Tensor]:
            out = torch.empty(count, heads, columns, dtype=dtype, device=device)
            return out, torch.empty(count, heads, device=device), ints(count, 2)

        self.query = torch.zeros(rows, heads, layout.key_dim, dtype=dtype, device=device)
        self.units, self.hidden = ints(rows, listed, value=-1), ints(rows, 2)
        self.out, self.lse, _ = results(rows)
        self.fault = ints(rows)
        self.plan = Plan.make(
            num_items=rows, num_listed=listed, world_size=world_size,
            num_forms=prices.num_forms, device=device,
        )  # fmt: skip
        self._plan_space = PlanWorkspace.make(
            num_items=rows,
            num_branches=1,
            num_units=len(pool.directory.records) * pool.directory.block_tokens,
            world_size=world_size,
            device=device,
        )
        self._came = ints(rows * listed, 2)
        self._own_units, self._own_lengths = ints(rows, listed), ints(rows)
        self.lacking = ints(rows)

        def space(count: int, parts: int) -> Workspace:
            return Workspace.make(
                rows=count, heads=heads, value_dim=columns, parts=parts, device=device, dtype=dtype
            )

        parts, sms = parts_of(heads, device), num_sms(device)
        beside = parts if ends is None else max(parts * (sms - SENDERS) // sms, 1)
        self._own = Partials(*results(rows), parts=space(rows, beside))
        self._aside = torch.cuda.Stream(device)
        self._graphs: dict[tuple[int, Mode], torch.cuda.CUDAGraph] = {}
        if ends is not None:
            others = (world_size - 1) * ends.wire.rows
            made = self.plan
            self._routes = Routes(
                made.items[0], made.units_of[0], made.route_units[0], made.pairs[0], made.expected
            )
            self._accepted = Accepted.make(ends.wire, device)
            self._answer = Partials(*results(others), parts=space(others, parts))
            self._inbox = ends.inbox.view(dtype).view(-1, heads, layout.key_dim)

    def run(self, layer: int, mode: Mode) -> None:
        """Launch one step on the current stream. With mode "given" the ways are those in `plan.way`."""
        self.decide(layer, mode)
        self.attend(layer, mode)

    def decide(self, layer: int, mode: Mode) -> None:
        """Who is asked for what, to `plan`."""
        pool = self._pool
        plan(
            self.units, pool.directory, self._prices, self._plan_space, rank=self._rank, mode=mode,
            hidden=self.hidden, fill=pool.fill[layer], out=self.plan,
        )  # fmt: skip

    def attend(self, layer: int, mode: Mode) -> None:
        """Do what `plan` says, which may have been decided for another query of the same selection."""
        ends = self._ends
        if ends is None:
            self._alone(layer)
            return
        main, aside = torch.cuda.current_stream(), self._aside
        aside.wait_stream(main)
        exchange(ends, self._routes, send=self.query, accept=self._accepted, ctas=SENDERS)
        with torch.cuda.stream(aside):
            self._attend_here(layer, mode)
        self._attend_routed(layer)
        main.wait_stream(aside)
        own = self._own
        merge = Merge(
            own.out[None], own.lse[None], self.out, self.lse, self.fault, self.lacking, own.parts
        )
        exchange(ends, self._routes, answer=self._answer, receive=merge)

    def replay(self, layer: int, mode: Mode) -> None:
        """`run` from a graph, captured at first use after a run outside, as all ranks then do."""
        key = (layer, mode)
        if key not in self._graphs:
            self.run(layer, mode)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.run(layer, mode)
            self._graphs[key] = graph
            return
        self._graphs[key].replay()

    def _alone(self, layer: int) -> None:
        self._compose(layer)
        self._attend_own(layer, self._own_units, self._own_lengths, combined=True)
        whole = self.lacking == 0
        self.out.copy_(torch.where(whole[:, None, None], self._own.out, torch.nan))
        self.lse.copy_(torch.where(whole[:, None], self._own.lse, torch.nan))
        self.fault.copy_(self.lacking)

    def pull(self, layer: int) -> None:
        """Fetch what the plan says, and list each item's entries that are here then."""
        pool = self._pool
        fetch(
            pool.map, layer, pool.peers, self.plan.fetch_units, self.plan.counts,
            memory=pool.memory, came=self._came, uses=pool.leases.fetched,
        )  # fmt: skip
        self._compose(layer)

    def _compose(self, layer: int) -> None:
        compose(
            self._pool.map, layer, self.plan, self._came, rank=self._rank,
            units=self._own_units, lengths=self._own_lengths, fault=self.lacking,
            uses=self._pool.leases.read,
        )  # fmt: skip

    def _attend_here(self, layer: int, mode: Mode) -> None:
        """Own rows over what is here; where nothing is fetched, the plan's list is all of it."""
        if mode == "always-route":
            self._attend_own(layer, self.plan.local_units, self.plan.local_lengths)
            self._compose(layer)  # for what is lacking
        else:
            self.pull(layer)
            self._attend_own(layer, self._own_units, self._own_lengths)

    def _attend_own(
        self, layer: int, units: Tensor, lengths: Tensor, *, combined: bool = False
    ) -> None:
        own = self._own
        assert own.parts is not None
        attend(
            self.query, self._pool.entries(layer), units, value_dim=self._value_dim,
            scale=self._scales[layer], workspace=own.parts, lengths=lengths,
            out=own.out, lse=own.lse, covered=own.covered, combined=combined,
        )  # fmt: skip

    def _attend_routed(self, layer: int) -> None:
        accepted, answer = self._accepted, self._answer
        assert answer.parts is not None
        attend(
            self._inbox, self._pool.entries(layer), accepted.units,
            value_dim=self._value_dim, scale=self._scales[layer], workspace=answer.parts,
            lengths=accepted.lengths, num_rows=accepted.num_rows, query_of=accepted.query_of,
            tables=self._pool.tables(layer), out=answer.out, lse=answer.lse,
            covered=answer.covered, combined=False,
        )  # fmt: skip
