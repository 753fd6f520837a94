"""Long work of all ranks inside a step: everyone waits for everyone, each wait within the deadline.

Reading or writing a corpus takes longer than a rank may be silent. So the work runs in a thread, and
meanwhile the ranks exchange how far they are, in rounds that are shorter than the deadline: a rank
that dies is named as in any step, and all learn in the same round which rank failed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from threading import Thread
from typing import TypeVar

from torch import Tensor

from ..errors import SnapshotError
from ..lockstep import broadcast, settle
from ..transport.messages import bytes_of, text
from ..world import World

T = TypeVar("T")

_ROUND = 0.25  # of the deadline
_WORKING, _DONE = b"", b"\0"
_MAX_REASON_BYTES = 4096


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """`work()` in a thread that does not keep the process alive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    Thread(target=run, daemon=True, name=name).start()
    return future


def done(result: T) -> Future[T]:
    """Work that is over."""
    future: Future[T] = Future()
    future.set_result(result)
    return future


def send_staged(world: World, kind: str) -> None:
    """Hand over all writes that were staged for copies elsewhere, and take those of the others."""
    for layer in range(len(world.config.model.layers)):
        settle(world, world.header(kind, layer=layer))


def share(world: World, kind: str, columns: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
    """Send the same columns to everyone; returns everyone's, own ones included, by rank."""
    sent = [broadcast(name, rows, world) for name, rows in columns.items()]
    received = settle(world, world.header(kind, layer=0), sent)
    return [columns if message is None else message.columns for message in received]


def raise_failures(what: str, reasons: list[bytes]) -> None:
    """Raise SnapshotError with the reasons of the ranks (by rank) that have one."""
    failed = [
        f"rank {rank}: {reason.decode(errors='replace')[:_MAX_REASON_BYTES]}"
        for rank, reason in enumerate(reasons)
        if reason
    ]
    if failed:
        raise SnapshotError(f"{what}: {'; '.join(failed)}")


def together(world: World, kind: str, what: str, work: Future[T]) -> T:
    """The result of this rank's work, once every rank's is over.

    Raises: SnapshotError on every rank if a file or disk failed on some; PeerError as any step.
    """
    while True:
        wait([work], timeout=world.config.deadline_s * _ROUND)
        states = [
            bytes_of(columns, "state") for columns in share(world, kind, {"state": _state(work)})
        ]
        if _WORKING not in states:
            break
    raise_failures(what, [b"" if state == _DONE else state for state in states])
    return work.result()


def _state(work: Future[T]) -> Tensor:
    if not work.done():
        return text(_WORKING)
    error = work.exception()
    if error is None:
        return text(_DONE)
    if not isinstance(error, (ValueError, OSError)):
        raise error
    return text(str(error).encode()[:_MAX_REASON_BYTES] or b"failed")
