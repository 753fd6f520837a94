"""LoopbackTransport: a world of one, or ranks of one process."""

from __future__ import annotations

from torch import Tensor

from .base import Frame, Purpose, Transport


class LoopbackTransport(Transport):
    """Ranks of one process, one thread each: queues that carry the same buffers as a network."""

    def __init__(self, *, rank: int, world_size: int, deadline_s: float) -> None:
        super().__init__(rank=rank, world_size=world_size, deadline_s=deadline_s)
        self._ends: list[LoopbackTransport] = [self]
        self._closed = False

    @classmethod
    def world(cls, world_size: int, *, deadline_s: float = 30.0) -> list[LoopbackTransport]:
        """The connected ends of a world, one per rank."""
        ends = [
            cls(rank=r, world_size=world_size, deadline_s=deadline_s) for r in range(world_size)
        ]
        for end in ends:
            end._ends = ends
        return ends

    def _send(self, peer: int, buffer: Tensor, purpose: Purpose = Purpose.STEP) -> None:
        end = self._ends[peer]
        # Without room in time it is delivered all the same, too late for its sender's deadline.
        has_room = purpose is Purpose.ASK and end._make_room(
            self.rank, len(buffer), self.deadline_s, self.incarnation
        )
        frame = Frame(self.rank, buffer, purpose=purpose, has_room=has_room)
        end._deliver(frame._replace(incarnation=self.incarnation))

    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None:
        frame = Frame(self.rank, None, reason, culprits, incarnation=self.incarnation)
        self._ends[peer]._deliver(frame)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for peer in self.peers:
                goodbye = Frame(self.rank, None, "closed its runtime", incarnation=self.incarnation)
                self._ends[peer]._deliver(goodbye)
