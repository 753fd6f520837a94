"""The backend on CPUs: plain torch over a pool in host memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..backend import Ability, BackendCounts
from ..cost.predicate import Mode
from ..errors import coverage_error
from ..exchanger import Answer
from ..observe.decision_log import log_decisions
from ..observe.explain import LastStep
from ..scope import Scope, Selection
from ..transport.messages import Header, Message
from ..world import World
from . import answer
from .select import select_step
from .step import attend_step


class CpuBackend:
    """Does everything that a runtime can."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last: LastStep | None = None

    def require(self, ability: Ability) -> None:
        """All of them."""

    def check_attend(self, selection: Selection, mode: Mode) -> None:
        """Any selection, any mode."""

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None, *, push: bool
    ) -> None:
        self._world.writes.write(layer, ids, entries, index_keys, push=push)

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
        return select_step(
            self._world, layer, query, weights, scope, top_k=top_k, unit_tokens=unit_tokens
        )

    def attend(
        self, layer: int, query: Tensor, selection: Selection, *, sink: Tensor | None, mode: Mode
    ) -> Tensor:
        world = self._world
        result = attend_step(world, layer, query, selection, sink=sink, mode=mode)
        self._last = result.last
        if world.config.log_decisions:
            log_decisions(self._last, step=world.stats.steps)
        if result.complaints:
            world.stats.failures["coverage"] += 1
            raise coverage_error(layer, result.complaints, branches=world.config.num_branches)
        return result.out

    def answers(self) -> Mapping[str, Answer]:
        world = self._world
        return {
            "select": lambda message: answer.answer_select(world, message),
            "attend": lambda message: answer.answer_attend(world, message),
        }

    def flush(self, header: Header, visitors: Sequence[Message | None]) -> None:
        """Others read nothing here: they ask."""

    def meet(self) -> None:
        """Others read nothing here: they ask."""

    def drop_leases(self) -> None:
        self._world.stores.drop_leases()

    def last_step(self) -> LastStep | None:
        return self._last

    def counted(self) -> BackendCounts:
        return BackendCounts(Counter(), self._world.stats.leases)

    def reconnect(self) -> None:
        """The last step was of a world that is gone."""
        self._last = None

    def close(self) -> None:
        """Nothing is open."""
