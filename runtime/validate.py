"""What a caller's arguments must be. Every check raises ValueError before anything has changed.

Letters: Q queries, H heads, D columns, Hi index heads, n entries, G branches, K units, R runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..partition.bounds import MAX_NAME_CHARS, MAX_POSITION, is_name, whole
from ..partition.directory import Document
from ..partition.layout import Layout, ModelLayout
from .cost.predicate import MODES
from .scope import (
    MAX_OFFSETS,
    MAX_TOP_K,
    Attached,
    Request,
    Scope,
    Selection,
    units_visible,
)
from .world import World


def check_tensor(
    tensor: object, name: str, shape: tuple[int | None, ...], dtype: torch.dtype | None
) -> None:
    """A tensor of that shape (None is any size) and dtype (None is any)."""
    wanted = str(shape).replace("None", "any")
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {wanted}, got {type(tensor).__name__}")
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(want not in (None, got) for got, want in sizes):
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_name(name: object, what: str) -> str:
    """A text of at most `MAX_NAME_CHARS` characters that UTF-8 can encode."""
    if not is_name(name):
        raise ValueError(
            f"a {what}'s name must be a string of up to {MAX_NAME_CHARS} characters without lone "
            f"surrogates, got {name!r}"
        )
    return name


def check_attachment(item: object) -> tuple[str, int | None]:
    """A document's name, or (name, position)."""
    match item:
        case str():
            return item, None
        case (str(name), position) if not isinstance(position, str):
            return name, whole(position, f"position >= 0 of document {name!r}", 0, MAX_POSITION)
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


def check_copy(world: World, request: Request, name: str) -> tuple[Document, int]:
    """A request with private tokens, and a document to copy into it; returns the document and how far
    it is moved."""
    if request.into is not None:
        raise ValueError("a document is copied into requests with private tokens only")
    document = world.directory.document(name)
    offset = request.position - document.position
    check_offsets(world.config.model, {offset})
    return document, offset


def check_writable(world: World, ids: Tensor, requests: Sequence[Request]) -> None:
    """Entry ids that can be written: distinct, appended to an open request, of a document or private."""
    config = world.config
    block = ids.long() // config.block_tokens
    private = world.stores.entries.holds(block * config.num_branches * config.block_tokens)
    ours = (block >= config.max_blocks) & private
    for request in requests:
        if request.into is not None and not bool(ours.all()):
            check_sources(world, request.sources)
            ours |= request.indices(ids) >= 0
    if not bool(ours.all()):
        raise ValueError("ids must be of tokens that were appended to an open request")
    if len(ids.unique()) != len(ids):
        raise ValueError("ids repeat")


def check_own_ids(request: Request, ids: Tensor) -> None:
    """Entry ids (n,) int32 of the request's own tokens."""
    check_tensor(ids, "ids", (None,), torch.int32)
    if bool((request.indices(ids) < 0).any()):
        raise ValueError(f"ids must lie in the request's {request.length} own tokens")


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
    if not isinstance(scope, Scope):
        raise ValueError(f"scope must be one of `Runtime.scope`, got {type(scope).__name__}")
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
    if not isinstance(selection, Selection) or not isinstance(selection.ids, Tensor):
        what = getattr(selection, "ids", selection)
        raise ValueError(f"a selection has ids in a tensor, got {type(what).__name__}")
    ids, unit, block = selection.ids, selection.unit_tokens, world.config.block_tokens
    if type(unit) is not int:
        raise ValueError(f"unit_tokens must be a whole number, got {unit!r}")
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
    held = world.stores.entries.holds(blocks * layout.num_branches * block)
    if bool((private & ~held).any()):
        raise ValueError("the selection lists tokens of a request that was released")


def check_layer(model: ModelLayout, layer: int) -> Layout:
    """The layout of a layer that the model has."""
    if type(layer) is not int or not 0 <= layer < len(model.layers):
        raise ValueError(f"layer must be in [0, {len(model.layers)}), got {layer!r}")
    return model.layers[layer]


def check_rows(
    world: World, layer: int, count: int, entries: Tensor, index_keys: Tensor | None
) -> Tensor:
    """Entries (n, G, D), or (n, D) with one branch, and, if the layer has an indexer of its own, their
    index keys (n, Di); returns the entries as (n, G, D)."""
    layout = check_layer(world.config.model, layer)
    if isinstance(entries, Tensor) and entries.dim() == 2 and layout.num_branches == 1:
        entries = entries[:, None]
    shape = (count, layout.num_branches, layout.entry_dim)
    check_tensor(entries, "entries", shape, world.config.dtype)
    if (index_keys is None) != (world.stores.index.codecs[layer] is None):
        raise ValueError(
            f"layer {layer} of {layout.name!r}: index keys and indexer must go together"
        )
    if index_keys is not None:
        assert layout.index is not None
        check_tensor(index_keys, "index keys", (count, layout.index.head_dim), None)
    return entries


def check_weights(layout: Layout, w_uk: Tensor, w_uv: Tensor) -> None:
    """W_UK (G, h, nope, latent) and W_UV (G, h, value, out) of a layout with a projection."""
    if layout.projection is None:
        raise ValueError(f"layout {layout.name!r} has no projection")
    head = (layout.num_branches, layout.branch_heads)
    check_tensor(w_uk, "w_uk", (*head, layout.projection.nope_dim, layout.absorbed_dim), None)
    check_tensor(w_uv, "w_uv", (*head, layout.value_dim, layout.projection.out_dim), None)
    if not w_uk.is_floating_point() or not w_uv.is_floating_point():
        raise ValueError(f"weights must be floating point, got {w_uk.dtype} and {w_uv.dtype}")
    if not bool(w_uk.isfinite().all() & w_uv.isfinite().all()):
        raise ValueError("weights must be finite")


def check_attached(world: World, wanted: Sequence[str | tuple[str, int]]) -> tuple[Attached, ...]:
    """Documents by name, or (name, position), as they can be attached together."""
    if isinstance(wanted, str):
        raise ValueError(f"documents must be a list of names, got the string {wanted!r}")
    attached = []
    for item in wanted:
        name, position = check_attachment(item)
        document = world.directory.document(name)
        offset = 0 if position is None else position - document.position
        attached.append(Attached(document, offset))
    documents = [document for document, _ in attached]
    if len({document.name for document in documents}) != len(documents):
        raise ValueError(f"a document is attached twice: {list(wanted)}")
    check_disjoint(documents)
    check_offsets(world.config.model, {offset for _, offset in attached})
    return tuple(attached)


def check_select(
    world: World,
    layer: int,
    query: Tensor,
    weights: Tensor,
    scope: Scope,
    top_k: int | None,
    unit_tokens: int,
) -> int:
    """Index queries (Q, Hi, D), head weights (Q, Hi) and what they see; returns how many units to
    select, by default as many as the layout says."""
    config, layout = world.config, check_layer(world.config.model, layer)
    index = layout.index
    if index is None:
        raise ValueError(f"layer {layer} ({layout.name!r}) has no indexer")
    check_tensor(query, "index query", (None, index.heads, index.head_dim), config.dtype)
    check_tensor(weights, "index weights", (len(query), index.heads), None)
    if type(unit_tokens) is not int or unit_tokens < 1 or config.block_tokens % unit_tokens:
        raise ValueError(
            f"unit_tokens must divide block_tokens {config.block_tokens}, got {unit_tokens}"
        )
    check_scope(world, scope, len(query))
    count = index.top_k if top_k is None else top_k
    if type(count) is not int or not 1 <= count <= MAX_TOP_K:
        raise ValueError(f"top_k must be in [1, {MAX_TOP_K}], got {count!r}")
    if config.checked and not bool(query.isfinite().all() & weights.isfinite().all()):
        raise ValueError("index queries and weights must be finite")
    return count


def check_attend(
    world: World,
    layer: int,
    query: Tensor,
    selection: Selection,
    *,
    sink: Tensor | None,
    mode: str,
) -> None:
    """Queries (Q, H, D) for a selection, with a sink (H,) or none, by a mode that there is."""
    layout = check_layer(world.config.model, layer)
    dim = layout.key_dim if world.weights[layer] is None else layout.query_dim
    check_tensor(query, "query", (None, layout.heads, dim), world.config.dtype)
    if sink is not None:
        check_tensor(sink, "sink", (layout.heads,), None)
    if world.config.checked:
        finite = bool(query.isfinite().all())
        if not finite or (sink is not None and bool(sink.isnan().any())):
            raise ValueError("queries must be finite, and sinks not NaN")
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
    check_selection(world, layout, selection, len(query))


def check_count(value: object, name: str) -> None:
    """A whole number of at least 1."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
