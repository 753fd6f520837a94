"""What ranks compare when a world opens: who they are, and every field of their configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch

from ..config import RuntimeConfig
from ..errors import PeerError
from .base import Transport
from .messages import Header, Message
from .schema import check_columns

MAX_TEXT_BYTES = 1 << 20
_MOST_SHOWN = 8  # differences that an error names
_SHOWN = 60  # characters of a value


def agree(
    config: RuntimeConfig, transport: Transport, heads: tuple[int, int]
) -> list[tuple[int, int]]:
    """Compare configurations; all ranks blame the same minority and say in what it differs.

    Returns: the heads (start, count) of each rank, in which ranks may differ.
    Raises: PeerError naming the ranks that are not who they should be, or whose configuration is not
    the commonest, on every rank.
    """
    facts = [f"incarnation={transport.incarnation}", *config.described()]
    ours = introduction(transport.rank, transport.world_size, facts)
    header = Header(kind="open", incarnation=0, channel=0, epoch=0, tables=0)
    text = torch.frombuffer(bytearray(ours.encode()), dtype=torch.uint8)
    columns = {"config": text, "heads": torch.tensor(heads, dtype=torch.int32)}
    transport.post_shares(header, [columns] * transport.world_size)
    messages = transport.collect(header)
    texts = [ours.partition("\n")[2]] * transport.world_size
    for rank, message in enumerate(messages):
        if message is not None:
            with transport.blaming(rank):
                check_columns(message, payload=config.dtype, compute=config.dtype)
                texts[rank] = received(transport, message, rank=rank)
    common = max(texts, key=texts.count)
    culprits = tuple(rank for rank, text in enumerate(texts) if text != common)
    if culprits:
        reason = f"opened with another configuration: {difference(texts[culprits[0]], common)}"
        transport.abort(culprits, reason)
        raise PeerError(culprits, reason)
    heads_of = [heads] * transport.world_size
    for rank, message in enumerate(messages):
        if message is not None:
            with transport.blaming(rank):
                heads_of[rank] = _heads(message)
    return heads_of


def _heads(message: Message) -> tuple[int, int]:
    heads = message.columns.get("heads")
    if heads is None or heads.dtype != torch.int32 or heads.shape != (2,):
        raise ValueError("heads must be (start, count)")
    start, count = heads.tolist()
    return start, count


def introduction(rank: int, world_size: int, described: list[str]) -> str:
    """A line `name=value` per fact; the first is the rank, in which ranks must differ."""
    return "\n".join([f"rank={rank}", f"world_size={world_size}", *described])


def received(transport: Transport, message: Message, *, rank: int) -> str:
    """What `rank` sent of its configuration.

    Raises: ValueError if it is no such text, or of a rank other than the one at that place.
    """
    text = message.columns.get("config")
    if text is None or text.dtype != torch.uint8 or not 0 < text.numel() <= MAX_TEXT_BYTES:
        raise ValueError(f"its configuration is not a text of at most {MAX_TEXT_BYTES} bytes")
    who, _, config = text.numpy().tobytes().decode().partition("\n")
    if who != f"rank={rank}" or not config:
        raise ValueError(
            f"it says {who[:_SHOWN]!r}, its place in the agreed world of {transport.world_size} is {rank}"
        )
    return config


def difference(theirs: str, usual: str) -> str:
    """The fields in which two configurations differ, with both values."""
    differences = list(islice(_differences(_fields(theirs), _fields(usual)), _MOST_SHOWN + 1))
    more = "; and more" if len(differences) > _MOST_SHOWN else ""
    return "; ".join(differences[:_MOST_SHOWN]) + more or "the same fields, in another order"


def _fields(text: str) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition("=") for line in text.splitlines())}


def _differences(theirs: Mapping[str, str], usual: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*theirs, *usual]):
        mine, other = theirs.get(name), usual.get(name)
        if mine != other:
            yield f"{_shown(name, mine, other)} instead of {_shown(name, other, mine)}"


def _shown(name: str, value: str | None, other: str | None) -> str:
    """`name=value`; of a long value the part from where it differs."""
    if value is None:
        return f"no {name[:_SHOWN]}"
    start = 0
    if other is not None and len(value) > _SHOWN:
        same = next((at for at, (a, b) in enumerate(zip(value, other, strict=False)) if a != b), 0)
        start = max(same - _SHOWN // 2, 0)
    cut = value[start : start + _SHOWN]
    return f"{name[:_SHOWN]}={'...' * (start > 0)}{cut}{'...' * (start + _SHOWN < len(value))}"
