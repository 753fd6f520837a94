"""The DSA lightning indexer: index queries, index keys, head weights and scores.

Dimension letters: T tokens, Q queries, E entries, Hi index heads, D index head columns (the first
`rope_dim` rotary). With exact arithmetic

    score[q, e] = sum_h w[q, h] * relu(query[q, h] . key[e]),   w = weights_proj(x) * (Hi * D)**-0.5

Quantised layouts rotate queries and keys by a Hadamard matrix, which leaves dot products alone but
spreads outliers, and round both to e4m3 with one power-of-two scale per head or entry. The original
folds the query's scale into w and multiplies by the key's scale after the ReLU. Scales are positive
powers of two, so applying them to the vectors, as here, gives the same numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..partition.codec import act_quant
from ..partition.layout import IndexLayout, Rope
from ..partition.rope import apply_rope, rotate

# Queries are also tiled rather than let a tile get narrower than this many entries.
_MIN_TILE_ENTRIES = 512
# Smaller products take other paths through BLAS, and longer sums are cut into parts at places that depend
# on the product: both can change the last bit of a score.
_LEAST_ENTRIES, _LEAST_ROWS, _MOST_COLUMNS = 32, 16, 128
_FEW_HEADS = 16  # below which adding rows of entries is faster than summing each entry's heads


def index_query(
    compressed: Tensor, wq_b: Tensor, cos: Tensor, sin: Tensor, layout: IndexLayout
) -> Tensor:
    """Index queries (T, Hi, D) of the compressed queries cQ (T, q_lora), wq_b (Hi * D, q_lora).

    If quantised, the numbers are those that survive e4m3, scale included. cos, sin: (T, rope / 2).
    """
    _check_weight("wq_b", wq_b, layout.heads * layout.head_dim, compressed.shape[-1])
    query = F.linear(compressed, wq_b).view(-1, layout.heads, layout.head_dim)
    query = _rotate_leading(query, cos, sin, layout)
    if not layout.quantized:
        return query
    values, scale = act_quant(hadamard(query))
    return (values.float() * scale).to(query.dtype)


def index_key(
    x: Tensor,
    wk: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: IndexLayout,
) -> Tensor:
    """Index keys (T, D) of hidden states (T, hidden): LayerNorm (eps 1e-6) of wk x, then rope.

    If quantised they are Hadamard-rotated; rounding to e4m3 is the index codec's part.
    """
    _check_weight("wk", wk, layout.head_dim, x.shape[-1])
    key = F.layer_norm(F.linear(x, wk), (layout.head_dim,), norm_weight, norm_bias, eps=1e-6)
    key = _rotate_leading(key, cos, sin, layout)
    return hadamard(key) if layout.quantized else key


def head_weights(x: Tensor, w_proj: Tensor, layout: IndexLayout) -> Tensor:
    """Weights (T, Hi) of the heads, fp32 (fp64 from fp64), with Hi**-0.5 and D**-0.5 folded in.

    The projection (Hi, hidden) runs in its own dtype, which may be wider than that of `x`.
    """
    _check_weight("w_proj", w_proj, layout.heads, x.shape[-1])
    weights = _at_least_fp32(F.linear(x.to(w_proj.dtype), w_proj))
    return weights.mul((layout.heads * layout.head_dim) ** -0.5)


def rotate_index(x: Tensor, by: Tensor, layout: IndexLayout, rope: Rope) -> Tensor:
    """Index queries or keys (T, ..., D) as they would be `by` (T,) positions further on.

    `rope` is the layer's `index_rope`. What e4m3 has rounded is not rounded again.
    """
    plain = hadamard(x) if layout.quantized else x
    rotary, rest = plain.tensor_split((layout.rope_dim,), dim=-1)
    plain = torch.cat((rotate(rotary, by, rope), rest), dim=-1)
    return hadamard(plain) if layout.quantized else plain


def hadamard(x: Tensor) -> Tensor:
    """x (..., D) times the symmetric Sylvester-Hadamard matrix over sqrt(D); D a power of two."""
    dim = x.shape[-1]
    if dim <= 0 or dim & (dim - 1):
        raise ValueError(f"the Hadamard rotation needs a power of two, got {dim}")
    y, width = _at_least_fp32(x), 1
    while width < dim:
        first, second = torch.unflatten(y, -1, (-1, 2, width)).unbind(-2)
        y = torch.stack((first + second, first - second), dim=-2).flatten(-3)
        width *= 2
    return y.mul(dim**-0.5).to(x.dtype)


def least_tile_bytes(heads: int, dtype: torch.dtype) -> int:
    """The least `tile_bytes` that `scores` takes, for queries of so many heads."""
    return _LEAST_ENTRIES * max(heads, _LEAST_ROWS) * (8 if dtype == torch.float64 else 4)


def scores(query: Tensor, weights: Tensor, keys: Tensor, *, tile_bytes: int) -> Tensor:
    """Scores (Q, E) of every query against every entry, fp32 (fp64 if the query is fp64).

    A score has the same bits whatever other queries and entries it is computed with, and whatever the
    tiles. The sum over heads is made so. Of the products this holds as long as BLAS sums the columns of
    every element in one order, in all products of at least 32 entries, 16 rows and at most 128 columns:
    no other shapes are given to it. MKL does so on x86 (`tests/indexer/test_partitions.py`). A score of
    zero is +0.0.

    Args:
        query: (Q, Hi, D).
        weights: (Q, Hi), may be negative.
        keys: (E, D), as decoded by the index codec.
        tile_bytes: bound on the per-head products held at a time, which would be Hi times the
            result; about the size of the cache (1 to 8 MiB) is fastest. At least `least_tile_bytes`.
    Raises: ValueError on shapes that do not fit together, or too small a tile.
    """
    (num_queries, heads, dim), num_entries = query.shape, len(keys)
    if weights.shape != (num_queries, heads) or keys.shape != (num_entries, dim):
        raise ValueError(
            f"query {tuple(query.shape)} needs weights (Q, Hi) and keys (E, D), "
            f"got {tuple(weights.shape)} and {tuple(keys.shape)}"
        )
    query = _at_least_fp32(query)
    weights, keys = weights.to(query.dtype), keys.to(query.dtype)
    result = query.new_empty(num_queries, num_entries)
    if not result.numel():
        return result
    least = least_tile_bytes(heads, query.dtype)
    if tile_bytes < least:
        raise ValueError(f"tile_bytes must be at least {least} for {heads} heads, got {tile_bytes}")
    most = tile_bytes // query.dtype.itemsize
    narrowest = min(max(num_entries, _LEAST_ENTRIES), _MIN_TILE_ENTRIES)
    rows = min(num_queries, max(1, most // (heads * narrowest)))
    columns = most // max(rows * heads, _LEAST_ROWS)
    for q in range(0, num_queries, rows):
        some, weight = query[q : q + rows].flatten(0, 1), weights[q : q + rows]
        some = _at_least(some, _LEAST_ROWS)
        for e in range(0, num_entries, columns):
            tile = keys[e : e + columns]
            count = len(tile)
            tile = _at_least(tile, _LEAST_ENTRIES)
            if heads < _FEW_HEADS:
                products = _products(some, tile)[: weight.numel(), :count].unflatten(0, (-1, heads))
                part = _sum_of_heads(products.relu_().mul_(weight[..., None]))
            else:
                products = _products(tile, some)[:count, : weight.numel()].unflatten(1, (-1, heads))
                part = products.relu_().mul_(weight).sum(-1).T
            torch.add(part, 0.0, out=result[q : q + rows, e : e + columns])
    return result


def _at_least(x: Tensor, rows: int) -> Tensor:
    """x (N, D), with zeros behind it if it has fewer rows than these."""
    padded: Tensor = x if len(x) >= rows else F.pad(x, (0, 0, 0, rows - len(x)))
    return padded


def _products(left: Tensor, right: Tensor) -> Tensor:
    """left (M, D) times right (N, D): (M, N)."""
    parts = zip(left.split(_MOST_COLUMNS, dim=1), right.split(_MOST_COLUMNS, dim=1), strict=True)
    first, second = next(parts)
    products: Tensor = first @ second.T
    for first, second in parts:
        products += first @ second.T
    return products


def _sum_of_heads(products: Tensor) -> Tensor:
    """(Q, E) sums of products (Q, Hi, E), which are overwritten: half of the heads to the other half."""
    heads = products.shape[1]
    while heads > 1:
        half = heads // 2
        products[:, :half] += products[:, heads - half : heads]
        heads -= half
    return products[:, 0]


def _rotate_leading(x: Tensor, cos: Tensor, sin: Tensor, layout: IndexLayout) -> Tensor:
    rope, rest = x.tensor_split((layout.rope_dim,), dim=-1)
    return torch.cat((apply_rope(rope, cos, sin, pairing=layout.pairing), rest), dim=-1)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_weight(name: str, weight: Tensor, rows: int, columns: int) -> None:
    if weight.shape != (rows, columns):
        raise ValueError(f"{name} must be ({rows}, {columns}), got {tuple(weight.shape)}")
