"""Moving columns between ranks: the contract that `loopback.py` and `gloo.py` fulfil.

An exchange is one `post` (a message to every other rank, empty or not) and one `collect` (a message
from each). Messages of a pair of ranks arrive in order. A wait ends at the deadline; whoever notices
a culprit informs the others before it raises, so that every waiting rank names the same one.

In service (`service.py`) messages pass between two ranks instead, and go to an inbox from `divert`
to `restore`. What arrives belongs to the step or to the inbox, never to both.
"""

from __future__ import annotations

import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import PeerError
from .messages import MAX_FIELD, Header, Message, decode, encode

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


class Purpose(IntEnum):
    """What a message belongs to: a step of the whole world, or service between two ranks.

    DONE: its sender asks the receiver no more. LEAVE: nor is it to be asked. Values are on the wire.
    """

    STEP = 0
    ASK = 3
    ANSWER = 4
    DONE = 5
    LEAVE = 6


class Frame(NamedTuple):
    """What a carrier delivers from `peer`: a message; that it is gone; or an abort that blames ranks.

    `has_room`: the inbox gave this request room before it was received. `incarnation`: in which its
    sender was; None for what the carrier here knows by itself.
    """

    peer: int
    buffer: Tensor | None
    reason: str = ""
    blame: tuple[int, ...] = ()
    purpose: Purpose = Purpose.STEP
    has_room: bool = False
    incarnation: int | None = None

    @property
    def is_abort(self) -> bool:
        return bool(self.blame)


class Receiver(Protocol):
    """Where everything that arrives goes during service; called by the carrier's threads."""

    def put(self, frame: Frame) -> None: ...

    def make_room(self, peer: int, num_bytes: int, timeout_s: float | None) -> bool:
        """Wait until a request of that size may be received; False if it never was promised room."""
        ...

    def unread(self) -> Sequence[Frame]:
        """What arrived for the steps that follow."""
        ...


class Sent(NamedTuple):
    """What was handed to the carrier: bytes and messages by kind, bytes by receiver."""

    bytes: Counter[str]
    messages: Counter[str]
    bytes_to: Counter[int]


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
        self.bytes_to: Counter[int] = Counter()
        self.expiries = 0  # waits that ended at the deadline
        self.incarnation = 0  # of the world; frames of a former one are dropped
        self.late: Counter[int] = Counter()  # messages of former incarnations, by their sender
        self._arrived: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self._waiting: list[deque[Frame]] = [deque() for _ in range(world_size)]
        self._gone: dict[int, str] = {}
        self._failure: PeerError | None = None
        self.suspects: set[int] = set()  # named in service: `close` does not wait for them
        self._inbox: Receiver | None = None
        self._handover = threading.Lock()  # a frame goes to the step's queue or to the inbox
        self._counting = threading.Lock()  # engine and server send at the same time

    @property
    def peers(self) -> list[int]:
        return [peer for peer in range(self.world_size) if peer != self.rank]

    def post(self, header: Header, columns: Sequence[Column] = ()) -> None:
        """Send every other rank its share of the columns; counts are read to the host once, here."""
        if self.peers:
            self.post_shares(header, deal(columns, self.world_size))

    def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
        """Send every other rank its own columns, `shares` in rank order."""
        if self._failure:
            raise self._failure
        for peer in self.peers:
            buffer = encode(header, shares[peer])
            self._send(peer, buffer)
            self._count(peer, header.kind, len(buffer))

    def send(
        self, peer: int, header: Header, columns: Mapping[str, Tensor], purpose: Purpose
    ) -> None:
        """Send one rank a message of its own; from any thread."""
        if self._failure:
            raise self._failure
        buffer = encode(header, columns)
        self._send(peer, buffer, purpose)
        self._count(peer, header.kind, len(buffer))

    def counted(self) -> Sent:
        """What was sent so far, a copy."""
        with self._counting:
            return Sent(
                Counter(self.bytes_sent), Counter(self.messages_sent), Counter(self.bytes_to)
            )

    def begin(self, incarnation: int) -> None:
        """Send and receive in this incarnation of the world from now on.

        Raises: ValueError if it is a former one.
        """
        if not isinstance(incarnation, int) or not self.incarnation <= incarnation < MAX_FIELD:
            raise ValueError(
                f"incarnation must be a whole number of at least {self.incarnation}, the last one, "
                f"got {incarnation!r}"
            )
        self.incarnation = incarnation

    def divert(self, inbox: Receiver) -> None:
        """Give `inbox` what arrives from now on, and what arrived already."""
        if self._failure:
            raise self._failure
        with self._handover:
            for frame in self._drain():
                inbox.put(frame)
            self._inbox = inbox

    def restore(self) -> None:
        """Give the steps what arrives from now on, and what the inbox holds for them."""
        with self._handover:
            frames = self._inbox.unread() if self._inbox else ()
            self._inbox = None
            for frame in frames:
                self._arrived.put(frame)

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
        self.give_up(culprits, reason)
        for peer in self.peers:
            self._send_abort(peer, culprits, reason)

    def part(self, peer: int, reason: str) -> None:
        """Tell one peer that nothing more comes from here, and that it is to blame; best-effort."""
        self._send_abort(peer, (peer,), reason)

    def give_up(self, culprits: tuple[int, ...], reason: str) -> None:
        """Later calls here raise at once; for what every rank knows by itself."""
        self._failure = self._failure or PeerError(culprits, reason)

    @abstractmethod
    def close(self) -> None:
        """Send a goodbye and stop listening, within the deadline; idempotent."""

    @abstractmethod
    def _send(self, peer: int, buffer: Tensor, purpose: Purpose = Purpose.STEP) -> None: ...

    @abstractmethod
    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None: ...

    def accuse(self, peer: int, reason: str) -> PeerError:
        """The error to raise about a peer, after all others were informed.

        In service the others are not informed: whoever waits for that peer finds out as directly.
        """
        if self._inbox is not None:
            return PeerError((peer,), reason)
        return self._fail((peer,), reason)

    @contextmanager
    def blaming(self, peer: int) -> Iterator[None]:
        """Reading what `peer` sent: a ValueError in here is its fault, and names it."""
        try:
            yield
        except ValueError as error:
            raise self.accuse(peer, f"sent an invalid message: {error}") from error

    def _deliver(self, frame: Frame) -> None:
        """Hand over what arrived; called by carriers."""
        with self._handover:
            if self._is_late(frame):
                return
            if self._inbox is None:
                self._arrived.put(frame)
            else:
                self._inbox.put(frame)

    def _is_late(self, frame: Frame) -> bool:
        """Whether it is of a former incarnation; such a frame is counted, and is to be dropped."""
        late = frame.incarnation is not None and frame.incarnation < self.incarnation
        if late:
            self.late[frame.peer] += 1
        return late

    def _drain(self) -> list[Frame]:
        """What arrived and was not collected, and who is gone; under `_handover`."""
        frames = [frame for waiting in self._waiting for frame in waiting]
        while not self._arrived.empty():
            frames.append(self._arrived.get_nowait())
        frames = [frame for frame in frames if not self._is_late(frame)]
        for waiting in self._waiting:
            waiting.clear()
        return frames + [Frame(peer, None, reason) for peer, reason in self._gone.items()]

    def _make_room(
        self, peer: int, num_bytes: int, timeout_s: float | None, incarnation: int
    ) -> bool:
        """Hold back a request until there is room for it; outside service nothing is held back, and
        a frame of a former incarnation needs no room."""
        inbox = self._inbox
        if inbox is None or incarnation < self.incarnation:
            return False
        return inbox.make_room(peer, num_bytes, timeout_s)

    def _count(self, peer: int, kind: str, num_bytes: int) -> None:
        with self._counting:
            self.bytes_sent[kind] += num_bytes
            self.messages_sent[kind] += 1
            self.bytes_to[peer] += num_bytes

    def _fail(self, culprits: tuple[int, ...], reason: str) -> PeerError:
        self.abort(culprits, reason)
        assert self._failure is not None
        return self._failure

    def _receive_all(self) -> dict[int, Tensor]:
        now = time.monotonic()
        expiry, grace = now + self.deadline_s * (1 - 2 * _GRACE), min(0.5, self.deadline_s * _GRACE)
        verdict_at = float("inf")
        buffers: dict[int, Tensor] = {}
        for peer in self.peers:
            if self._waiting[peer]:
                buffer = self._waiting[peer].popleft().buffer
                assert buffer is not None
                buffers[peer] = buffer
        while missing := tuple(peer for peer in self.peers if peer not in buffers):
            now = time.monotonic()
            lost = {peer: self._gone[peer] for peer in missing if peer in self._gone}
            if (lost or now >= expiry) and verdict_at == float("inf"):
                verdict_at = now + grace
            if now >= verdict_at:
                if lost:
                    raise self._fail(tuple(lost), next(iter(lost.values())))
                self.expiries += 1
                late = sum(self.late[peer] for peer in missing)
                former = f"; {late} messages of a former incarnation were refused" if late else ""
                raise self._fail(missing, f"no answer within {self.deadline_s:g} s{former}")
            try:
                frame = self._arrived.get(
                    timeout=min(expiry if now < expiry else verdict_at, verdict_at) - now
                )
            except queue.Empty:
                continue
            if self._is_late(frame):
                continue
            if frame.incarnation is not None and frame.incarnation > self.incarnation:
                raise self._fail(
                    (frame.peer,),
                    f"is in incarnation {frame.incarnation} of the world, rank {self.rank} in "
                    f"{self.incarnation}",
                )
            if frame.is_abort:
                raise self._fail(frame.blame, frame.reason)
            if frame.buffer is None:
                self._gone[frame.peer] = frame.reason
            elif frame.peer in buffers:
                if len(self._waiting[frame.peer]) >= _MAX_AHEAD:
                    raise self._fail((frame.peer,), f"ran ahead by over {_MAX_AHEAD} messages")
                self._waiting[frame.peer].append(frame)
            else:
                buffers[frame.peer] = frame.buffer
        return buffers

    def _check_in_step(self, peer: int, ours: Header, theirs: Header) -> None:
        for field in ("incarnation", "channel", "kind", "epoch", "tables"):
            mine, other = getattr(ours, field), getattr(theirs, field)
            if mine != other and field == "incarnation":
                raise self._fail(
                    (peer,),
                    f"opened with another configuration, or incarnation, than rank {self.rank}",
                )
            if mine != other:
                raise self._fail(
                    (peer,),
                    f"out of step with rank {self.rank}: {field} {other!r} instead of {mine!r}; "
                    "every rank issues the same steps, add_document and load_weights in one order",
                )


def deal(columns: Sequence[Column], world_size: int) -> list[dict[str, Tensor]]:
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
