"""Service: a thread that answers whoever asks, and the exchange of an engine with such threads.

Three kinds of threads, and what each of them owns:

* the engine's thread (whoever calls the runtime): plan, leases, statistics, own requests, epochs;
* the server (one): what it counts in `Stats.served`, and the last epoch of every source;
* the carriers (a listener per peer over gloo, the sending threads over loopback): nothing.

They meet in three places. The inbox has a lock. The pool may be read by all at any time, and its
changes exclude each other (`BlockStore`). The tables (directory, weights) do not change during a
service. The server waits for nobody: silence of a peer is the peer's own fault, and is named as such.

Ranks part like this: DONE says "I ask you no more", after the last request. LEAVE also says "ask me
no more": who closes its service says it to all, answers what was asked before, and has parted from a
peer that has sent LEAVE too. It is sent once to each, and returned by a rank that serves on.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..ambient import isolated
from ..errors import BlocksLostError, PeerError
from ..exchanger import Answer
from ..lockstep import begin_service, step
from ..transport.base import Column, Frame, Purpose, deal
from ..transport.messages import Header, Message, decode
from ..transport.schema import REFUSED
from ..world import World
from .inbox import MAX_OWED, Inbox

T = TypeVar("T")
Answers = Mapping[str, Answer]  # by the kind of request

SERVICE_CHANNEL = 1  # steps of the whole world are channel 0
_MAX_REASON_BYTES = 2000


def start_service(world: World, answers: Answers, *, max_requests: int, max_bytes: int) -> Service:
    """The world's service, begun by all ranks in one step with equal tables.

    Args: answers: what is answered to each kind of request.
    Raises: RuntimeError if this rank serves already; PeerError naming who died, stalled, or has other
    tables.
    """
    if isinstance(world.exchanger, Service):
        raise RuntimeError("this rank serves already")
    with step(world):
        begin_service(world)
        return Service(world, answers, max_requests=max_requests, max_bytes=max_bytes)


class _Silence(NamedTuple):
    """Since when a request waits that a peer did not answer (monotonic), and how long it waited."""

    since: float
    waited_s: float


class _Wait(NamedTuple):
    """How long peers are waited for (monotonic times): `replaceable` ones until `replaced_at`."""

    replaced_at: float
    expiry: float
    replaceable: set[int]

    @classmethod
    def begin(cls, expiry: float, asked: Sequence[int], replaceable: Tensor | None) -> _Wait:
        left_s = max(expiry - time.monotonic(), 0.0)
        spare = set() if replaceable is None else {peer for peer in asked if replaceable[peer]}
        return cls(expiry - left_s / 2, expiry, spare)


@isolated
class Service:
    """Made by `Runtime.serve`; closed by `close`, at the end of a `with`, or with its runtime."""

    def __init__(
        self, world: World, answers: Answers, *, max_requests: int, max_bytes: int
    ) -> None:
        self._world, self._answers = world, answers
        self._transport = world.transport  # the server never sends through a later one
        self._inbox = Inbox(
            rank=world.rank,
            world_size=world.world_size,
            max_requests=max_requests,
            max_bytes=max_bytes,
        )
        self._epoch = 0
        self._owed = [0] * world.world_size  # answers that this rank's requests still wait for
        self._silent: dict[int, _Silence] = {}  # those that did not answer in time
        self._expiry = 0.0  # of the attempt under way
        self._asked: set[int] = set()  # by its last exchange
        self._engine = threading.Lock()
        self._last_epochs = [0] * world.world_size  # last epoch of each source
        self._broken: BaseException | None = None
        self._finished = self._closed = False
        self._absent: tuple[int, ...] | None = None  # once it has left: who did not part in time
        self._server = threading.Thread(target=self._serve, name="qroam-server", daemon=True)
        world.transport.divert(self._inbox)
        self._between = world.ask_by(self)  # of the steps before and after this service
        self._server.start()
        atexit.register(self.close)  # before the transport's: a thread inside torch aborts the exit

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        with suppress(PeerError):  # the first error is the one to raise
            self.close()

    # The engine's thread -------------------------------------------------------------------------

    def attempt(self, ask: Callable[[], T]) -> T:
        """The result of `ask()`, which plans and makes an exchange; done again, within the same deadline,
        as long as that fails and somebody who was asked is known to be gone or silent by then.

        Raises:
            BlocksLostError if there is nobody else to ask. PeerError as `exchange`.
            RuntimeError if another thread of this rank is asking.
        """
        if not self._engine.acquire(blocking=False):
            raise RuntimeError("one thread of a rank attends or selects at a time")
        try:
            self._check_whole()
            if self._finished:
                raise RuntimeError("this rank has sent DONE or LEAVE: it asks no more")
            self._expiry = time.monotonic() + self._world.transport.deadline_s
            self._asked = set()
            while True:
                try:
                    return ask()
                except BlocksLostError:
                    raise
                except PeerError:
                    met = self._asked & self.unreachable().keys()
                    if not met or time.monotonic() >= self._expiry:
                        raise
                    self._world.stats.failures["failover"] += 1
        finally:
            self._engine.release()

    def exchange(
        self,
        header: Header,
        columns: Sequence[Column],
        answer: Answer,
        own_work: Callable[[], T],
        replaceable: Callable[[], Tensor] | None = None,
    ) -> tuple[T, list[Message | None]]:
        """Ask the holders of whom something is wanted, do own work; returns its result and the
        answers, at their ranks' places. Only inside of `attempt`.

        Args:
            answer: not used: the server answers whoever asks.
            replaceable: computes (W,) bool, holders that are waited for only half of the time that is
                left, because others can be asked instead; None: nobody is.
        Raises:
            PeerError within the deadline, naming who is lost, silent, refuses or answers wrongly.
            Who was silent is not to be asked until the late answer comes.
        """
        try:
            spare = None if replaceable is None else replaceable()
            return self._exchange(header, columns, own_work, spare)
        finally:
            for peer in self._inbox.end():
                self._send_goodbye(Purpose.LEAVE, peer)

    def recipients(self, wanted: Callable[[], Tensor]) -> Tensor:
        """Those that are concerned."""
        return wanted()

    def settle(self, header: Header, columns: Sequence[Column] = ()) -> list[Message | None]:
        """Whoever is written to confirms it; what others write comes any time."""
        self.exchange(header, columns, _nothing, lambda: None)
        return [None] * self._world.world_size

    def check_tables_may_change(self) -> None:
        """Raises: RuntimeError: no step of the whole world is taken, and tables stay as they are."""
        raise RuntimeError(
            "documents are changed, copied, saved and verified, and weights loaded, between "
            "services: close the service on every rank"
        )

    def unreachable(self) -> dict[int, PeerError]:
        """The peers that would be asked in vain, and why; those that are silent until they answer.
        In the engine's thread, between exchanges.
        """
        for peer in self._inbox.drop_answers(list(self._silent)):
            self._answer_arrived(peer)
        now = time.monotonic()
        silent = {
            peer: PeerError(
                (peer,),
                f"no answer within {silence.waited_s:.3g} s, to a request of "
                f"{now - silence.since:.1f} s ago",
            )
            for peer, silence in self._silent.items()
        }
        return silent | self._inbox.gone()

    def wait(self, timeout_s: float) -> bool:
        """Ask no more, and serve until every other rank asks no more (in `wait` or `close`) or is
        lost; False if that takes longer.
        """
        self._check_whole()
        self._finished = True
        for peer in self._inbox.announce(Purpose.DONE):
            self._send_goodbye(Purpose.DONE, peer)
        missing = self._inbox.wait_served(self._world.transport.peers, Purpose.DONE, timeout_s)
        self._check_whole()
        return not missing

    def lost(self) -> dict[int, str]:
        """The peers that are gone, and why; `Runtime.lost_blocks` says what only they had."""
        return {peer: str(error) for peer, error in sorted(self._inbox.lost().items())}

    def close(self) -> None:
        """Leave: ask no more, answer what the others have asked so far, and part from them; idempotent.

        Whoever asks this rank from then on gets a PeerError; `wait` first to serve all to the end.
        Ends within the deadline. Afterwards the ranks can step together again.

        Raises:
            PeerError naming the peers that did not part in time, unless they were named before.
            RuntimeError if the server broke; or if it does not end, and then the service stays until it
            is closed again.
        """
        if self._closed:
            return
        atexit.unregister(self.close)
        transport, deadline_s = self._transport, self._transport.deadline_s
        expiry = time.monotonic() + deadline_s
        if self._absent is None:
            self._absent = self._leave(expiry)
        self._server.join(max(expiry - time.monotonic(), 1.0))
        transport.suspects.update(self._absent, self._silent, self._inbox.lost())
        if self._server.is_alive():  # it may still write and speak, so nothing else may begin
            raise RuntimeError(
                "the server is still at a request; no more are answered after it: close again"
            )
        self._closed = True
        self._world.ask_by(self._between)
        transport.restore()
        self._check_whole()
        if self._absent:
            raise PeerError(self._absent, f"did not part within {deadline_s:g} s")

    def _leave(self, expiry: float) -> tuple[int, ...]:
        """Part from all, and stop the server after what it is at; returns who did not part in time."""
        self._finished = True
        for peer in self._inbox.announce(Purpose.LEAVE):
            self._send_goodbye(Purpose.LEAVE, peer)
        self._take_late_answers(expiry)
        expected = [peer for peer in self._transport.peers if peer not in self._silent]
        patience_s = max(expiry - time.monotonic(), 0.0)
        absent = self._inbox.wait_served(expected, Purpose.LEAVE, patience_s)
        self._inbox.stop()
        return absent

    def _exchange(
        self,
        header: Header,
        columns: Sequence[Column],
        own_work: Callable[[], T],
        replaceable: Tensor | None,
    ) -> tuple[T, list[Message | None]]:
        world, stats = self._world, self._world.stats
        with stats.phase("send"):
            staged = world.writes.staged_at(header.layer)
            pushes = world.writes.drain(header.layer, not_to=self.unreachable())
            shares = deal([*columns, *pushes], world.world_size)
            asked = [peer for peer in world.transport.peers if shares[peer]]
            self._asked = set(asked)
            self._epoch += 1
            header = replace(header, channel=SERVICE_CHANNEL, epoch=self._epoch)
            wait = _Wait.begin(self._expiry, asked, replaceable)
            try:
                self._begin(asked, wait)
            except PeerError:  # nobody was asked, so nobody has what was written here
                world.writes.put_back(header.layer, staged)
                raise
            for peer in asked:
                world.transport.send(peer, header, shares[peer], Purpose.ASK)
                self._owed[peer] += 1
        with stats.phase("attend own"):
            own = own_work()
        with stats.phase("wait"):
            return own, self._collect(header, set(asked), wait)

    def _begin(self, asked: Sequence[int], wait: _Wait) -> None:
        """Let no peer owe more than it may: an exchange that failed because of somebody else has left
        answers under way."""
        for peer in self._inbox.begin(asked):
            self._answer_arrived(peer)
        while pressed := {peer for peer in asked if self._owed[peer] >= MAX_OWED}:
            self._answer_arrived(self._next_answer(pressed, wait)[0])

    def _collect(self, header: Header, missing: set[int], wait: _Wait) -> list[Message | None]:
        answers: list[Message | None] = [None] * self._world.world_size
        while missing:
            peer, buffer = self._next_answer(missing, wait)
            self._answer_arrived(peer)
            message = self._read_answer(peer, header, buffer)
            if message is not None:
                answers[peer] = message
                missing.remove(peer)
        return answers

    def _next_answer(self, missing: set[int], wait: _Wait) -> tuple[int, Tensor]:
        """The next answer of a peer in `missing`; those that are silent for too long are noted."""
        replaceable = missing & wait.replaceable
        until = wait.replaced_at if replaceable else wait.expiry
        arrived = self._inbox.next_answer(missing, until)
        if arrived is not None:
            return arrived
        silent = replaceable or missing
        since = wait.expiry - self._world.transport.deadline_s
        waited_s = until - since
        self._silent |= dict.fromkeys(silent, _Silence(since, waited_s))
        self._world.transport.suspects.update(silent)
        self._world.transport.expiries += 1
        raise PeerError(tuple(sorted(silent)), f"no answer within {waited_s:.3g} s")

    def _take_late_answers(self, expiry: float) -> None:
        """Let what is still owed arrive here, so that no later step meets it."""
        while True:
            lost = self._inbox.lost()
            owing = {p for p, owed in enumerate(self._owed) if owed and p not in self._silent}
            owing -= lost.keys()
            try:
                arrived = self._inbox.next_answer(owing, expiry) if owing else None
            except PeerError:
                continue  # one more is lost
            if arrived is None:
                return
            self._answer_arrived(arrived[0])

    def _read_answer(self, peer: int, header: Header, buffer: Tensor) -> Message | None:
        """The answer to this exchange; None if it is a late one to an earlier."""
        try:
            message = decode(buffer)
        except ValueError as error:
            raise PeerError((peer,), f"sent a malformed answer: {error}") from error
        theirs = message.header
        if theirs.epoch < header.epoch:
            return None
        if theirs == replace(header, kind=REFUSED):
            reason = message.columns.get("reason", torch.empty(0, dtype=torch.uint8))
            raise PeerError((peer,), f"refused what rank {self._world.rank} asked: {_text(reason)}")
        if theirs != replace(header, kind=f"{header.kind}-answer"):
            raise PeerError((peer,), f"answered {header.kind!r} with another header: {theirs}")
        try:
            self._world.check_columns(message)
        except ValueError as error:
            raise PeerError((peer,), f"sent an invalid message: {error}") from error
        return message

    def _answer_arrived(self, peer: int) -> None:
        self._owed[peer] -= 1
        if self._owed[peer] <= 0:
            self._owed[peer] = 0
            self._silent.pop(peer, None)
            self._world.transport.suspects.discard(peer)

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise RuntimeError(f"the server broke: {self._broken}") from self._broken

    # The server's thread -------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            with torch.inference_mode():
                while (frame := self._inbox.next_request()) is not None:
                    self._handle(frame)
        except (
            BaseException
        ) as error:  # those who wait learn of it, and the engine's next call raises it
            self._broken = error
            reason = f"its server raised {type(error).__name__}: {error}"
            self._transport.abort((self._transport.rank,), reason)
            self._inbox.stop()

    def _handle(self, frame: Frame) -> None:
        peer = frame.peer
        if frame.buffer is None:
            self._transport.part(peer, frame.reason)
        elif frame.purpose is not Purpose.ASK:
            if self._inbox.part(peer, frame.purpose):
                self._send_goodbye(Purpose.LEAVE, peer)
        else:
            self._answer(peer, frame.buffer)

    def _answer(self, peer: int, buffer: Tensor) -> None:
        start, served = time.perf_counter(), self._world.stats.served
        try:
            message = decode(buffer)
        except ValueError as error:
            self._inbox.expel(peer, f"sent a malformed request: {error}")
            return
        header = message.header
        columns: Mapping[str, Tensor]
        try:
            columns = self._work(peer, message)
            reply = replace(header, kind=f"{header.kind}-answer")
            served.answered[peer] += 1
        except ValueError as error:
            reason = str(error).encode()[:_MAX_REASON_BYTES]
            columns = {"reason": torch.frombuffer(bytearray(reason), dtype=torch.uint8)}
            reply = replace(header, kind=REFUSED)
            served.refused[peer] += 1
        served.busy_s += time.perf_counter() - start
        served.most_requests = max(served.most_requests, self._inbox.most_requests)
        served.most_bytes = max(served.most_bytes, self._inbox.most_bytes)
        # Before the answer: whoever has it may ask again at once.
        self._inbox.answered(peer)
        self._transport.send(peer, reply, columns, Purpose.ANSWER)

    def _work(self, peer: int, message: Message) -> Mapping[str, Tensor]:
        """Check who asks and do what is asked; ValueError says why it is refused."""
        world, header = self._world, message.header
        ours = world.header(header.kind, layer=header.layer)
        if header.incarnation != ours.incarnation:
            raise ValueError("it was opened with another configuration, or in another incarnation")
        if header.tables != ours.tables:
            raise ValueError(
                f"its tables are {header.tables}, here {ours.tables}; every rank changes documents "
                "and loads weights in one order"
            )
        if header.channel != SERVICE_CHANNEL or header.kind not in self._answers:
            raise ValueError(f"no service answers {header.kind!r} on channel {header.channel}")
        if header.epoch <= self._last_epochs[peer]:
            raise ValueError(f"epoch {header.epoch} comes after epoch {self._last_epochs[peer]}")
        self._last_epochs[peer] = header.epoch
        world.check_columns(message)
        if self._inbox.stopped:
            raise ValueError("it came when this rank had closed its service")
        world.writes.apply(message)
        return self._answers[header.kind](message)

    # Either thread -------------------------------------------------------------------------------

    def _send_goodbye(self, purpose: Purpose, peer: int) -> None:
        header = self._world.header(purpose.name.lower(), layer=0)
        with suppress(PeerError):  # of a transport that failed: all know already
            self._transport.send(peer, replace(header, channel=SERVICE_CHANNEL), {}, purpose)


def _nothing(_message: Message) -> Mapping[str, Tensor]:
    return {}


def _text(raw: Tensor) -> str:
    return (
        raw.flatten()
        .view(torch.uint8)
        .numpy()
        .tobytes()[:_MAX_REASON_BYTES]
        .decode(errors="replace")
    )
