"""Instances of several ranks: tensor-parallel lanes, each with a share of the query heads.

Lane i of an instance talks to lane i of the others, and to nobody else: a lane is a world of its own
whose ranks are the instances and whose layout has the lane's heads. Nothing deeper knows of lanes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from ...partition.head_split import Heads, lane_model
from ..config import RuntimeConfig
from ..errors import PeerError
from .base import Frame, Purpose, Sent, Transport
from .connect import connect
from .handshake import agree


class Joined(NamedTuple):
    """A rank's lane, and what its transport had counted when opening began."""

    config: RuntimeConfig
    transport: Transport
    sent_before: Sent


@contextmanager
def joined_lane(
    config: RuntimeConfig,
    transport: Transport | None,
    heads: tuple[int, int] | None,
    incarnation: int,
) -> Iterator[Joined]:
    """Join the lane of these heads; the others are informed of what is raised then, unless they know."""
    whole = transport or connect(config.deadline_s)
    lane, sent_before = whole, whole.counted()
    try:
        whole.begin(incarnation)
        its, lane = join_lane(config, whole, heads, owned=transport is None)
        if lane is not whole:  # it numbers receivers anew
            sent_before = sent_before._replace(bytes_to=Counter())
        yield Joined(its, lane, sent_before)
    except BaseException as error:
        if not isinstance(error, (PeerError, ValueError)):  # these are raised on every rank
            lane.abort((lane.rank,), f"raised {type(error).__name__}: {error}")
        if lane is not transport:
            lane.close()
        raise


def join_lane(
    config: RuntimeConfig, transport: Transport, heads: Heads | None, *, owned: bool
) -> tuple[RuntimeConfig, Transport]:
    """This rank's lane: the config with its heads alone, and the transport among its ranks.

    Without lanes that is what was given. All ranks of `transport` call this with the same config.

    Args:
        heads: (start, count) of this rank's query heads; None is all.
        owned: the lane closes `transport` when it is closed.
    Raises:
        ValueError on every rank alike, if the heads of all make no lanes (`lanes_of`), or make some
        that the layouts cannot be split into. PeerError as for `agree`.
    """
    total = max(layout.heads for layout in config.model.layers)
    match (0, total) if heads is None else heads:
        case (int(start), int(count)) if max(abs(start), abs(count)) < 2**31:
            own = (start, count)
        case _:
            raise ValueError(f"heads must be (start, count), two whole numbers, got {heads!r}")
    lanes = lanes_of(agree(config, transport, own), total)
    if len(lanes) == 1:
        return config, transport
    models = {lane: lane_model(config.model, *lane) for lane in lanes}
    branches = {lane: model.num_branches for lane, model in models.items()}
    if len(set(branches.values())) != 1:  # else their pools would fill at different times
        raise ValueError(
            f"lanes must keep equally many branches, by (start, count) of heads: {branches}"
        )
    lane = LaneTransport(transport, list(lanes.values()), owned=owned)
    return replace(config, model=models[own]), lane


def lanes_of(heads: Sequence[Heads], total: int) -> dict[Heads, list[int]]:
    """The ranks of each lane, given every rank's (start, count) of `total` heads.

    Ranks with the same heads are a lane; the i-th of every lane are instance i.

    Raises: ValueError unless lanes cover every head once, and every instance has a rank in each.
    """
    lanes: dict[Heads, list[int]] = {}
    for rank, (start, count) in enumerate(heads):
        if start < 0 or count < 1 or start + count > total:
            raise ValueError(
                f"rank {rank} has heads (start, count) = {(start, count)}, the model has {total}"
            )
        lanes.setdefault((start, count), []).append(rank)
    shares = ", ".join(f"{lane} on ranks {ranks}" for lane, ranks in sorted(lanes.items()))
    times = Counter(head for start, count in lanes for head in range(start, start + count))
    nowhere = [head for head in range(total) if not times[head]]
    twice = [head for head in range(total) if times[head] > 1]
    if nowhere or twice:
        wrong = [f"heads {nowhere} are in no lane"] if nowhere else []
        wrong += [f"heads {twice} in more than one"] if twice else []
        raise ValueError(
            f"lanes must cover each of {total} heads once: {', '.join(wrong)}; "
            f"heads (start, count) are {shares}"
        )
    if len({len(ranks) for ranks in lanes.values()}) != 1:
        raise ValueError(
            f"every instance needs a rank in each lane, lanes are of unequal size: {shares}"
        )
    return dict(sorted(lanes.items()))


def lane_number(transport: Transport) -> int:
    """Which lane a transport carries, in the order of their heads; 0 where there are none."""
    return transport.number if isinstance(transport, LaneTransport) else 0


class LaneTransport(Transport):
    """A rank's end of its lane, carried by a transport of all lanes: rank i is instance i.

    All lanes are informed of whatever ends a step early: an instance that lost one cannot go on.
    """

    def __init__(self, whole: Transport, lanes: Sequence[Sequence[int]], *, owned: bool) -> None:
        """`lanes`: the ranks of each, in the order of instances. `owned`: close `whole` as well."""
        self.number = next(at for at, ranks in enumerate(lanes) if whole.rank in ranks)
        self._ranks = list(lanes[self.number])
        super().__init__(
            rank=self._ranks.index(whole.rank),
            world_size=len(self._ranks),
            deadline_s=whole.deadline_s,
        )
        self._whole, self._owned = whole, owned
        self.bytes_sent, self.messages_sent, _ = whole.counted()
        self.incarnation, self.late = whole.incarnation, whole.late
        self._instance = {rank: at for ranks in lanes for at, rank in enumerate(ranks)}
        self._abort: Frame | None = None  # the abort that ended the step, as received
        self._not_ours: list[Frame] = []  # of ranks of other lanes that are further on already
        self._closed = False
        whole.divert(self)

    def abort(self, culprits: tuple[int, ...], reason: str) -> None:
        """As of any transport; every lane is informed."""
        if self._failure:
            return
        self._failure = PeerError(culprits, reason)
        abort = self._abort
        if abort is not None and self._instances(abort.blame) == culprits:
            self._whole.abort(abort.blame, abort.reason)
        else:
            self._whole.abort(self._of_lane(culprits), reason)

    def close(self) -> None:
        """Give the transport of all lanes back, or close it if it is owned; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._whole.suspects.update(self._of_lane(tuple(self.suspects)))
        self._whole.restore()
        if self._owned:
            self._whole.close()

    def _send(self, peer: int, buffer: Tensor, purpose: Purpose = Purpose.STEP) -> None:
        self._whole._send(self._ranks[peer], buffer, purpose)

    def _send_abort(self, peer: int, culprits: tuple[int, ...], reason: str) -> None:
        self._whole._send_abort(self._ranks[peer], self._of_lane(culprits), reason)

    # What the transport of all lanes hands over --------------------------------------------------

    def put(self, frame: Frame) -> None:
        """Take in what is of this lane, and who ends a step early in any."""
        instance = self._instance[frame.peer]
        if frame.is_abort:
            self._abort = self._abort or frame
            elsewhere = [rank for rank in frame.blame if rank not in self._ranks]
            where = f" (rank {elsewhere[0]} of all, in another lane)" if elsewhere else ""
            frame = frame._replace(
                blame=self._instances(frame.blame), reason=f"{frame.reason}{where}"
            )
        elif self._ranks[instance] != frame.peer:
            self._not_ours.append(frame)
            return
        self._deliver(frame._replace(peer=instance))

    def make_room(self, peer: int, num_bytes: int, timeout_s: float | None) -> bool:
        """As the inbox of this lane says; nobody of another lane is given room."""
        instance = self._instance[peer]
        return self._ranks[instance] == peer and self._make_room(
            instance, num_bytes, timeout_s, self.incarnation
        )

    def unread(self) -> list[Frame]:
        """What arrived for whoever uses the transport of all lanes next."""
        with self._handover:
            frames = self._drain()
        frames = [
            frame._replace(peer=self._ranks[frame.peer], blame=self._of_lane(frame.blame))
            for frame in frames
        ]
        return frames + self._not_ours

    def _of_lane(self, instances: tuple[int, ...]) -> tuple[int, ...]:
        """The ranks of these instances in this lane."""
        return tuple(self._ranks[instance] for instance in instances)

    def _instances(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({self._instance[rank] for rank in ranks}))
