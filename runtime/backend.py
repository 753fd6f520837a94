"""What a rank does with its entries: the contract of `cpu/backend.py` and `gpu/backend.py`.

`Runtime.open` chooses one and gives it to the `World`; nothing else asks which it is. Both steps show
the same verbs in the same order: plan, send, attend own and others, receive, merge.

Letters: Q queries, H heads, D columns, Hi index heads, n entries, G branches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from .cost.predicate import Mode
from .exchanger import Answer
from .observe.explain import LastStep
from .scope import Scope, Selection
from .transport.messages import Header, Message

Ability = Literal["serve", "leave its world and go on", "rejoin"]


class BackendCounts(NamedTuple):
    """Bytes sent past the transport by message kind, and leases by what became of them."""

    bytes_sent: Counter[str]
    leases: Mapping[str, int]


class Backend(Protocol):
    """Writes, selects, attends."""

    def require(self, ability: Ability) -> None:
        """Raises: RuntimeError if a runtime with this backend cannot do that."""
        ...

    def check_attend(self, selection: Selection, mode: Mode) -> None:
        """Raises: ValueError for an `attend` that this backend does not do."""
        ...

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None, *, push: bool
    ) -> None:
        """Store entries (n, G, D) and index keys (n, D) of entry ids (n,) in the copies held here.

        With `push`, copies elsewhere get them with the layer's next step; without, other ranks are
        given the same entries and write theirs.
        """
        ...

    def select(
        self,
        layer: int,
        query: Tensor,
        weights: Tensor,
        scope: Scope,
        *,
        top_k: int,
        unit_tokens: int,
    ) -> Selection:
        """The exact global top-k units of index queries (Q, Hi, D) with head weights (Q, Hi)."""
        ...

    def attend(
        self, layer: int, query: Tensor, selection: Selection, *, sink: Tensor | None, mode: Mode
    ) -> Tensor:
        """Attention of `query` (Q, H, D) over the selected units, wherever they are: (Q, H, out).

        Raises: CoverageError unless every answer covers just what was asked; PeerError.
        """
        ...

    def answers(self) -> Mapping[str, Answer]:
        """What a service answers to each kind of request."""
        ...

    def flush(self, header: Header, visitors: Sequence[Message | None]) -> None:
        """Show the other ranks what was written here, in the exchange of `header` once all writes were
        taken; `visitors` are what the others ask in it.

        Raises: PeerError naming a rank that is at another layer, where all have to be at the same.
        """
        ...

    def meet(self) -> None:
        """Before blocks are given up: wait until no rank reads them any more."""
        ...

    def drop_leases(self) -> None:
        """Forget every fetched copy."""
        ...

    def last_step(self) -> LastStep | None:
        """The last `attend` of this rank: what was demanded and how it was decided."""
        ...

    def counted(self) -> BackendCounts:
        """Counters since the runtime was opened."""
        ...

    def reconnect(self) -> None:
        """The world goes on in a new incarnation, this rank perhaps under another number."""
        ...

    def close(self) -> None:
        """Give back what was opened; idempotent."""
        ...
