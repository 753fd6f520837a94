"""Which units a query wants: index scores where the keys live, exact top-k across holders."""

from .dsa import (
    hadamard,
    head_weights,
    index_key,
    index_query,
    least_tile_bytes,
    rotate_index,
    scores,
)
from .topk import local_topk, merge_topk, select_blocks, unit_scores, visible

__all__ = [
    "hadamard",
    "head_weights",
    "index_key",
    "index_query",
    "least_tile_bytes",
    "local_topk",
    "merge_topk",
    "rotate_index",
    "scores",
    "select_blocks",
    "unit_scores",
    "visible",
]
