"""Membership: how a runtime came into its world, leaves it, and goes on in the next incarnation."""

from __future__ import annotations

from .config import RuntimeConfig
from .corpus.rejoin import Former, rejoin
from .transport.base import Transport
from .transport.connect import default_group
from .transport.tensor_parallel import joined_lane
from .world import World


class Membership:
    """The config and heads that a runtime was opened with, and whether it has a world now."""

    def __init__(
        self,
        world: World,
        whole: RuntimeConfig,
        heads: tuple[int, int] | None,
        *,
        owns_transport: bool,
    ) -> None:
        """`whole` is the config of all tensor-parallel lanes, `heads` those of this rank's."""
        self._world, self._whole, self._heads = world, whole, heads
        self._owns_transport = owns_transport
        self._former: Former | None = None  # while it is to rejoin
        self._default_group = default_group()  # of this incarnation

    @property
    def is_connected(self) -> bool:
        """Whether steps can be taken."""
        return self._former is None

    def leave(self) -> None:
        """Leave the world and keep all that is stored; idempotent."""
        if self._former is None:
            self._former = Former.of(self._world, None)
        self.close()

    def close(self) -> None:
        """Close the transport, unless it was given."""
        if self._owns_transport:
            self._world.transport.close()

    def check_rejoin(self, transport: Transport | None, incarnation: int) -> None:
        """Raises: ValueError unless the incarnation is above the last one. RuntimeError if the default
        process group is to be used and is that of the former incarnation."""
        last = self._world.transport.incarnation
        if type(incarnation) is not int or incarnation <= last:
            raise ValueError(f"incarnation must be a number above {last}, got {incarnation!r}")
        group = default_group()
        if transport is None and group is not None and group is self._default_group:
            raise RuntimeError(
                "the default process group is still that of the former incarnation, and waits for who "
                "is gone: disconnect, destroy it and initialize one of those who are there now, or "
                "give a transport"
            )

    def rejoin(self, transport: Transport | None, incarnation: int) -> None:
        """Go on with those who are there now, after `leave`; see `corpus/rejoin.py`."""
        with joined_lane(self._whole, transport, self._heads, incarnation) as joined:
            self._former = Former.of(self._world, self._former)
            self._world.reconnect(joined.transport, joined.sent_before)
            self._owns_transport = joined.transport is not transport
            self._default_group = default_group()
            rejoin(self._world, self._former)
        self._former = None
