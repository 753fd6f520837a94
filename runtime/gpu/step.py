"""One layer-step on the device, in the order the data travels. `cpu/step.py` has the same verbs.

    main stream    plan   send   attend others   receive and merge
    own stream          \\ attend own          /

Everything between the selection and the merged output is launched without a host read, so a step is
captured in one CUDA graph and replayed with new queries and selections. Own rows are attended beside
the exchange, over what this rank has and what it pulls: a few SMs send queries, the others attend
meanwhile. What travels is of one payload form (`payload.py`): A absorbed rows, or, where every rank has
the projections, B un-absorbed ones. Of form A, rows that `attend` cuts stay in parts: they are merged
when answers leave, and when answers are received.

Letters: N items of this rank (a query each), K listed entries, H heads, D query columns, V output
columns, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.attend import parts_of
from ...kernels.decide import ROUTE, PlanMode, PriceTable
from ...kernels.exchange.launch import exchange
from ...kernels.exchange.types import Accepted, Ends, Merge, Routes
from ...kernels.fetch import compose, fetch
from ...kernels.plan import Plan, PlanWorkspace, num_sms, plan
from ...partition.layout import Form, Layout
from .payload import Absorbed, Unabsorbed, Weights, check_weights
from .pool import GpuPool

SENDERS = 16  # SMs that move queries while the others attend


class GpuStep:
    """The step of up to N queries a rank, of K entries each.

    Every rank of the world runs the same sequence of steps, idle ones without units. The buffers:

    query (N, H, D), units (N, K) int32 stored entry ids, distinct in a row, -1 anywhere, and hidden
    (N, 2) int32, entry ids ahead of each query, are what it reads. out (N, H, V), lse (N, H) fp32 and
    fault (N,) int32, 0 or 1 + a holder whose entries were not all there, are what it leaves; out and
    lse of a query with a fault are NaN. `plan` is the last step's, `lacking` (N,) int32 the faults of
    what was fetched or is here.

    Of form A D are the layout's key columns and V its value columns: W_UK comes before the step and
    W_UV behind it. Of form B both are inside: D are the layout's query columns, V its output columns.
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
        weights: Weights | None = None,
        larger: GpuStep | None = None,
    ) -> None:
        """Allocate for N = `rows` and K = `listed`; nothing is launched.

        Args:
            layouts: of each layer, of equal shapes.
            prices: what decides, of `world_size` ranks and of the step's payload form.
            ends: this rank's end of a channel; None in a world of one.
            weights: W_UK and W_UV of each layer, equal on all ranks; with them the form is B.
            larger: a step of as many rows or more, equal otherwise, in whose memory this one plans and
                attends what others ask; so only one of them is under way at a time.
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
        if larger is not None and rows > len(larger.query):
            raise ValueError(f"{rows} rows do not fit the memory of a step of {len(larger.query)}")
        layout, device = layouts[0], pool.memory.device
        form: Form = "A" if weights is None else "B"
        columns, out_columns = layout.routed_dims(form)
        _check_form(form, layout, prices, ends, dtype)
        if weights is not None:
            check_weights(weights, layouts, dtype, device)
        heads = layout.branch_heads
        self._pool, self._prices, self._ends = pool, prices, ends
        self._rank = rank

        def ints(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.query: Tensor = torch.zeros(rows, heads, columns, dtype=dtype, device=device)
        self.units, self.hidden = ints(rows, listed, value=-1), ints(rows, 2)
        self.out = torch.empty(rows, heads, out_columns, dtype=dtype, device=device)
        self.lse = torch.empty(rows, heads, dtype=torch.float32, device=device)
        self.fault = ints(rows)
        self.plan = Plan.make(
            num_items=rows, num_listed=listed, world_size=world_size,
            num_forms=prices.num_forms, device=device,
        )  # fmt: skip
        self._plan_space: PlanWorkspace = (
            larger._plan_space
            if larger
            else PlanWorkspace.make(
                num_items=rows,
                num_branches=1,
                num_units=len(pool.directory.records) * pool.directory.block_tokens,
                world_size=world_size,
                device=device,
            )
        )
        self._came = ints(rows * listed, 2)
        self._own_units, self._own_lengths = ints(rows, listed), ints(rows)
        self.lacking = ints(rows)

        def attended(count: int, parts: int) -> Absorbed | Unabsorbed:
            if weights is None:
                return Absorbed(
                    layouts, count, parts=parts, combined=ends is None, dtype=dtype, device=device
                )
            return Unabsorbed(
                layouts, count, weights=weights, parts=parts, dtype=dtype, device=device
            )

        parts, sms = parts_of(heads, device), num_sms(device)
        beside = parts if ends is None else max(parts * (sms - SENDERS) // sms, 1)
        self._own = attended(rows, beside)
        self._aside = torch.cuda.Stream(device)
        self._graphs: dict[tuple[int, PlanMode], torch.cuda.CUDAGraph] = {}
        if ends is not None:
            made = self.plan
            self._routes = Routes(
                made.items[0], made.units_of[0], made.route_units[0], made.pairs[0], made.expected
            )
            if larger is None:
                self._accepted = Accepted.make(ends.wire, device)
                self._others = attended((world_size - 1) * ends.wire.rows, parts)
            else:
                self._accepted, self._others = larger._accepted, larger._others
            self._inbox = ends.inbox.view(dtype).view(-1, heads, columns)

    def run(self, layer: int, mode: PlanMode) -> None:
        """Launch one step on the current stream. With mode "given" the ways are those in `plan.way`.

        Raises: ValueError for a mode that may fetch where messages are put: peers are out of reach.
        """
        self.make_plan(layer, mode)
        self.carry_out(layer, mode)

    def make_plan(self, layer: int, mode: PlanMode) -> None:
        """PLAN: who is asked for what, to `plan`."""
        self._check_mode(mode)
        pool = self._pool
        plan(
            self.units, pool.directory, self._prices, self._plan_space, rank=self._rank, mode=mode,
            hidden=self.hidden, fill=pool.fill[layer], out=self.plan,
        )  # fmt: skip

    def carry_out(self, layer: int, mode: PlanMode) -> None:
        """Do what `plan` says, which may have been made for another query of the same selection."""
        self._check_mode(mode)
        if self._ends is None:
            self._attend_alone(layer)
            return
        main, aside = torch.cuda.current_stream(), self._aside
        aside.wait_stream(main)
        self._send(self._ends)
        with torch.cuda.stream(aside):
            self._attend_own(layer, mode)
        self._attend_others(layer)
        main.wait_stream(aside)
        self._receive(self._ends)

    def replay(self, layer: int, mode: PlanMode) -> None:
        """`run` from a graph, captured at first use after a run outside, at which others may replay."""
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

    def _check_mode(self, mode: PlanMode) -> None:
        if self._ends is not None and self._ends.put is not None and mode != "always-route":
            raise ValueError(
                f"where messages are put nothing can be fetched: mode is always-route, got {mode!r}"
            )

    def _attend_alone(self, layer: int) -> None:
        """ATTEND in a world of one: there is nobody to ask."""
        self.compose(layer)
        self._attend_listed(layer, self._own_units, self._own_lengths)
        own, whole = self._own.partials, self.lacking == 0
        self.out.copy_(torch.where(whole[:, None, None], own.out, torch.nan))
        self.lse.copy_(torch.where(whole[:, None], own.lse, torch.nan))
        self.fault.copy_(self.lacking)

    def fetch(self, layer: int) -> None:
        """Pull what the plan says into the staged rows."""
        pool = self._pool
        fetch(
            pool.map, layer, pool.peers, self.plan.fetch_units, self.plan.counts,
            memory=pool.memory, came=self._came, uses=pool.leases.fetched,
        )  # fmt: skip

    def compose(self, layer: int) -> None:
        """List each item's entries that are here or were fetched, and note which items are `lacking`."""
        compose(
            self._pool.map, layer, self.plan, self._came, rank=self._rank,
            units=self._own_units, lengths=self._own_lengths, fault=self.lacking,
            uses=self._pool.leases.read,
        )  # fmt: skip

    def _send(self, ends: Ends) -> None:
        """SEND queries with their unit lists, and take in what the others ask."""
        exchange(ends, self._routes, send=self.query, accept=self._accepted, ctas=SENDERS)

    def _attend_own(self, layer: int, mode: PlanMode) -> None:
        """ATTEND OWN rows over what is here and what is pulled; where nothing is fetched, the plan's
        list is all of it."""
        if mode == "always-route":
            self._attend_listed(layer, self.plan.local_units, self.plan.local_lengths)
            self.compose(layer)  # for what is lacking
        else:
            self.fetch(layer)
            self.compose(layer)
            self._attend_listed(layer, self._own_units, self._own_lengths)

    def _attend_listed(self, layer: int, units: Tensor, lengths: Tensor) -> None:
        self._own.attend(layer, self.query, self._pool.entries(layer), units, lengths=lengths)

    def _attend_others(self, layer: int) -> None:
        """ATTEND OTHERS: the rows that were sent here, over what is here."""
        accepted = self._accepted
        self._others.attend(
            layer, self._inbox, self._pool.entries(layer), accepted.units,
            lengths=accepted.lengths, num_rows=accepted.num_rows, query_of=accepted.query_of,
            tables=self._pool.tables(layer),
        )  # fmt: skip

    def _receive(self, ends: Ends) -> None:
        """RECEIVE and MERGE: answer the others, and merge own partials with answers as they arrive."""
        own = self._own.partials
        merge = Merge(
            own.out[None], own.lse[None], self.out, self.lse, self.fault, self.lacking, own.parts
        )
        exchange(ends, self._routes, answer=self._others.partials, receive=merge)


def _check_form(
    form: Form, layout: Layout, prices: PriceTable, ends: Ends | None, dtype: torch.dtype
) -> None:
    """Raise ValueError for prices or a wire of another payload form."""
    way = ROUTE + (form == "B")
    if (prices.num_forms, prices.first_way) != (1, way):
        raise ValueError(
            f"prices must be of form {form} alone, way {way}; got {prices.num_forms} forms from way "
            f"{prices.first_way} on"
        )
    if ends is None:
        return
    wanted = tuple(
        layout.branch_heads * columns * dtype.itemsize // 4 for columns in layout.routed_dims(form)
    )
    if (ends.wire.query_words, ends.wire.answer_words) != wanted:
        raise ValueError(
            f"queries and answers of form {form} have {wanted[0]} and {wanted[1]} words, the wire's "
            f"have {ends.wire.query_words} and {ends.wire.answer_words}"
        )
