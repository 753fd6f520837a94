"""Moving columns between ranks. One contract, two carriers: loopback here, gloo in its own file.

An exchange is one `post` (a message to every other rank, empty or not) and one `collect` (a message
from each). Messages of a pair of ranks arrive in order. A wait ends at the deadline; whoever notices
a culprit tells the others before it raises, so that every waiting rank names the same one.
"""

from __future__ import annotations

import queue
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import PeerError
from .messages import Header, Message, decode, encode

# Before a rank accuses a peer it listens, for this part of the deadline, for somebody who knows
# better: a peer that is silent because it waits for the real culprit says so when it gives up.
_GRACE = 0.075
# In step, a peer can be one message ahead; more is a fault, and would fill the memory.
_MAX_AHEAD = 4


class Column(NamedTuple):
    """Rows for all ranks: rank r's share is `counts[r]` rows, shares in rank order.

    With `pick` the rows sent are `rows[pick[...]]`; capacity beyond `counts.sum()` is not read.
    """

    name: str
    rows: Tensor
    counts: Tensor
    pick: Tensor | None = None


class Frame(NamedTuple):
    """What a carrier delivers from `peer`: a message; that it is gone; or an abort that blames ranks."""

    peer: int
    buffer: Tensor | None
    reason: str = ""
    blame: tuple[int, ...] = ()

    @property
    def is_abort(self) -> bool:
        return bool(self.blame)


class Transport(ABC):
    """A rank's end of the exchange. Bytes are counted where they are handed to the carrier."""

    def __init__(self, *, rank: int, world_size: int, deadline_s: float) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is outside a world of {world_size}")
        if not deadline_s > 0:
            raise ValueError(f"deadline must be positive, got {deadline_s} s")
        self.rank = rank
        self.world_size = world_size
        self.deadline_s = deadline_s
        self.bytes_sent: Counter[str] = Counter()
        self.messages_sent: Counter[str] = Counter()
        self.expiries = 0  # waits that ended at the deadline
        self._arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._waiting: list[deque[Tensor]] = [deque() for _ in range(world_size)]
        self._gone: dict[int, str] = {}
        self._failure: PeerError | None = None

    @property
    def peers(self) -> list[int]:
        return [peer for peer in range(self.world_size) if peer != self.rank]

    def post(self, header: Header, columns: Sequence[Column] = ()) -> None:
        """Send every other rank its share of the columns; counts are read to the host once, here."""
        if self.peers:
            self.post_shares(header, _shares(columns, self.world_size))

    def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Send every other rank its own columns, `shares` in rank order."""
        if self._failure:
            raise self._failure
        for peer in self.peers:
            buffer = encode(header, shares[peer])
            self._send(peer, buffer)
            self.bytes_sent[header.kind] += len(buffer)
            self.messages_sent[header.kind] += 1

    def collect(self, header: Header) -> list[Message | None]:
        """One message from every other rank, at its rank's place; own place is None.

        Raises: PeerError naming who died, stalled beyond the deadline, or is out of step.
        """
        if self._failure:
            raise self._failure
        buffers = self._receive_all()
        messages: list[Message | None] = [None] * self.world_size
        for peer, buffer in buffers.items():
            try:
                message = decode(buffer)
            except ValueError as error:
                raise self._fail((peer,), f"sent a malformed message: {error}") from error
            self._check_in_step(peer, header, message.header)
            messages[peer] = message
        return messages

    def abort(self, culprits: tuple[int, ...], reason: str) -> None:
        """Tell every other rank who is to blame; later calls here raise at once. Sends best-effort."""
        if self._failure:
            return
        self._failure = PeerError(culprits, reason)
        for peer in self.peers:
            self._send_abort(peer, culprits, reason)

    @abstractmethod
    def close(self) -> None:
        """Say goodbye and stop listening, within the deadline; idempotent."""

    @abstractmethod
    def _send(self, peer: int, buffer: Tensor) -> None: ...

    @abstractmethod
    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None: ...

    def accuse(self, peer: int, reason: str) -> PeerError:
        """The error to raise about a peer, after everyone else has been told."""
        return self._fail((peer,), reason)

    def _fail(self, culprits: tuple[int, ...], reason: str) -> PeerError:
        self.abort(culprits, reason)
        assert self._failure is not None
        return self._failure

    def _receive_all(self) -> dict[int, Tensor]:
        now = time.monotonic()
        expiry, grace = now + self.deadline_s * (1 - 2 * _GRACE), min(0.5, self.deadline_s * _GRACE)
        verdict_at = float("inf")
        buffers = {
            peer: self._waiting[peer].popleft() for peer in self.peers if self._waiting[peer]
        }
        while missing := tuple(peer for peer in self.peers if peer not in buffers):
            now = time.monotonic()
            lost = {peer: self._gone[peer] for peer in missing if peer in self._gone}
            if (lost or now >= expiry) and verdict_at == float("inf"):
                verdict_at = now + grace
            if now >= verdict_at:
                if lost:
                    raise self._fail(tuple(lost), next(iter(lost.values())))
                self.expiries += 1
                raise self._fail(missing, f"no answer within {self.deadline_s:g} s")
            try:
                frame = self._arrived.get(
                    timeout=min(expiry if now < expiry else verdict_at, verdict_at) - now
                )
            except queue.Empty:
                continue
            if frame.is_abort:
                raise self._fail(frame.blame, frame.reason)
            if frame.buffer is None:
                self._gone[frame.peer] = frame.reason
            elif frame.peer in buffers:
                if len(self._waiting[frame.peer]) >= _MAX_AHEAD:
                    raise self._fail((frame.peer,), f"ran ahead by over {_MAX_AHEAD} messages")
                self._waiting[frame.peer].append(frame.buffer)
            else:
                buffers[frame.peer] = frame.buffer
        return buffers

    def _check_in_step(self, peer: int, ours: Header, theirs: Header) -> None:
        for field in ("incarnation", "channel", "kind", "epoch", "tables"):
            mine, other = getattr(ours, field), getattr(theirs, field)
            if mine != other and field == "incarnation":
                raise self._fail(
                    (peer,), f"opened with another configuration than rank {self.rank}"
                )
            if mine != other:
                raise self._fail(
                    (peer,),
                    f"out of step with rank {self.rank}: {field} {other!r} instead of {mine!r}; "
                    "every rank issues the same steps, add_document and load_weights in one order",
                )


def _shares(columns: Sequence[Column], world_size: int) -> list[dict[str, Tensor]]:
    """Each rank's rows of each column that has any; the only host read of an exchange."""
    shares: list[dict[str, Tensor]] = [{} for _ in range(world_size)]
    if not columns:
        return shares
    counts = torch.stack([column.counts.long() for column in columns]).tolist()
    for column, per_rank in zip(columns, counts, strict=True):
        start = 0
        for rank, count in enumerate(per_rank):
            if count:
                rows = column.rows if column.pick is None else column.pick
                share = rows[start : start + count]
                shares[rank][column.name] = share if column.pick is None else column.rows[share]
            start += count
    return shares


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

    def _send(self, peer: int, buffer: Tensor) -> None:
        self._ends[peer]._arrived.put(Frame(self.rank, buffer))

    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None:
        self._ends[peer]._arrived.put(Frame(self.rank, None, reason, culprits))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for peer in self.peers:
                self._ends[peer]._arrived.put(Frame(self.rank, None, "closed its runtime"))
