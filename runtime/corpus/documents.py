"""Documents: added, published out of a request, made room for.

What changes the directory is decided by every rank alike, from the directory and from what all ranks
sent in one exchange; so it is refused on all ranks or on none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...partition.bounds import MAX_POSITION, MAX_TOKENS, whole
from ...partition.directory import Directory, Document, with_document
from ...partition.eviction import Policy, Use, evicted, ranked
from ...partition.placement import place, place_at
from ...partition.prefix_hash import CONTENT_BYTES, block_hashes, split_contents
from ..config import RuntimeConfig
from ..lockstep import broadcast, settle
from ..scope import Request
from ..transport.messages import Message
from ..validate import check_name
from ..world import World


class NewDocument(NamedTuple):
    """A document to be added: its tokens and first position, whose quota it counts for, and the content
    hashes of its full blocks, none if they are not known."""

    name: str
    tokens: int
    position: int
    group: str
    hashes: tuple[bytes, ...]


def content(
    config: RuntimeConfig,
    name: str,
    tokens: int | None,
    token_ids: Sequence[int] | Tensor | None,
    salt: str | None,
    position: int,
    group: str,
) -> NewDocument:
    """A document to be added, with its blocks' hashes if its tokens are given.

    Raises: ValueError for names, numbers or token ids that do not make a document.
    """
    check_name(name, "document")
    check_name(group, "group")
    if salt is not None:
        check_name(salt, "salt")
    ids = None if token_ids is None else _whole_ids(name, token_ids)
    count = whole(
        len(ids) if tokens is None and ids is not None else tokens,
        f"tokens of document {name!r}",
        1,
        MAX_TOKENS,
    )
    position = whole(position, f"position of document {name!r}", 0, MAX_POSITION - count + 1)
    if ids is None:
        return NewDocument(name, count, position, group, ())
    if len(ids) != count:
        raise ValueError(f"document {name!r}: {len(ids)} token ids for {count} tokens")
    hashes = block_hashes(ids, block_tokens=config.block_tokens, position=position, salt=salt)
    return NewDocument(name, count, position, group, hashes)


def _whole_ids(name: str, token_ids: Sequence[int] | Tensor) -> list[int]:
    """Token ids as a list of ints; a tensor, or an array of numpy, of them is taken too."""
    listed = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
    what = f"a token id of document {name!r}"
    return [
        token if type(token) is int and 0 <= token < 2**64 else whole(token, what, 0, 2**64 - 1)
        for token in (listed if isinstance(listed, list) else [listed])
    ]


def published_content(
    world: World,
    name: str,
    request: Request,
    token_ids: Sequence[int] | Tensor | None,
    salt: str | None,
    group: str,
) -> tuple[bytes, ...]:
    """The hashes of the blocks of a request that is to be published.

    Raises: ValueError unless its tokens are private and written.
    """
    if request.into is not None or not request.length:
        raise ValueError("only a request's own private tokens can be published")
    if token_ids is not None and len(token_ids) != request.length:
        raise ValueError(f"{len(token_ids)} token ids for {request.length} tokens")
    missing = _unwritten(world, request)
    if missing is not None:
        raise ValueError(f"the request cannot be published: {missing} is not written")
    start = request.position - request.length
    return content(world.config, name, request.length, token_ids, salt, start, group).hashes


def added(
    world: World,
    directory: Directory,
    name: str,
    *,
    tokens: int,
    position: int,
    load: Tensor | None = None,
    home: int | None = None,
    hashes: Sequence[bytes] = (),
    group: str = "",
) -> Directory:
    """The directory with one more document, placed by the world's policy, or at the rank `home`.

    Raises: ValueError if it cannot be added.
    """
    config, shared = world.config, len(directory.prefix(hashes))
    num_blocks = -(-tokens // config.block_tokens)
    if load is not None and load.shape != (num_blocks,):
        raise ValueError(f"load must have shape ({num_blocks},), got {tuple(load.shape)}")
    fresh = directory.free_blocks(name, num_blocks - shared)
    if home is None:
        ranks = place(
            config.placement,
            fresh,
            num_branches=config.num_branches,
            world_size=world.world_size,
            used=directory.used,
            load=None if load is None else load[shared:],
        )
    else:
        ranks = place_at(
            home,
            len(fresh),
            num_branches=config.num_branches,
            copies=config.placement.copies,
            world_size=world.world_size,
        )
    grown = with_document(
        directory,
        name,
        tokens=tokens,
        position=position,
        ranks=ranks,
        capacity=world.stores.corpus_slots,
        hashes=hashes,
        group=group,
    )
    _check_index_room(world, grown, name)
    return grown


def publish(
    world: World,
    name: str,
    request: Request | None,
    hashes: Sequence[bytes],
    group: str,
) -> Document:
    """One rank's request becomes a document: its own tokens, copied bit for bit; a step of the world.

    The new blocks stay at that rank, as the owner.

    Raises: ValueError on every rank if the document cannot be added, or not just one rank has a
    request.
    """
    facts = torch.empty(0, dtype=torch.int64)
    if request is not None:
        facts = torch.tensor([request.length, request.position - request.length])
    digests = torch.tensor(list(b"".join(hashes)), dtype=torch.uint8)
    columns = [broadcast("publish", facts, world), broadcast("hashes", digests, world)]
    visitors = settle(world, world.header("publish", layer=0), columns)
    parts = [
        (facts, digests) if m is None else _published(world, r, m) for r, m in enumerate(visitors)
    ]
    homes = [rank for rank, (theirs, _) in enumerate(parts) if len(theirs)]
    if len(homes) != 1:
        raise ValueError(f"one rank publishes its request, the others none; got ranks {homes}")
    (home,) = homes
    tokens, position = parts[home][0].tolist()
    raw = parts[home][1].numpy().tobytes()
    world.adopt(
        added(
            world,
            world.directory,
            name,
            tokens=tokens,
            position=position,
            home=home,
            hashes=split_contents(raw),
            group=group,
        )
    )
    document = world.directory.documents[name]
    if request is not None:
        _copy_tail(world, request, document)
    for layer in range(len(world.config.model.layers)):
        settle(world, world.header("publish", layer=layer))  # copies elsewhere have it now
    return document


def _unwritten(world: World, request: Request) -> str | None:
    """Which of a request's own tokens is not written at some layer, in words; None if all are."""
    ids = request.ids(0, request.length)
    for layer, codec in enumerate(world.stores.index.codecs):
        _, here = world.stores.entries.resolve(layer, world.stores.stored_ids(ids))
        written = here.view(len(ids), -1).all(1)
        if codec is not None:
            written &= world.stores.index.resolve(layer, ids)[1]
        if not bool(written.all()):
            return f"token {int((~written).nonzero()[0, 0])} at layer {layer}"
    return None


def make_room(
    world: World, wanted: NewDocument, *, policy: Policy, in_use: frozenset[str]
) -> list[str]:
    """Remove documents until `wanted` can be added; returns their names. A step of the world.

    How much each is used, and whether it is `in_use` by an open request, is what all ranks send
    together.

    Raises: ValueError on every rank, and nothing changes, if there cannot be enough room.
    """
    directory, (name, tokens, position, group, hashes) = world.directory, wanted
    uses = [world.usage.of(d.serial, world.progress.epoch) for d in directory.documents.values()]
    columns = {
        "last": torch.tensor([use.last for use in uses], dtype=torch.int64),
        "heat": torch.tensor([use.heat for use in uses], dtype=torch.float64),
        "held": torch.tensor([other in in_use for other in directory.documents], dtype=torch.int32),
    }
    visitors = settle(
        world,
        world.header("evict", layer=0),
        [broadcast(column, rows, world) for column, rows in columns.items()],
    )
    used = [columns if m is None else _uses(world, r, m, columns) for r, m in enumerate(visitors)]
    last = torch.stack([theirs["last"] for theirs in used]).amax(0).tolist()
    heat = torch.stack([theirs["heat"] for theirs in used]).sum(0).tolist()
    held = torch.stack([theirs["held"] for theirs in used]).amax(0).tolist()
    names = list(directory.documents)
    together = {other: Use(last[at], heat[at]) for at, other in enumerate(names)}

    def lacking(directory: Directory) -> str | None:
        try:
            added(
                world, directory, name, tokens=tokens, position=position, hashes=hashes, group=group
            )
        except ValueError as error:
            return str(error)
        return None

    smaller, removed = evicted(
        directory,
        ranked(directory, together, policy),
        frozenset(other for at, other in enumerate(names) if held[at]),
        lacking=lacking,
        group=group,
        blocks=-(-tokens // world.config.block_tokens),
    )
    world.adopt(smaller)
    return removed


def _copy_tail(world: World, request: Request, document: Document) -> None:
    """Write a request's own rows once more, as those of the document, where it is stored anew."""
    first = document.shared * world.config.block_tokens
    source, target = request.ids(first, document.tokens), document.ids(first)
    if len(target) == 0:
        return
    for layer, codec in enumerate(world.stores.index.codecs):
        index, _ = world.stores.entries.resolve(layer, world.stores.stored_ids(source))
        keys = None
        if codec is not None:
            keys = world.stores.index.rows(layer, world.stores.index.resolve(layer, source)[0])
        world.writes.write_rows(layer, target, world.stores.entries.rows(layer, index), keys)


def _check_index_room(world: World, directory: Directory, name: str) -> None:
    """Index keys live with the copies of a block's first branch; refused if a rank has no room."""
    if not world.stores.has_index or world.config.index_placement == "replicated":
        return
    first = directory.owners[:: directory.num_branches]
    held = torch.bincount(first[first >= 0].long(), minlength=world.world_size)
    if int(held.max()) > world.stores.index_slots:
        rank = int(held.argmax())
        raise ValueError(
            f"document {name!r} does not fit: rank {rank} would hold the index keys of "
            f"{int(held[rank])} blocks, its pool has {world.stores.index_slots}"
        )


def _published(world: World, rank: int, message: Message) -> tuple[Tensor, Tensor]:
    """What a peer publishes: (tokens, position) or nothing, and its blocks' hashes."""
    nothing = torch.empty(0, dtype=torch.int64)
    facts = message.columns.get("publish", nothing)
    content = message.columns.get("hashes", torch.empty(0, dtype=torch.uint8))
    well_formed = facts.dtype == torch.int64 and facts.shape in ((0,), (2,))
    well_formed &= content.dtype == torch.uint8 and content.dim() == 1
    most = world.config.request_blocks * world.config.block_tokens
    if well_formed and len(facts):
        tokens, position = facts.tolist()
        full = tokens // world.config.block_tokens * CONTENT_BYTES
        well_formed = (
            0 < tokens <= most
            and 0 <= position <= MAX_POSITION - tokens + 1
            and len(content) in (0, full)
        )
    if not well_formed:
        raise world.transport.accuse(
            rank, "sent an invalid message: it publishes no document that can be"
        )
    return facts, content


def _uses(world: World, rank: int, message: Message, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """A peer's use of the documents, of the shapes and dtypes of our own."""
    theirs = {name: message.columns.get(name, rows[:0]) for name, rows in ours.items()}
    for name, rows in ours.items():
        if theirs[name].shape != rows.shape or theirs[name].dtype != rows.dtype:
            raise world.transport.accuse(
                rank, f"sent an invalid message: column {name!r} is not one number a document"
            )
    if not bool(theirs["heat"].isfinite().all()):
        raise world.transport.accuse(
            rank, "sent an invalid message: a document's heat is not finite"
        )
    return theirs
