"""How ranks ask one another: the contract of `lockstep.py` and of `service/server.py`.

In lockstep every rank issues the same exchanges in the same order and answers all others inside of
them. In service only the holders of what is wanted are asked, whenever a rank likes, and a thread of
theirs answers. A world has one exchanger at a time (`World.exchanger`); nothing else asks which it is.

Letters: W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from .errors import PeerError
from .transport.base import Column
from .transport.messages import Header, Message

T = TypeVar("T")
Answer = Callable[[Message], Mapping[str, Tensor]]  # what a rank answers when it is asked


class Exchanger(Protocol):
    """Asks other ranks and brings their answers."""

    def attempt(self, ask: Callable[[], T]) -> T:
        """The result of `ask`, which plans and makes one exchange. Ranks that wait for
        this one learn what it raises; it may be called again where another rank can be asked instead.
        """
        ...

    def exchange(
        self,
        header: Header,
        columns: Sequence[Column],
        answer: Answer,
        own_work: Callable[[], T],
        replaceable: Callable[[], Tensor] | None = None,
    ) -> tuple[T, list[Message | None]]:
        """Ask, do own work; returns its result, and the answers at their ranks' places.

        Args:
            answer: what this rank answers to whoever asks it in this exchange.
            replaceable: computes (W,) bool, the ranks instead of which others could be asked.
        Raises: PeerError within the deadline, naming who is lost, silent or answers wrongly.
        """
        ...

    def settle(self, header: Header, columns: Sequence[Column] = ()) -> list[Message | None]:
        """Hand over what was written here for copies elsewhere, and take what others wrote.

        Returns: what each rank asked, if all take part; otherwise nothing.
        """
        ...

    def recipients(self, wanted: Callable[[], Tensor]) -> Tensor | None:
        """Which ranks get a question that concerns those that `wanted` computes, (W,) bool; None: all."""
        ...

    def unreachable(self) -> Mapping[int, PeerError]:
        """The ranks that would be asked in vain, and why."""
        ...

    def check_tables_may_change(self) -> None:
        """Raises: RuntimeError while tables have to stay as they are."""
        ...

    def close(self) -> None:
        """Stop asking and answering; idempotent."""
        ...
