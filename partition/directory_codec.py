"""A directory as columns of a message, for a rank that joins a world which has one already.

Letters: D documents, K keys, R copies, W ranks. What follows from the rest is not sent but made again:
what a block holds, who refers to it, and which slots are taken. A directory has one encoding, and no
other is taken; what was accepted is a directory that deltas could have made.

    documents   uint8: msgpack of (version, serial, quotas, documents), see `_Head`
    blocks      int32: the blocks of each document, in their order
    owners, slots (K, R), generations (K,)   int32
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, repeat
from types import MappingProxyType
from typing import Any

import msgpack
import torch
from torch import Tensor

from .bounds import MAX_POSITION, MAX_QUOTA, MAX_SERIAL, MAX_TOKENS, is_name, is_whole
from .directory import Directory, Document, hashed_of
from .prefix_hash import CONTENT_BYTES, split_contents


def directory_columns(directory: Directory) -> dict[str, Tensor]:
    documents = [
        [
            document.name,
            document.group,
            document.tokens,
            document.position,
            document.serial,
            document.shared,
            document.name in directory.pinned,
            b"".join(document.contents),
        ]
        for document in directory.documents.values()
    ]
    quotas = sorted(directory.quotas.items())
    head = msgpack.packb([directory.version, directory.serial, quotas, documents])
    blocks = [block for document in directory.documents.values() for block in document.blocks]
    return {
        "documents": torch.frombuffer(bytearray(head), dtype=torch.uint8),
        "blocks": torch.tensor(blocks, dtype=torch.int32),
        "owners": directory.owners,
        "slots": directory.slots,
        "generations": directory.generations,
    }


def directory_of(
    columns: Mapping[str, Tensor], like: Directory, *, world_size: int, capacity: int
) -> Directory:
    """The directory in these columns.

    Args:
        like: an empty one of the same sizes.
        world_size: the ranks that its owners are among. capacity: slots of each.
    Raises: ValueError that names what is wrong.
    """
    blank = {"documents": torch.uint8, "blocks": torch.int32}
    for name, dtype in blank.items():
        column = columns.get(name, torch.empty(0, dtype=dtype))
        if column.dtype != dtype or column.dim() != 1:
            raise ValueError(f"{name} are {column.dtype} {tuple(column.shape)}")
    for name in ("owners", "slots", "generations"):
        table, ours = columns.get(name), getattr(like, name)
        if table is None or table.dtype != torch.int32 or table.shape != ours.shape:
            raise ValueError(f"{name} are not int32 {tuple(ours.shape)}")
    raw = columns.get("documents", torch.empty(0).byte()).numpy().tobytes()
    version, serial, quotas, listed = _head(raw, like.max_blocks)
    every = columns.get("blocks", torch.empty(0, dtype=torch.int32)).tolist()
    documents: dict[str, Document] = {}
    content_of: dict[int, bytes] = {}
    tokens = torch.zeros_like(like.tokens)
    references = torch.zeros_like(like.references)
    start = 0
    for name, group, count, position, number, shared, _, joined in listed:
        size = -(-count // like.block_tokens)
        blocks = every[start : start + size]
        start += size
        own = torch.tensor(blocks, dtype=torch.int64)
        fills = torch.full((len(blocks),), like.block_tokens, dtype=torch.int32)
        fills[-1:] = count - (size - 1) * like.block_tokens
        wrong = len(set(blocks)) != size or number > serial or shared > size
        wrong = wrong or not all(0 <= block < like.max_blocks for block in blocks)
        if not wrong:  # a block that several documents hold is full
            partial = tokens[own].minimum(fills) < like.block_tokens
            wrong = bool(((references[own] > 0) & partial).any())
        if wrong or len(joined) not in (0, count // like.block_tokens * CONTENT_BYTES):
            raise ValueError(f"document {name!r} has invalid blocks or hashes")
        tokens[own] = fills
        references[own] += 1
        contents = split_contents(joined)
        for block, content in zip(blocks, chain(contents, repeat(b"")), strict=False):
            if content_of.setdefault(block, content) != content:
                raise ValueError(
                    f"document {name!r} has another content hash for a block than a document before it"
                )
        documents[name] = Document(
            name=name,
            blocks=tuple(blocks),
            tokens=count,
            position=position,
            block_tokens=like.block_tokens,
            serial=number,
            shared=shared,
            group=group,
            contents=contents,
        )
    if start != len(every) or len(documents) != len(listed):
        raise ValueError("blocks are left over, or a document's name repeats")
    owners, slots, generations = columns["owners"], columns["slots"], columns["generations"]
    _check_places(owners, slots, references, world_size, capacity)
    if bool((generations < 0).any()):
        raise ValueError("a generation is negative")
    directory = Directory(
        block_tokens=like.block_tokens,
        num_branches=like.num_branches,
        documents=MappingProxyType(documents),
        pinned=frozenset(name for name, *_, is_pinned, _ in listed if is_pinned),
        quotas=MappingProxyType(dict(quotas)),
        hashed=MappingProxyType(hashed_of(documents.values())),
        owners=owners,
        slots=slots,
        generations=generations,
        tokens=tokens,
        references=references,
        used=torch.bincount(owners[owners >= 0].long(), minlength=world_size),
        serial=serial,
        version=version,
    )
    if directory_columns(directory)["documents"].numpy().tobytes() != raw:
        raise ValueError("documents are not encoded as this version encodes them")
    return directory


def _head(raw: bytes, most: int) -> tuple[int, int, list[Any], list[Any]]:
    """(version, serial, quotas, documents), each of the right types."""
    try:
        head = msgpack.unpackb(raw, max_array_len=max(most, 8), max_map_len=0)
    except (ValueError, msgpack.UnpackException) as error:
        raise ValueError(f"documents are not valid msgpack: {error}") from error
    match head:
        case [version, serial, [*quotas], [*documents]] if (
            _are_numbers(version, serial)
            and all(_is_quota(item) for item in quotas)
            and all(_is_document(item) for item in documents)
        ):
            return version, serial, quotas, documents
    raise ValueError("documents are not in the format of this version")


def _is_quota(item: object) -> bool:
    match item:
        case [str(group), blocks]:
            return is_name(group) and is_whole(blocks, 0, MAX_QUOTA)
    return False


def _is_document(item: object) -> bool:
    match item:
        case [str(name), str(group), tokens, position, serial, shared, bool(), bytes()]:
            return (
                is_name(name)
                and is_name(group)
                and is_whole(tokens, 1, MAX_TOKENS)
                and is_whole(position, 0, MAX_POSITION)
                and is_whole(serial, 0, MAX_SERIAL)
                and is_whole(shared, 0, MAX_TOKENS)
            )
    return False


def _are_numbers(*values: object) -> bool:
    return all(is_whole(value, 0, MAX_SERIAL) for value in values)


def _check_places(
    owners: Tensor, slots: Tensor, references: Tensor, world_size: int, capacity: int
) -> None:
    """Each copy of a block in use has a place of its own, and those of one key are on different ranks."""
    there = owners >= 0
    if bool((owners >= world_size).any() | (owners < -1).any() | (slots < -1).any()):
        raise ValueError(f"owners are not ranks of a world of {world_size}")
    if bool((slots >= capacity).any() | ((slots >= 0) != there).any()):
        raise ValueError(f"slots are not below {capacity}, or not as many as owners")
    in_use = (references > 0).repeat_interleave(len(owners) // len(references))
    ordered = owners.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    place = owners[there].long() * capacity + slots[there]
    if bool(twice.any() | (there & ~in_use[:, None]).any()) or len(place.unique()) != len(place):
        raise ValueError(
            "a slot is given twice, a rank has two copies of a block, or a block in no document has a slot"
        )
