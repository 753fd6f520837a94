"""Which units a query wants: index scores where the keys live, exact top-k across holders."""

from ..partition.rope import apply_rope, deinterleave, rope_tables
from .dsa import hadamard, head_weights, index_key, index_query, scores
from .topk import local_topk, merge_topk, select_blocks, unit_scores, visible

__all__ = [
    "apply_rope",
    "deinterleave",
    "hadamard",
    "head_weights",
    "index_key",
    "index_query",
    "local_topk",
    "merge_topk",
    "rope_tables",
    "scores",
    "select_blocks",
    "unit_scores",
    "visible",
]
