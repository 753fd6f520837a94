"""TorchTransport: messages over torch.distributed point-to-point (gloo).

Every message is a fixed frame (int64: magic, body bytes, kind, incarnation) and a body. A thread per peer
receives, because gloo cannot poll and a receive that times out closes every pair of the process;
deadlines are kept by the waiting caller instead, on the queue that the threads fill. In service a
listener does not receive a request before there is room for it, so its bytes stay with the sender.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from datetime import timedelta

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from .base import Frame, Purpose, Transport

_FRAME_MAGIC = 0x716F_6672
_ABORT, _BYE = 1, 2  # beside the values of Purpose
_MAX_BODY_BYTES = 1 << 32
_MAX_ABORT_BYTES = 1 << 14
_LIMITS = {**dict.fromkeys(map(int, Purpose), _MAX_BODY_BYTES), _ABORT: _MAX_ABORT_BYTES, _BYE: 0}
_MAX_REASON_CHARS = 2000
_NEVER_SENT = 0x6E6F  # a tag that no message uses
_FOREVER = timedelta(days=30)
# gloo reads a send until it is over. To a peer that has not answered yet there are at most three
# messages in step, and in service two requests, two answers and the goodbyes; older ones are over.
_SENDS_KEPT = 16


class TorchTransport(Transport):
    """One rank of a gloo process group. The group's own timeout is not used."""

    def __init__(self, *, group: dist.ProcessGroup, deadline_s: float) -> None:
        super().__init__(
            rank=dist.get_rank(group), world_size=dist.get_world_size(group), deadline_s=deadline_s
        )
        self._group = group
        self._in_flight: dict[int, deque[tuple[dist.Work, Tensor]]] = {
            p: deque() for p in self.peers
        }
        self._closing = False
        self._sending = threading.Lock()  # frame and body of a message go out together
        self._threads = {
            peer: threading.Thread(
                target=self._listen, args=(peer,), daemon=True, name=f"qroam-from-{peer}"
            )
            for peer in self.peers
        }
        for thread in self._threads.values():
            thread.start()
        atexit.register(self.close)  # a thread inside gloo at interpreter exit aborts the process

    @property
    def group(self) -> dist.ProcessGroup:
        return self._group

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        atexit.unregister(self.close)
        culprits = {*(self._failure.culprits if self._failure else ()), *self.suspects}
        # The innocent first: they still need what was sent here, and to wait for a send to the dead
        # in vain closes every pair of gloo's.
        self._part_from([peer for peer in self.peers if peer not in culprits], self.deadline_s)
        self._part_from([peer for peer in self.peers if peer in culprits], 1.0)
        if any(thread.is_alive() for thread in self._threads.values()):
            self._hang_up()

    def _part_from(self, peers: list[int], patience_s: float) -> None:
        """Send a goodbye, and listen until these peers have sent one (or an abort) too."""
        expiry = time.monotonic() + patience_s
        for peer in peers:
            try:
                self._send_frame(peer, _BYE, None)
                for work, _ in self._in_flight[peer]:
                    work.wait(timedelta(seconds=1))
            except RuntimeError:
                continue  # the peer is gone already
        for peer in peers:
            self._threads[peer].join(max(expiry - time.monotonic(), 0.0))

    def _hang_up(self) -> None:
        """Free the threads that still listen: a receive that times out closes every pair of gloo's."""
        try:
            work = dist.irecv(
                torch.empty(1), group=self._group, group_src=self.peers[0], tag=_NEVER_SENT
            )
            assert work is not None
            work.wait(timedelta(milliseconds=1))
        except RuntimeError:
            for thread in self._threads.values():
                thread.join(1.0)

    def _send(self, peer: int, buffer: Tensor, purpose: Purpose = Purpose.STEP) -> None:
        try:
            self._send_frame(peer, purpose, buffer)
        except RuntimeError as error:  # whoever waits for it finds out whose fault it is
            self._deliver(Frame(peer, None, f"connection lost: {_first_line(error)}"))

    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None:
        body = bytearray(abort_body(culprits, reason))
        try:
            self._send_frame(peer, _ABORT, torch.frombuffer(body, dtype=torch.uint8))
        except RuntimeError:
            return  # the peer is gone; the others are still informed

    def _send_frame(self, peer: int, kind: int, body: Tensor | None) -> None:
        size = 0 if body is None else len(body)
        frame = torch.tensor([_FRAME_MAGIC, size, kind, self.incarnation], dtype=torch.int64)
        flight = self._in_flight[peer]
        with self._sending:
            for part in (frame, body):
                if part is not None and len(part):
                    work = dist.isend(part, group=self._group, group_dst=peer)
                    assert work is not None
                    flight.append((work, part))
            while len(flight) > _SENDS_KEPT:
                flight.popleft()

    def _listen(self, peer: int) -> None:
        """Put everything `peer` sends on the queue until it sends a goodbye or is lost."""
        try:
            while True:
                frame = self._receive(peer, torch.empty(4, dtype=torch.int64))
                magic, size, kind, incarnation = frame.tolist()
                read_frame(magic, size, kind, incarnation)
                goodbye = Frame(peer, None, "closed its runtime", incarnation=incarnation)
                if kind == _BYE:
                    self._deliver(goodbye)
                    return
                has_room = kind == Purpose.ASK and self._make_room(peer, size, None, incarnation)
                body = self._receive(peer, torch.empty(size, dtype=torch.uint8))
                if kind == _ABORT:
                    blame, reason = read_abort(body.numpy().tobytes(), world_size=self.world_size)
                    self._deliver(goodbye._replace(reason=reason, blame=blame))
                    return
                purpose = Purpose(kind)
                self._deliver(goodbye._replace(buffer=body, purpose=purpose, has_room=has_room))
        except (RuntimeError, ValueError) as error:
            self._deliver(Frame(peer, None, f"connection lost: {_first_line(error)}"))

    def _receive(self, peer: int, into: Tensor) -> Tensor:
        if len(into):
            work = dist.irecv(into, group=self._group, group_src=peer)
            assert work is not None
            work.wait(_FOREVER)
        return into


def read_frame(magic: int, size: int, kind: int, incarnation: int) -> None:
    """Raise ValueError unless this announces a body that a peer may send."""
    limit = _LIMITS.get(kind, -1)
    if magic != _FRAME_MAGIC or not 0 <= size <= limit or incarnation < 0:
        raise ValueError(f"malformed frame {[magic, size, kind, incarnation]}")


def abort_body(culprits: tuple[int, ...], reason: str) -> bytes:
    text = reason[:_MAX_REASON_CHARS].encode(errors="replace").decode()
    return bytes(msgpack.packb([list(culprits), text]))


def read_abort(body: bytes, *, world_size: int) -> tuple[tuple[int, ...], str]:
    """(culprits, reason) of an abort. Raises: ValueError unless it blames ranks of this world."""
    try:
        decoded = msgpack.unpackb(body, max_array_len=max(world_size, 2), max_map_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"malformed abort: {error}") from error
    match decoded:
        case [[*culprits], str(reason)] if culprits and all(
            type(rank) is int and 0 <= rank < world_size for rank in culprits
        ):
            if abort_body(tuple(culprits), reason) == body:
                return tuple(culprits), reason
    raise ValueError("malformed abort")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
