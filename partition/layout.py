"""What one layer of a model stores and computes: streams, branches, index keys, scale, projection.

A layout is a frozen value. Everything else (pool, plan, wire, cost model) reads it and nothing
special-cases an architecture. Dimension letters: H query heads, G branches, C columns of an entry.

One branch is one stream group: the streams of a branch are stored, placed and fetched together,
and the directory's key is (block, branch). An entry's columns lie value-only, tied, key-only, so
that a branch's value is the first columns of its entry and its key the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["v", "kv", "k"]
Pairing = Literal["interleaved", "half"]
Form = Literal["A", "B"]

_ROLE_ORDER = {"v": 0, "kv": 1, "k": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A separately named part of an entry: `dim` columns used as value, key or both (tied)."""

    name: str
    dim: int
    role: Role

    def __post_init__(self) -> None:
        if self.dim <= 0:
            raise ValueError(f"stream {self.name!r}: dim must be positive, got {self.dim}")
        if self.role not in _ROLE_ORDER:
            raise ValueError(f"stream {self.name!r}: role must be v, kv or k, got {self.role!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """An independent softmax over one stream group, for heads [head_start, head_start + heads).

    The layer's output is the sum over branches of `weight` times the branch's output; branches
    are never combined by log-sum-exp.
    """

    name: str
    streams: tuple[Stream, ...]
    head_start: int
    heads: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        order = [_ROLE_ORDER[stream.role] for stream in self.streams]
        if not order or order != sorted(order):
            raise ValueError(
                f"branch {self.name!r}: streams must be listed value-only, tied, key-only, "
                f"got {[(s.name, s.role) for s in self.streams]}"
            )
        if len({stream.name for stream in self.streams}) != len(self.streams):
            raise ValueError(f"branch {self.name!r}: stream names repeat")
        if self.key_dim == 0 or self.value_dim == 0:
            raise ValueError(f"branch {self.name!r}: needs at least one key and one value column")
        if self.head_start < 0 or self.heads <= 0:
            raise ValueError(f"branch {self.name!r}: empty or negative head slice")
        if not math.isfinite(self.weight):
            raise ValueError(f"branch {self.name!r}: weight must be finite, got {self.weight}")

    @property
    def entry_dim(self) -> int:
        return sum(stream.dim for stream in self.streams)

    @property
    def key_dim(self) -> int:
        return sum(stream.dim for stream in self.streams if stream.role != "v")

    @property
    def value_dim(self) -> int:
        return sum(stream.dim for stream in self.streams if stream.role != "k")


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN's frequencies: slow pairs are slowed `factor` times, fast ones kept, a ramp between.

    What YaRN multiplies cos and sin with is no part of it: stored keys have that in them.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1) or self.original_positions < 1:
            raise ValueError(f"YaRN needs a factor >= 1 and original positions, got {self}")
        if not self.beta_fast > self.beta_slow > 0:
            raise ValueError(f"YaRN needs beta_fast > beta_slow > 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of the last `dim` key columns; `pairing`: which columns rotate together."""

    dim: int
    pairing: Pairing
    theta: float = 10000.0
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % 2:
            raise ValueError(f"rope dim must be positive and even, got {self.dim}")
        if self.pairing not in ("interleaved", "half"):
            raise ValueError(f"rope pairing must be interleaved or half, got {self.pairing!r}")
        if self.theta <= 1:
            raise ValueError(f"rope theta must exceed 1, got {self.theta}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """Per-head up-projections around the stored columns (MLA's W_UK and W_UV).

    Un-absorbed query row: `nope_dim` columns, then the rope columns. Absorbing maps the first part
    onto the entry's non-rope key columns; projecting maps `value_dim` columns onto `out_dim`.
    With the weights at the holder, payload form B becomes possible.
    """

    nope_dim: int
    out_dim: int

    def __post_init__(self) -> None:
        if self.nope_dim <= 0 or self.out_dim <= 0:
            raise ValueError(f"projection dims must be positive, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexLayout:
    """The DSA lightning indexer of a layer: `heads` index queries against one key per entry.

    score[q, e] = sum_h w[q, h] * relu(query[q, h] . key[e]), top-k over the visible entries.
    `quantized` turns on the Hadamard rotation and the e4m3 quantisation of queries and keys.
    """

    heads: int
    head_dim: int
    rope_dim: int
    pairing: Pairing
    top_k: int
    quantized: bool = False

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.top_k) <= 0:
            raise ValueError(f"index heads, head_dim and top_k must be positive, got {self}")
        if not 0 < self.rope_dim <= self.head_dim or self.rope_dim % 2:
            raise ValueError(f"index rope_dim must be even and within head_dim, got {self}")
        if self.pairing not in ("interleaved", "half"):
            raise ValueError(f"index pairing must be interleaved or half, got {self.pairing!r}")
        if self.quantized and self.head_dim & (self.head_dim - 1):
            raise ValueError(f"the Hadamard rotation needs a power of two, got {self.head_dim}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One layer. Branches are uniform: the same streams (by role and dim) and number of heads.

    Args:
        heads: query heads H of this rank.
        branches: G branches; together they must cover every head.
        softmax_scale: always explicit.
        codec: how entries are stored, see `codec.make_codec`.
        rope: the rotary part of the key, None if the key has none.
        projection: W_UK / W_UV dims, None if queries meet the stored columns directly.
        index: the layer's indexer, None if selections come from elsewhere.
        index_codec: how index keys are stored.
    Raises:
        ValueError: if the fields contradict one another.
    """

    name: str
    heads: int
    branches: tuple[Branch, ...]
    softmax_scale: float
    codec: str
    rope: Rope | None = None
    projection: Projection | None = None
    index: IndexLayout | None = None
    index_codec: str = "fp32"

    def __post_init__(self) -> None:
        where = f"layout {self.name!r}"
        if self.heads <= 0 or not self.branches:
            raise ValueError(f"{where}: needs heads and at least one branch")
        if not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise ValueError(f"{where}: softmax_scale must be positive, got {self.softmax_scale}")
        shapes = {
            (branch.heads, *((stream.role, stream.dim) for stream in branch.streams))
            for branch in self.branches
        }
        if len(shapes) != 1:
            raise ValueError(f"{where}: branches must share streams and head count, got {shapes}")
        if len({branch.name for branch in self.branches}) != len(self.branches):
            raise ValueError(f"{where}: branch names repeat")
        covered = {h for b in self.branches for h in range(b.head_start, b.head_start + b.heads)}
        if covered != set(range(self.heads)):
            raise ValueError(
                f"{where}: branches cover heads {sorted(covered)}, expected 0..{self.heads - 1}"
            )
        if self.rope and self.rope.dim > self.key_dim:
            raise ValueError(f"{where}: rope of {self.rope.dim} columns, key of {self.key_dim}")
        if self.projection and self.absorbed_dim <= 0:
            raise ValueError(f"{where}: a projection needs non-rope key columns to absorb into")

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    @property
    def branch_heads(self) -> int:
        return self.branches[0].heads

    @property
    def entry_dim(self) -> int:
        return self.branches[0].entry_dim

    @property
    def key_dim(self) -> int:
        return self.branches[0].key_dim

    @property
    def value_dim(self) -> int:
        return self.branches[0].value_dim

    @property
    def rope_dim(self) -> int:
        return self.rope.dim if self.rope else 0

    @property
    def index_rope(self) -> Rope | None:
        """The rotary part of the index key, its first columns: of the frequencies of the key's."""
        if self.rope is None or self.index is None:
            return None
        return replace(self.rope, dim=self.index.rope_dim, pairing=self.index.pairing)

    @property
    def absorbed_dim(self) -> int:
        """Key columns that an absorbed query meets with W_UK applied."""
        return self.key_dim - self.rope_dim

    @property
    def query_dim(self) -> int:
        """Columns of a query row before absorption (key columns if there is no projection)."""
        return self.projection.nope_dim + self.rope_dim if self.projection else self.key_dim

    @property
    def out_dim(self) -> int:
        """Columns of an output row after projection (value columns if there is none)."""
        return self.projection.out_dim if self.projection else self.value_dim

    def routed_dims(self, form: Form) -> tuple[int, int]:
        """(query columns out, output columns back) per head of one routed (query, branch)."""
        if form == "A":
            return self.key_dim, self.value_dim
        if self.projection is None:
            raise ValueError(f"layout {self.name!r} has no projection, so no payload form B")
        return self.query_dim, self.out_dim

    def payload_bytes(self, form: Form, element_bytes: int = 2) -> tuple[int, int]:
        """(out, back) bytes of one query over all branches: rows, and rows plus a 4-byte LSE.

        V3.2, 128 heads, bf16: A 147,456 / 131,584; B 49,152 / 33,280 (design section 3).
        """
        out, back = self.routed_dims(form)
        rows = self.num_branches * self.branch_heads
        return rows * out * element_bytes, rows * (back * element_bytes + 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelLayout:
    """The per-layer layouts of a model. All layers have the same branches, so one placement serves all.

    `index_source[l]` is the layer whose selection layer `l` uses (itself, or an earlier one where
    layers share an indexer, as GLM-5.2 does).
    """

    layers: tuple[Layout, ...]
    index_source: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.layers or len(self.layers) != len(self.index_source):
            raise ValueError("a model needs layers, and one index source for each")
        if len({layout.num_branches for layout in self.layers}) != 1:
            raise ValueError("all layers of a model must have the same number of branches")
        for layer, source in enumerate(self.index_source):
            if not 0 <= source <= layer or self.index_source[source] != source:
                raise ValueError(f"layer {layer}: index source {source} is not an earlier indexer")

    @property
    def num_branches(self) -> int:
        return self.layers[0].num_branches
