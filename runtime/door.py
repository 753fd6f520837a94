"""What a caller's tensors must be. Every check raises ValueError before anything has changed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..partition.layout import Layout
from .requests import Scope, units_visible
from .step import Selection
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


def check_writable(world: World, ids: Tensor) -> None:
    """Entry ids that can be written: distinct, of a document or of a request's own blocks."""
    config = world.config
    block, offset = ids // config.block_tokens, ids % config.block_tokens
    corpus = (ids >= 0) & (block < config.max_blocks)
    tokens = world.directory.tokens[torch.where(corpus, block, 0).long()]
    private = world.entries.holds(block.long() * config.num_branches * config.block_tokens)
    if not bool(torch.where(corpus, offset < tokens, private).all()):
        raise ValueError("ids must be of a document or of a request's own tokens")
    if len(ids.unique()) != len(ids):
        raise ValueError("ids repeat")


def check_scope(scope: Scope, queries: int) -> None:
    """A scope made for that many queries."""
    if (
        len(scope.runs) != queries
        or scope.runs.dim() != 3
        or scope.runs.shape[2] != 2
        or scope.hidden.shape != (queries, 2)
        or not scope.runs.dtype == scope.hidden.dtype == torch.int32
    ):
        raise ValueError(f"the scope is for {len(scope.runs)} queries, got {queries}")


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
    check_scope(selection.scope, queries)
    if not world.config.checked or ids.numel() == 0:
        return
    flat = ids.reshape(queries, -1, ids.shape[-1])
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
