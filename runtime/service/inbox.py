"""Inbox: what arrives at a rank while it serves, sorted and bounded; where its threads meet.

Carriers `put` what arrives and wait in `make_room`; the server takes requests; the engine takes
answers and says whom it asks. All of it is under one lock that is held for moments only: nobody
sends, receives or computes under it.

A request counts as in work from the moment there is room for it until its answer is ready. When the
bounds are reached the carriers wait, in the order in which they came, and with them whoever sends.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence

from torch import Tensor

from ..errors import PeerError
from ..transport.base import Frame, Purpose

# Requests of one source that are not answered yet: one, and one more after an exchange that failed
# because of somebody else.
MAX_OWED = 2
_LEFT = "closed its service"


class Inbox:
    """Requests by source, answers by peer, and who is lost or has parted."""

    def __init__(self, *, rank: int, world_size: int, max_requests: int, max_bytes: int) -> None:
        """At most `max_requests` requests in work and `max_bytes` of them, or one larger request."""
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._requests: list[deque[Frame]] = [deque() for _ in range(world_size)]
        self._answers: list[deque[Tensor]] = [deque() for _ in range(world_size)]
        self._in_work: list[deque[int]] = [deque() for _ in range(world_size)]  # bytes of each
        self._peers = set(range(world_size)) - {rank}
        self._next_source = 0
        self._line: deque[int] = deque()  # sources that wait for room
        self._lost: dict[int, PeerError] = {}
        self._asked: set[int] = set()
        self._done: set[int] = set()  # they ask no more
        self._left: set[int] = set()  # nor are they to be asked
        self._served: dict[Purpose, set[int]] = {Purpose.DONE: set(), Purpose.LEAVE: set()}
        self._announced: dict[Purpose, set[int]] = {Purpose.DONE: set(), Purpose.LEAVE: set()}
        self._unread: list[Frame] = []
        self._stopped = False
        self.most_requests = self.most_bytes = 0
        self._lock = threading.Lock()
        self._for_server = threading.Condition(self._lock)
        self._for_engine = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)

    # Carriers ------------------------------------------------------------------------------------

    def make_room(self, peer: int, num_bytes: int, timeout_s: float | None) -> bool:
        """Wait for room for a request; False if that takes longer, or nobody will answer it anyway."""
        with self._lock:
            self._line.append(peer)

            def has_turn() -> bool:
                return self._line[0] == peer and self._has_room(num_bytes)

            def is_pointless() -> bool:
                return self._stopped or peer in self._lost

            ready = self._room.wait_for(lambda: is_pointless() or has_turn(), timeout_s)
            self._line.remove(peer)
            self._room.notify_all()
            if not ready or is_pointless():
                return False
            self._take_in(peer, num_bytes)
            return True

    def put(self, frame: Frame) -> None:
        """Take in whatever arrived."""
        peer, buffer = frame.peer, frame.buffer
        with self._lock:
            if buffer is None:
                self._unread.append(frame)
                self._lose(peer, PeerError(frame.blame or (peer,), frame.reason))
            elif frame.purpose is Purpose.STEP:
                self._unread.append(frame)
                if peer not in self._left:
                    self._expel(peer, "took a step of the whole world while this rank serves")
            elif peer in self._lost:
                return
            elif frame.purpose is Purpose.ANSWER:
                self._answers[peer].append(buffer)
                if len(self._answers[peer]) > MAX_OWED:
                    self._expel(peer, "sent answers that nobody asked for")
                self._for_engine.notify_all()
            elif peer in self._done and frame.purpose is not Purpose.LEAVE:
                self._expel(peer, "asked after it had sent DONE or LEAVE")
            else:
                if frame.purpose is not Purpose.ASK:
                    self._done.add(peer)
                    self._left |= {peer} if frame.purpose is Purpose.LEAVE else set()
                elif not frame.has_room:
                    self._take_in(peer, len(buffer))
                self._requests[peer].append(frame)
                if len(self._in_work[peer]) > MAX_OWED:
                    self._expel(peer, f"has over {MAX_OWED} requests that are not answered yet")
                self._for_server.notify()

    def unread(self) -> Sequence[Frame]:
        """What arrived for the steps after this service."""
        with self._lock:
            frames, self._unread = self._unread, []
            return frames

    # The server ----------------------------------------------------------------------------------

    def next_request(self) -> Frame | None:
        """Wait for a request, a goodbye, or a peer to part from; sources take order. None: stop."""
        with self._lock:
            self._for_server.wait_for(lambda: self._stopped or any(self._requests))
            if self._stopped:
                return None
            world_size = len(self._requests)
            order = ((self._next_source + after) % world_size for after in range(world_size))
            source = next(peer for peer in order if self._requests[peer])
            self._next_source = source + 1
            return self._requests[source].popleft()

    @property
    def stopped(self) -> bool:
        """Whether everybody was freed: nothing is to be done for a request any more."""
        return self._stopped

    def answered(self, peer: int) -> None:
        """The oldest request of `peer` is no longer in work."""
        with self._lock:
            if self._in_work[peer]:
                self._in_work[peer].popleft()
                self._room.notify_all()

    def expel(self, peer: int, reason: str) -> None:
        """Expect nothing more of `peer`; the server is given the reason, to send it."""
        with self._lock:
            self._expel(peer, reason)

    def part(self, peer: int, goodbye: Purpose) -> bool:
        """`peer` sent DONE or LEAVE, and all it asked is answered. True if it is to be sent LEAVE in
        return now: once, and not while it is being asked (then `end` says so).
        """
        with self._lock:
            self._served[Purpose.DONE].add(peer)
            self._served[goodbye].add(peer)
            self._for_engine.notify_all()
            return goodbye is Purpose.LEAVE and bool(
                self._to_announce(goodbye, {peer} - self._asked)
            )

    # The engine ----------------------------------------------------------------------------------

    def begin(self, peers: Collection[int]) -> list[int]:
        """Begin to ask these peers. Returns whose late answers were dropped, once for each.

        Raises: PeerError if one of them is lost or serves no more; nobody is asked then.
        """
        with self._lock:
            self._check_lost(peers)
            gone = tuple(sorted(set(peers) & self._left))
            if gone:
                raise PeerError(gone, _LEFT)
            self._asked = set(peers)
            return self._drop_answers(peers)

    def drop_answers(self, peers: Collection[int]) -> list[int]:
        """Between requests: drop the late answers of these peers; returns whose, once for each."""
        with self._lock:
            return self._drop_answers(peers)

    def next_answer(self, peers: Collection[int], expiry: float) -> tuple[int, Tensor] | None:
        """Wait until `expiry` (monotonic) for an answer of one of these peers; None: the time is over.

        Raises: PeerError naming those of them that are lost.
        """
        with self._lock:
            self._for_engine.wait_for(
                lambda: any(self._answers[p] or p in self._lost for p in peers),
                max(expiry - time.monotonic(), 0.0),
            )
            for peer in peers:
                if self._answers[peer]:
                    return peer, self._answers[peer].popleft()
            self._check_lost(peers)
            return None

    def end(self) -> list[int]:
        """The asking is over. Returns peers that left meanwhile and are to be sent LEAVE in return."""
        with self._lock:
            asked, self._asked = self._asked, set()
            return self._to_announce(Purpose.LEAVE, asked & self._served[Purpose.LEAVE])

    def announce(self, what: Purpose) -> list[int]:
        """Returns the peers that are to be sent DONE or LEAVE, each once and not DONE after LEAVE."""
        with self._lock:
            return self._to_announce(what, self._peers - self._announced[Purpose.LEAVE])

    def wait_served(
        self, peers: Collection[int], goodbye: Purpose, timeout_s: float
    ) -> tuple[int, ...]:
        """Wait until these peers sent it and are answered, or are lost; returns the others."""
        with self._lock:
            self._for_engine.wait_for(
                lambda: self._stopped or set(peers) <= self._served[goodbye] | self._lost.keys(),
                timeout_s,
            )
            return tuple(sorted(set(peers) - self._served[goodbye] - self._lost.keys()))

    def lost(self) -> dict[int, PeerError]:
        """The peers nothing more is expected of, and why."""
        with self._lock:
            return dict(self._lost)

    def gone(self) -> dict[int, PeerError]:
        """The peers that answer no more, and why: those that are lost, and those that left."""
        with self._lock:
            return {peer: PeerError((peer,), _LEFT) for peer in self._left} | self._lost

    def stop(self) -> None:
        """Free everybody who waits here."""
        with self._lock:
            self._stopped = True
            for waiting in (self._for_server, self._for_engine, self._room):
                waiting.notify_all()

    # Under the lock ------------------------------------------------------------------------------

    def _drop_answers(self, peers: Collection[int]) -> list[int]:
        late = [peer for peer in peers for _ in self._answers[peer]]
        for peer in peers:
            self._answers[peer].clear()
        return late

    def _to_announce(self, what: Purpose, peers: set[int]) -> list[int]:
        peers = peers - self._announced[what]
        self._announced[what] |= peers
        return sorted(peers)

    def _has_room(self, num_bytes: int) -> bool:
        in_work = [size for sizes in self._in_work for size in sizes]
        few = len(in_work) < self._max_requests and sum(in_work) + num_bytes <= self._max_bytes
        return few or not in_work

    def _take_in(self, peer: int, num_bytes: int) -> None:
        self._in_work[peer].append(num_bytes)
        in_work = [size for sizes in self._in_work for size in sizes]
        self.most_requests = max(self.most_requests, len(in_work))
        self.most_bytes = max(self.most_bytes, sum(in_work))

    def _expel(self, peer: int, reason: str) -> None:
        if peer not in self._lost:
            self._lose(peer, PeerError((peer,), reason))
            self._requests[peer].append(Frame(peer, None, reason, (peer,)))
            self._for_server.notify()

    def _lose(self, peer: int, error: PeerError) -> None:
        if peer not in self._lost:
            self._lost[peer] = error
            self._requests[peer].clear()
            self._in_work[peer].clear()
            self._for_engine.notify_all()
            self._room.notify_all()

    def _check_lost(self, peers: Collection[int]) -> None:
        lost = [peer for peer in sorted(peers) if peer in self._lost]
        if lost:
            culprits = {rank for peer in lost for rank in self._lost[peer].culprits}
            raise PeerError(tuple(sorted(culprits)), self._lost[lost[0]].reason)
