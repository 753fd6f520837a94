"""What a caller's tensors must be. Every check raises ValueError before anything has changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..partition.directory import Document
from ..partition.layout import Layout, ModelLayout
from .cpu.step import Selection
from .scope import MAX_OFFSETS, Request, Scope, units_visible
from .world import World


def check_tensor(
    tensor: object, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None
) -> None:
    """A tensor of that shape (None is any size) and dtype (None is any)."""
    said = str(shape).replace("None", "any")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {said}, got {type(tensor).__name__}")
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(want not in (None, got) for got, want in sizes):
        raise ValueError(f"{name} must have shape {said}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_name(name: object, what: str) -> str:
    """A text of at most 256 characters."""
    if not isinstance(name, str) or len(name) > 256:
        raise ValueError(f"a {what}'s name must be a string of up to 256 characters, got {name!r}")
    return name


def check_attachment(item: object) -> tuple[str, int | None]:
    """A document's name, or (name, position)."""
    match item:
        case str():
            return item, None
        case (str(name), int(position)) if 0 <= position < 2**31:
            return name, position
    raise ValueError(f"a document is attached by name or (name, position >= 0), got {item!r}")


def check_offsets(model: ModelLayout, offsets: set[int]) -> None:
    """Offsets that every layer of the model can be attached at."""
    if len(offsets) > MAX_OFFSETS:
        raise ValueError(f"documents can be at {MAX_OFFSETS} offsets at once, got {len(offsets)}")
    if offsets <= {0}:
        return
    for layer, layout in enumerate(model.layers):
        if layout.index is not None and layout.index_rope is None:
            raise ValueError(
                f"layer {layer} ({layout.name!r}) has an indexer and no rope to rotate it by: "
                "documents can only be attached at their own positions"
            )


def check_disjoint(documents: Sequence[Document]) -> None:
    """Documents that share no blocks: an entry is in a query's sight once."""
    for number, document in enumerate(documents):
        if not document.shared:
            continue
        for other in (*documents[:number], *documents[number + 1 :]):
            if not set(document.blocks).isdisjoint(other.blocks):
                raise ValueError(
                    f"documents {document.name!r} and {other.name!r} share blocks: "
                    "a request can attach one of them"
                )


def check_writable(world: World, ids: Tensor, requests: Sequence[Request]) -> None:
    """Entry ids that can be written: distinct, appended to an open request, of a document or private."""
    config = world.config
    block = ids.long() // config.block_tokens
    private = world.entries.holds(block * config.num_branches * config.block_tokens)
    ours = (block >= config.max_blocks) & private
    for request in requests:
        if request.into is not None and not bool(ours.all()):
            check_sources(world, request.sources)
            ours |= request.indices(ids) >= 0
    if not bool(ours.all()):
        raise ValueError("ids must be of tokens that were appended to an open request")
    if len(ids.unique()) != len(ids):
        raise ValueError("ids repeat")


def check_sources(world: World, sources: Sequence[Document | Request]) -> None:
    """Documents that were not removed since, and requests that are open."""
    for source in sources:
        if isinstance(source, Request):
            if not source.is_open:
                raise ValueError("a request whose tokens are seen was released")
            continue
        now = world.directory.documents.get(source.name)
        if now is None or now.serial != source.serial:
            raise ValueError(f"document {source.name!r} was removed since it was attached")


def check_scope(world: World, scope: Scope, queries: int) -> None:
    """A scope made for that many queries, of documents and requests that are still there."""
    if (
        len(scope.runs) != queries
        or scope.runs.dim() != 3
        or scope.runs.shape[2] != 2
        or scope.hidden.shape != (queries, 2)
        or not scope.runs.dtype == scope.hidden.dtype == torch.int32
    ):
        raise ValueError(f"the scope is for {len(scope.runs)} queries, got {queries}")
    offsets = scope.offsets
    if offsets is not None and (
        offsets.shape != scope.runs.shape[:2] or offsets.dtype != torch.int32
    ):
        raise ValueError(f"the scope's offsets must be int32, one a run, got {offsets.shape}")
    check_sources(world, scope.sources)


def check_selection(world: World, layout: Layout, selection: Selection, queries: int) -> None:
    """Distinct, visible units of that many queries; ids only if the config says `checked`."""
    ids, unit, block = selection.ids, selection.unit_tokens, world.config.block_tokens
    if ids.dtype != torch.int32 or ids.dim() not in (2, 3) or len(ids) != queries:
        raise ValueError(
            f"selection ids must be int32 ({queries}, K) or ({queries}, G, K), "
            f"got {ids.dtype} {tuple(ids.shape)}"
        )
    if ids.dim() == 3 and ids.shape[1] != layout.num_branches:
        raise ValueError(f"selection has {ids.shape[1]} branches, the layer {layout.num_branches}")
    if not 1 <= unit <= block * world.config.max_blocks or (block % unit and unit % block):
        raise ValueError(f"units of {unit} tokens and blocks of {block} do not nest")
    check_scope(world, selection.scope, queries)
    if not world.config.checked or ids.numel() == 0:
        return
    flat = ids.cpu().reshape(queries, -1, ids.shape[-1])
    ordered = flat.sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError("selection ids repeat within a query")
    seen = units_visible(flat.flatten(1), selection.scope.runs, unit)
    listed = flat.flatten(1) != -1
    if bool((listed & ~seen).any()):
        query, at = (listed & ~seen).nonzero()[0].tolist()
        raise ValueError(
            f"query {query} selects unit {int(flat.flatten(1)[query, at])}, "
            "which is outside what it may see"
        )
    part = torch.arange(max(unit // block, 1))  # a larger unit may begin in others' blocks
    blocks = ((flat.long() * unit // block)[..., None] + part).flatten(1)
    private = (blocks >= world.config.max_blocks) & units_visible(
        blocks, selection.scope.runs, block
    )
    held = world.entries.holds(blocks * layout.num_branches * block)
    if bool((private & ~held).any()):
        raise ValueError("the selection lists tokens of a request that was released")
