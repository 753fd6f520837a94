"""What ranks compare when a world opens: who they are, and every field of their configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice

import torch

from .errors import PeerError
from .exchange import blaming, broadcast
from .messages import Message
from .world import World

MAX_TEXT_BYTES = 1 << 20
_SAID = 8  # differences that are told
_SHOWN = 60  # characters of a value


def agree(world: World) -> None:
    """Compare configurations; all ranks blame the same minority and say in what it differs.

    Raises: PeerError naming the ranks that are not who they should be, or whose configuration is not
    the commonest, on every rank.
    """
    ours = introduction(world.rank, world.world_size, world.config.described())
    header = replace(world.header("open", layer=0), incarnation=0)
    text = torch.frombuffer(bytearray(ours.encode()), dtype=torch.uint8)
    world.transport.post(header, [broadcast("config", text, world)])
    said = [
        ours.partition("\n")[2]
        if message is None
        else blaming(world, rank, partial(heard, rank=rank), message)
        for rank, message in enumerate(world.transport.collect(header))
    ]
    common = max(said, key=said.count)
    culprits = tuple(rank for rank, text in enumerate(said) if text != common)
    if culprits:
        reason = f"opened with another configuration: {difference(said[culprits[0]], common)}"
        world.transport.abort(culprits, reason)
        raise PeerError(culprits, reason)


def introduction(rank: int, world_size: int, described: list[str]) -> str:
    """A line `name=value` per fact; the first is the rank, in which ranks must differ."""
    return "\n".join([f"rank={rank}", f"world_size={world_size}", *described])


def heard(world: World, message: Message, *, rank: int) -> str:
    """What `rank` said of its configuration.

    Raises: ValueError if it is no such text, or of a rank other than the one at that place.
    """
    text = message.columns.get("config")
    if text is None or text.dtype != torch.uint8 or not 0 < text.numel() <= MAX_TEXT_BYTES:
        raise ValueError(f"its configuration is not a text of at most {MAX_TEXT_BYTES} bytes")
    who, _, config = text.numpy().tobytes().decode().partition("\n")
    if who != f"rank={rank}" or not config:
        raise ValueError(
            f"it says {who[:_SHOWN]!r}, its place in the agreed world of {world.world_size} is {rank}"
        )
    return config


def difference(theirs: str, usual: str) -> str:
    """The fields in which two configurations differ, with both values."""
    differences = list(islice(_differences(_fields(theirs), _fields(usual)), _SAID + 1))
    more = "; and more" if len(differences) > _SAID else ""
    return "; ".join(differences[:_SAID]) + more or "the same fields, in another order"


def _fields(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition("=") for line in text.splitlines())}


def _differences(theirs: Mapping[str, str], usual: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*theirs, *usual]):
        mine, other = theirs.get(name), usual.get(name)
        if mine != other:
            yield f"{_said(name, mine, other)} instead of {_said(name, other, mine)}"


def _said(name: str, value: str | None, other: str | None) -> str:
    """`name=value`; of a long value the part from where it differs."""
    if value is None:
        return f"no {name[:_SHOWN]}"
    start = 0
    if other is not None and len(value) > _SHOWN:
        same = next((at for at, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), 0)
        start = max(same - _SHOWN // 2, 0)
    cut = value[start : start + _SHOWN]
    return f"{name[:_SHOWN]}={'...' * (start > 0)}{cut}{'...' * (start + _SHOWN < len(value))}"
