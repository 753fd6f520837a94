"""What ranks send one another about a snapshot: what they found, and the part each of them wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...partition.directory import Directory
from ...partition.pool import KINDS, Kind
from ...partition.snapshot.format import (
    BlockFile,
    LayerForm,
    Manifest,
    SavedDocument,
    fault,
    file_name,
    layer_form,
)
from ...partition.snapshot.record import HASH_BYTES, hash_table
from ..errors import SnapshotError
from ..transport.base import Column
from ..transport.messages import Message, bytes_of, text
from ..world import World
from .collective import raise_failures, share


class Closed(NamedTuple):
    """Closed blocks (n,) of one kind as they were at `begin`; hashes (n, 16) where they are known."""

    keys: Tensor
    slots: Tensor
    generations: Tensor
    tokens: Tensor
    hashes: Tensor
    known: Tensor


class Part(NamedTuple):
    """What one rank wrote: hashes (n, 16) of its keys by kind, zeros where one was gone; its files."""

    hashes: dict[Kind, Tensor]
    files: list[BlockFile]


Keyed = tuple[dict[Kind, Tensor], Part]  # a part, and the keys (n,) that its hashes belong to


def owner_of(directory: Directory, kind: Kind) -> Tensor:
    """The rank that answers for each key of a kind: the owner, for index keys that of branch 0."""
    owner = directory.owners[:, 0]
    return owner if kind == "entries" else owner[:: directory.num_branches]


def forms_of(world: World) -> tuple[LayerForm, ...]:
    """How the world's model stores each layer."""
    layers = zip(
        world.config.model.layers,
        world.stores.entries.codecs,
        world.stores.index.codecs,
        strict=True,
    )
    return tuple(layer_form(layout, codec, index) for layout, codec, index in layers if codec)


def check_forms(manifest: Manifest, world: World, where: str) -> None:
    """Raise a ValueError that shows the difference unless the snapshot is of such a model."""
    theirs: dict[str, object] = {
        "block_tokens": manifest.block_tokens,
        "num_branches": manifest.num_branches,
        "layers": len(manifest.layers),
    }
    ours: dict[str, object] = {
        "block_tokens": world.config.block_tokens,
        "num_branches": world.config.num_branches,
        "layers": len(world.config.model.layers),
    }
    theirs |= {f"layers[{at}]": form for at, form in enumerate(manifest.layers)}
    ours |= {f"layers[{at}]": form for at, form in enumerate(forms_of(world))}
    for field, saved in theirs.items():
        if saved != ours[field]:
            raise fault(where, field, f"{saved} was saved, this world has {ours[field]}")


def agree_on(
    world: World,
    kind: str,
    folder: Path,
    found: tuple[Manifest, bytes] | None,
    reason: str,
    token: str,
) -> str:
    """Go on only if no rank has a `reason` not to and all found the same manifest; rank 0's token.

    Raises: SnapshotError on every rank, with the same words.
    """
    digest = found[1] if found else b""
    columns = {
        "reason": text(reason.encode()),
        "digest": text(digest),
        "token": text(token.encode()),
    }
    received = share(world, kind, columns)
    raise_failures(f"snapshot {folder}", [bytes_of(theirs, "reason") for theirs in received])
    digests = [bytes_of(theirs, "digest") for theirs in received]
    others = [rank for rank, theirs in enumerate(digests) if theirs != digests[0]]
    if others:
        raise SnapshotError(
            f"snapshot {folder}: ranks {others} find another manifest there than rank 0; the folder "
            "must be one that all ranks share"
        )
    chosen = bytes_of(received[0], "token").decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{8}", chosen):
        raise world.transport.accuse(0, f"gave a malformed token {chosen[:20]!r}")
    return chosen


def part_columns(world: World, ours: dict[Kind, Closed], part: Part) -> list[Column]:
    """This rank's part, for rank 0."""
    kinds = torch.tensor([KINDS.index(file.kind) for file in part.files], dtype=torch.int32)
    rows = torch.tensor([file.rows for file in part.files], dtype=torch.int32)
    hashes = hash_table(b"".join(file.hashes for file in part.files))
    sent = {"files.kind": kinds, "files.rows": rows, "files.hashes": hashes}
    for kind in KINDS:
        sent[f"{kind}.keys"] = ours[kind].keys.to(torch.int32)
        sent[f"{kind}.hashes"] = part.hashes[kind]
    columns = []
    for name, column in sent.items():
        counts = torch.zeros(world.world_size, dtype=torch.int64)
        counts[0] = len(column) if world.rank else 0
        columns.append(Column(name, column, counts))
    return columns


def received_part(
    world: World, directory: Directory, token: str, rank: int, message: Message
) -> Keyed:
    """A rank's part out of its message. Raises: PeerError that names the rank if it is malformed."""
    try:
        keys: dict[Kind, Tensor] = {}
        hashes: dict[Kind, Tensor] = {}
        for kind in KINDS:
            keys[kind] = column_of(message.columns, f"{kind}.keys", torch.int32, ()).long()
            hashes[kind] = column_of(message.columns, f"{kind}.hashes", torch.uint8, (HASH_BYTES,))
            owner = owner_of(directory, kind)
            known = (keys[kind] >= 0) & (keys[kind] < len(owner))
            own = owner[torch.where(known, keys[kind], 0)] == rank
            if len(keys[kind]) != len(hashes[kind]) or not bool((known & own).all()):
                raise ValueError(f"keys of {kind} are not its own, or not as many as the hashes")
        return keys, Part(hashes, _received_files(message, token, rank))
    except ValueError as error:
        raise world.transport.accuse(rank, f"sent a malformed part: {error}") from error


def saved_documents(
    world: World, directory: Directory, parts: list[Keyed]
) -> tuple[SavedDocument, ...]:
    """The documents of `directory` that are still there, with the hashes of their blocks."""
    branches = directory.num_branches
    tables = {
        "entries": torch.zeros(directory.max_blocks * branches, HASH_BYTES, dtype=torch.uint8),
        "index": torch.zeros(directory.max_blocks, HASH_BYTES, dtype=torch.uint8),
    }
    for keys, part in parts:
        for kind in KINDS:
            tables[kind][keys[kind]] = part.hashes[kind]
    saved = []
    for document in directory.documents.values():
        if world.directory.documents.get(document.name) != document:
            continue  # it was removed meanwhile
        blocks = torch.tensor(document.blocks)
        keys_of = (blocks[:, None] * branches + torch.arange(branches)).reshape(-1)
        index = tables["index"][blocks] if world.stores.has_index else tables["index"][:0]
        saved.append(
            SavedDocument(
                name=document.name,
                tokens=document.tokens,
                position=document.position,
                entries=tables["entries"][keys_of].numpy().tobytes(),
                index=index.numpy().tobytes(),
                contents=b"".join(document.contents),
                group=document.group,
                is_pinned=document.name in world.directory.pinned,
            )
        )
    return tuple(saved)


def _received_files(message: Message, token: str, rank: int) -> list[BlockFile]:
    kinds = column_of(message.columns, "files.kind", torch.int32, ()).tolist()
    rows = column_of(message.columns, "files.rows", torch.int32, ()).tolist()
    hashes = column_of(message.columns, "files.hashes", torch.uint8, (HASH_BYTES,))
    if len(kinds) != len(rows) or min(rows, default=1) < 1 or sum(rows) != len(hashes):
        raise ValueError("files and their hashes do not add up")
    if not set(kinds) <= set(range(len(KINDS))):
        raise ValueError(f"kinds of files are below {len(KINDS)}")
    files: list[BlockFile] = []
    for kind, part in zip(kinds, hashes.split(rows), strict=True):
        number = sum(file.kind == KINDS[kind] for file in files)
        name = file_name(token, rank, KINDS[kind], number)
        files.append(BlockFile(name=name, kind=KINDS[kind], hashes=part.numpy().tobytes()))
    return files


def column_of(
    columns: Mapping[str, Tensor], name: str, dtype: torch.dtype, trailing: tuple[int, ...]
) -> Tensor:
    """A received column (n, *trailing); none is an empty one. Raises: ValueError if it is another."""
    column = columns.get(name)
    if column is None:
        return torch.empty(0, *trailing, dtype=dtype)
    if column.dtype != dtype or column.dim() < 1 or column.shape[1:] != trailing:
        raise ValueError(f"column {name!r} is {column.dtype} {tuple(column.shape)}")
    return column
