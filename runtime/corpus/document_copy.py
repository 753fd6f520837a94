"""A copy of a whole document in a request's own tokens: all layers at once, moved to other positions.

Letters: L layers, G branches, T tokens, n keys, B tokens of a block, D columns. What travels are
whole blocks: of each key its rows at all layers, side by side, each row with a mark as in any fetch.
Index keys travel in the same way; a block has one key there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...indexer.dsa import rotate_index
from ...kernels.coverage import differs, mix
from ...partition.directory import Document
from ...partition.layout import Rope
from ...partition.pool import BlockStore
from ...partition.rope import rotate
from ..copies import blocks_lost
from ..errors import CoverageError
from ..tables import chosen_copy
from ..transport.base import Column
from ..transport.messages import Message
from ..world import World


class Rows(NamedTuple):
    """Of all layers that a store has, side by side: rows (n * B, bytes) uint8, marks (n * B, L) int32,
    0 where a row is not here."""

    rows: Tensor
    marks: Tensor


class _Want(NamedTuple):
    """The keys (n,) of a document in one store, in order, whose blocks they are, and who is asked for
    each, -1 if nobody can be."""

    name: str
    store: BlockStore
    keys: Tensor
    blocks: Tensor
    holder: Tensor


def answer_copies(world: World) -> None:
    """Take part in the others' copies without one of one's own. A step of the world."""
    world.exchanger.exchange(world.header("copy", layer=0), [], partial(_answer, world), list)


def copy_document(world: World, document: Document, ids: Tensor, offset: int) -> None:
    """Write a document, moved by `offset`, as the private tokens `ids` (T,). A step of the world.

    Raises: CoverageError naming the holders that lack a token of it; BlocksLostError if nobody is left to
    ask for a block, after the others were answered.
    """
    wants = _wants(world, document)
    lost = {int(key) for want in wants for key in want.blocks[want.holder < 0]}
    if lost:
        answer_copies(world)
        raise blocks_lost(world, lost)
    columns = []
    for want in wants:
        remote = torch.where(want.holder == world.rank, world.world_size, want.holder)
        counts = torch.bincount(remote, minlength=world.world_size)[: world.world_size]
        columns.append(
            Column(want.name, want.keys.to(torch.int32), counts, remote.argsort(stable=True))
        )

    def own_rows() -> list[Rows]:
        return [_rows_of(world, w.store, w.keys[w.holder == world.rank]) for w in wants]

    own, answers = world.exchanger.exchange(
        world.header("copy", layer=0), columns, partial(_answer, world), own_rows
    )
    found = [
        _gathered(world, document, want, mine, answers)
        for want, mine in zip(wants, own, strict=True)
    ]
    layouts = world.config.model.layers
    entries = _decoded(world, document, wants[0], found[0])
    _turn(entries, [layout.rope for layout in layouts], offset)
    keys: dict[int, Tensor] = {}
    if world.stores.has_index:
        keys = _decoded(world, document, wants[1], found[1])
        _turn_index(world, keys, offset)
    for layer, rows in entries.items():
        index_keys = keys[layer].flatten(0, 1) if layer in keys else None
        world.backend.write(layer, ids, rows, index_keys, push=True)


def _wants(world: World, document: Document) -> list[_Want]:
    branches, directory = world.config.num_branches, world.directory
    blocks = torch.tensor(document.blocks)
    keys = (blocks[:, None] * branches + torch.arange(branches)).reshape(-1)
    askable = world.askable()
    copies = directory.owners[keys]
    holder = chosen_copy(copies, world.rank % copies.shape[1], askable)
    here = world.stores.entries.slot_of[keys] >= 0
    holder = torch.where(here, world.rank, holder)
    wants = [_Want("copy", world.stores.entries, keys, keys // branches, holder)]
    if world.stores.has_index:
        holder = world.tables.scorers(blocks, askable)
        if world.config.index_placement == "replicated":
            holder = torch.full_like(holder, world.rank)
        wants.append(_Want("copy_index", world.stores.index, blocks, blocks, holder))
    return wants


def _answer(world: World, message: Message) -> dict[str, Tensor]:
    """The rows and marks of the keys that a peer wants to copy."""
    answer: dict[str, Tensor] = {}
    corpus = world.config.max_blocks
    limits = {"copy": corpus * world.config.num_branches, "copy_index": corpus}
    for name, store in (("copy", world.stores.entries), ("copy_index", world.stores.index)):
        keys = message.columns.get(name)
        if keys is None:
            continue
        if len(keys.unique()) != len(keys):
            raise ValueError(f"column {name!r} has a key twice")
        if bool(((keys < 0) | (keys >= limits[name])).any()):
            raise ValueError(f"column {name!r} has keys beyond the corpus")
        found = _rows_of(world, store, keys.long())
        answer |= {f"{name}.rows": found.rows, f"{name}.marks": found.marks}
    return answer


def _rows_of(world: World, store: BlockStore, keys: Tensor) -> Rows:
    """All rows of these blocks (n,) that are here and written."""
    block_tokens = world.config.block_tokens
    ids = (keys[:, None] * block_tokens + torch.arange(block_tokens)).reshape(-1)
    rows, marks = [], []
    for layer, codec in enumerate(store.codecs):
        if codec is not None:
            index, here = store.resolve(layer, ids)
            marks.append(torch.where(here, mix(*store.identify(index)), 0))
            rows.append(torch.where(here[:, None], store.rows(layer, index), 0))
    return Rows(torch.cat(rows, dim=1), torch.stack(marks, dim=1))


def _gathered(
    world: World, document: Document, want: _Want, own: Rows, answers: Sequence[Message | None]
) -> Tensor:
    """The rows of the document's keys in order; raises what `copy_document` raises."""
    block_tokens = world.config.block_tokens
    rows = own.rows.new_zeros(len(want.keys) * block_tokens, own.rows.shape[1])
    marks = own.marks.new_zeros(len(rows), own.marks.shape[1])
    for rank, message in enumerate(answers):
        at = (want.holder == rank).nonzero()[:, 0]
        if len(at) == 0:
            continue
        found: Rows | None = own
        if message is not None:
            columns = message.columns
            if {f"{want.name}.rows", f"{want.name}.marks"} <= columns.keys():
                found = Rows(columns[f"{want.name}.rows"], columns[f"{want.name}.marks"])
            else:
                found = None
        count = len(at) * block_tokens
        if (
            found is None
            or found.rows.shape != (count, rows.shape[1])
            or found.marks.shape != (count, marks.shape[1])
            or (found.rows.dtype, found.marks.dtype) != (torch.uint8, torch.int32)
        ):
            raise world.transport.accuse(rank, f"answered {want.name!r} with other rows than asked")
        lines = (at[:, None] * block_tokens + torch.arange(block_tokens)).reshape(-1)
        rows[lines], marks[lines] = found
    branches = len(want.keys) // document.num_blocks
    ids = (want.keys[:, None] * block_tokens + torch.arange(block_tokens)).reshape(-1)
    generations = world.directory.generations[
        (want.keys * (world.config.num_branches // branches)).repeat_interleave(block_tokens)
    ]
    expected = mix(ids, generations)[:, None]
    needed = _lines(document.tokens, branches, block_tokens)
    lacking = differs(marks[needed], expected[needed])
    if bool(lacking.any()):
        holders = want.holder[needed[lacking] // block_tokens].unique().tolist()
        named = ", ".join(f"rank {rank}" for rank in holders)
        raise CoverageError(
            f"copy of {document.name!r}: {named} lacked {int(lacking.sum())} entries",
            tuple(holders),
        )
    return rows[needed]


def _lines(tokens: int, branches: int, block_tokens: int) -> Tensor:
    """Where the rows (T * G,) of a document's tokens, branch by branch, are among its keys'."""
    token, branch = torch.arange(tokens)[:, None], torch.arange(branches)
    key = token // block_tokens * branches + branch
    return (key * block_tokens + token % block_tokens).reshape(-1)


def _decoded(world: World, document: Document, want: _Want, rows: Tensor) -> dict[int, Tensor]:
    """The rows (T * G, bytes) as numbers (T, G, D) of each layer that has any.

    Raises: PeerError naming a holder whose rows hold NaN or infinity.
    """
    decoded, start = {}, 0
    for layer, codec in enumerate(want.store.codecs):
        if codec is not None:
            part = codec.decode(rows[:, start : start + codec.entry_bytes], world.compute_dtype)
            _check_sound(world, document, want, layer, part)
            decoded[layer] = part.view(document.tokens, -1, codec.dim)
            start += codec.entry_bytes
    return decoded


def _check_sound(
    world: World, document: Document, want: _Want, layer: int, entries: Tensor
) -> None:
    """Accuse another rank whose entries (T * G, D) are not finite."""
    unsound = ~entries.isfinite().all(1)
    if not bool(unsound.any()):
        return
    block_tokens, branches = world.config.block_tokens, len(want.keys) // document.num_blocks
    lines = _lines(document.tokens, branches, block_tokens)
    holders = want.holder[lines // block_tokens][unsound]
    for holder in holders[holders != world.rank][:1].tolist():
        raise world.transport.accuse(holder, f"sent rows of layer {layer} with NaN or infinity")


def _turn(entries: dict[int, Tensor], ropes: Sequence[Rope | None], offset: int) -> None:
    """Rotate the rotary columns of all layers, those of one rope in one go."""
    for rope in {rope for rope in ropes if rope is not None and offset}:
        layers = [layer for layer, its in enumerate(ropes) if its == rope]
        rotary = torch.stack([entries[layer][..., -rope.dim :] for layer in layers], dim=1)
        turned = rotate(rotary, torch.full((len(rotary),), offset), rope)
        for at, layer in enumerate(layers):
            rest = entries[layer][..., : -rope.dim]
            entries[layer] = torch.cat((rest, turned[:, at]), dim=-1)


def _turn_index(world: World, keys: dict[int, Tensor], offset: int) -> None:
    """Rotate the index keys (T, 1, D) of all layers, those of one kind of indexer in one go."""
    layouts = world.config.model.layers
    for index, rope in {(layouts[layer].index, layouts[layer].index_rope) for layer in keys}:
        if index is None or rope is None or not offset:
            continue
        kind = (index, rope)
        layers = [at for at in keys if (layouts[at].index, layouts[at].index_rope) == kind]
        stacked = torch.stack([keys[layer] for layer in layers], dim=1)
        turned = rotate_index(stacked, torch.full((len(stacked),), offset), index, rope)
        keys |= {layer: turned[:, at] for at, layer in enumerate(layers)}
