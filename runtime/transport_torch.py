"""TorchTransport: messages over torch.distributed point-to-point (gloo).

Every message is a fixed frame (int64: magic, body bytes, is-abort) and a body. A thread per peer
receives, because gloo cannot poll and a receive that times out closes every pair of the process;
deadlines are kept by the waiting caller instead, on the queue that the threads fill.
"""

from __future__ import annotations

import threading
from collections import deque
from datetime import timedelta

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from .transport import Frame, Transport

_FRAME_MAGIC = 0x716F_6672
_MESSAGE, _ABORT, _BYE = 0, 1, 2
_MAX_BODY_BYTES = 1 << 34
_FOREVER = timedelta(days=30)
# A send is known to be over when the peer's later messages have arrived; until then gloo reads it.
_SENDS_KEPT = 16


class TorchTransport(Transport):
    """One rank of a gloo process group. The group's own timeout is not used."""

    def __init__(self, *, group: dist.ProcessGroup, deadline_s: float) -> None:
        super().__init__(
            rank=dist.get_rank(group), world_size=dist.get_world_size(group), deadline_s=deadline_s
        )
        self._group = group
        self._in_flight: dict[int, deque[tuple[dist.Work, Tensor]]] = {p: deque() for p in self.peers}
        self._closing = False
        self._threads = [
            threading.Thread(target=self._listen, args=(peer,), daemon=True, name=f"qroam-from-{peer}")
            for peer in self.peers
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        for peer in self.peers:
            try:
                self._send_frame(peer, _BYE, None)
            except RuntimeError:
                continue  # the peer is gone already
        if self._failure is None:
            for thread in self._threads:
                thread.join(self.deadline_s)

    def _send(self, peer: int, buffer: Tensor) -> None:
        try:
            self._send_frame(peer, _MESSAGE, buffer)
        except RuntimeError as error:  # the next collect finds out whose fault it is
            self._arrived.put(Frame(peer, None, f"connection lost: {_first_line(error)}"))

    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None:
        body = msgpack.packb([list(culprits), reason[:2000]])
        try:
            self._send_frame(peer, _ABORT, torch.frombuffer(bytearray(body), dtype=torch.uint8))
        except RuntimeError:
            return  # the peer is gone; the others still hear of it

    def _send_frame(self, peer: int, kind: int, body: Tensor | None) -> None:
        size = 0 if body is None else len(body)
        frame = torch.tensor([_FRAME_MAGIC, size, kind], dtype=torch.int64)
        flight = self._in_flight[peer]
        for part in (frame, body):
            if part is not None and len(part):
                work = dist.isend(part, group=self._group, group_dst=peer)
                assert work is not None
                flight.append((work, part))
        while len(flight) > _SENDS_KEPT:
            flight.popleft()

    def _listen(self, peer: int) -> None:
        """Put everything `peer` sends on the queue until it says goodbye or is lost."""
        try:
            while True:
                frame = self._receive(peer, torch.empty(3, dtype=torch.int64))
                magic, size, kind = frame.tolist()
                if magic != _FRAME_MAGIC or not 0 <= size <= _MAX_BODY_BYTES:
                    raise RuntimeError(f"malformed frame {frame.tolist()}")
                if kind == _BYE:
                    self._arrived.put(Frame(peer, None, "closed its runtime"))
                    return
                body = self._receive(peer, torch.empty(size, dtype=torch.uint8))
                if kind == _ABORT:
                    self._arrived.put(self._abort_frame(peer, body))
                    return
                self._arrived.put(Frame(peer, body))
        except (RuntimeError, ValueError) as error:
            self._arrived.put(Frame(peer, None, f"connection lost: {_first_line(error)}"))

    def _receive(self, peer: int, into: Tensor) -> Tensor:
        if len(into):
            work = dist.irecv(into, group=self._group, group_src=peer)
            assert work is not None
            work.wait(_FOREVER)
        return into

    def _abort_frame(self, peer: int, body: Tensor) -> Frame:
        match msgpack.unpackb(body.numpy().tobytes(), max_array_len=self.world_size):
            case [[*culprits], str(reason)] if culprits and all(
                type(rank) is int and 0 <= rank < self.world_size for rank in culprits
            ):
                return Frame(peer, None, reason, tuple(culprits))
        raise ValueError("malformed abort")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__

