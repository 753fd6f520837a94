"""What a rank does for others: take their writes, attend over its blocks for them, hand out copies.

Letters: P routed pairs of one message, h heads of a branch, U listed units, F units to fetch.
Everything that arrives is checked against the layout before it is used; a bad message names its
sender, and so do ids that no honest rank sends. Ids of the corpus that are not here (or not written)
add nothing, and the coverage says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from ...kernels import reference
from ...kernels.coverage import coverage, mix, tagged
from ...partition.layout import Form
from ...partition.pool import BlockStore
from ..scope import MAX_OFFSETS
from ..transport.messages import Message
from ..world import World
from .attend import attend_at, by_branch, entry_offsets, padded_lists, pool_reader
from .index import best_units
from .plan import unit_entries

MAX_TOP_K = 1 << 20
_LISTED_BYTES = 128  # ids, indices, masks and their sorts, for one listed entry
FORMS: tuple[Form, ...] = get_args(Form)
# What a message of each kind may carry. A column that nobody reads would be a misunderstanding.
_PUSHED = frozenset({"push.ids", "push.rows", "push_index.ids", "push_index.rows"})
_AGREED = frozenset({"reason", "digest", "token"})
_ROUTED = ("item", "count", "units", "query", "hidden", "offsets")
KNOWN_COLUMNS: Mapping[str, frozenset[str]] = {
    "select": _PUSHED
    | {f"index.{part}" for part in ("query", "weights", "runs", "offsets", "askable")},
    "select-answer": frozenset({"score", "id", "seen"}),
    "attend": _PUSHED | {"fetch"} | {f"{form}.{part}" for form in FORMS for part in _ROUTED},
    "attend-answer": frozenset({"fetch.rows", "fetch.mark"})
    | {f"{form}.{part}" for form in FORMS for part in ("out", "lse", "covered")},
    "lease": _PUSHED | {"lease", "lease_index"},
    "lease-answer": frozenset(
        f"{name}.{part}" for name in ("lease", "lease_index") for part in ("rows", "marks")
    ),
    "publish": _PUSHED | {"publish", "hashes"},
    "evict": _PUSHED | {"last", "heat", "held"},
    "snapshot-begin": _PUSHED | _AGREED,
    "snapshot-write": _PUSHED | {"state"},
    "snapshot-parts": _PUSHED
    | {"files.kind", "files.rows", "files.hashes"}
    | {f"{kind}.{part}" for kind in ("entries", "index") for part in ("keys", "hashes")},
    "snapshot-commit": _PUSHED | {"state"},
    "restore": _PUSHED | _AGREED | {"state", "open"},
    "meet": _PUSHED,
    "verify": _PUSHED | {"state", "at", "hashes", "changed"},
    "rejoin": _PUSHED | {"facts", "fill", "documents", "blocks", "owners", "slots", "generations"},
}


def check_columns(_world: World, message: Message) -> None:
    """Raise ValueError for a column that messages of this kind do not have."""
    kind = message.header.kind
    unknown = sorted(message.columns.keys() - KNOWN_COLUMNS.get(kind, frozenset()))
    if unknown:
        raise ValueError(f"{kind!r} messages have no column {', '.join(unknown)[:80]}")


def take_pushes(world: World, message: Message) -> None:
    """Write the rows that a peer computed for blocks (or index keys) held here."""
    columns, layer = message.columns, _layer(world, message)
    for name, store in (("push", world.entries), ("push_index", world.index)):
        if f"{name}.ids" in columns or f"{name}.rows" in columns:
            ids = _column(columns, f"{name}.ids", torch.int32, 1)
            rows = _column(columns, f"{name}.rows", torch.uint8, 2)
            _check_pushed(world, store, layer, ids, rows)
            store.write(layer, ids, rows)


def _check_pushed(world: World, store: BlockStore, layer: int, ids: Tensor, rows: Tensor) -> None:
    """Entries of documents, and numbers: what is stored is read without another look."""
    codec, branches = store.codecs[layer], _branches(world, store is world.index)
    if codec is None or rows.shape != (len(ids), codec.entry_bytes):
        raise ValueError(f"rows {tuple(rows.shape)} were pushed that this rank does not store")
    _check_ids(ids, _corpus_ids(world, store is world.index), 1)
    block, offset = ids // (world.config.block_tokens * branches), ids % world.config.block_tokens
    if bool((offset >= world.directory.tokens[block]).any()):
        raise ValueError("rows were pushed beyond the end of their document")
    step = max(world.config.workspace_bytes // (16 * codec.dim), 1)
    if not all(codec.decode(tile, torch.float64).isfinite().all() for tile in rows.split(step)):
        raise ValueError("rows were pushed that hold NaN or infinity")


def answer_attend(world: World, message: Message) -> dict[str, Tensor]:
    """The answer's columns: `(out, lse, covered)` of every routed pair, and the fetched rows."""
    columns, layer = message.columns, _layer(world, message)
    answer: dict[str, Tensor] = {}
    for form in FORMS:
        if any(name.startswith(f"{form}.") for name in columns):
            answer |= _routed(world, layer, form, message)
    if "fetch" in columns:
        answer |= _fetched(world, layer, message)
    return answer


def _routed(world: World, layer: int, form: Form, message: Message) -> dict[str, Tensor]:
    layout, config, columns = world.config.model.layers[layer], world.config, message.columns
    if form not in world.forms(layer):
        raise ValueError(
            f"payload form {form} was asked, layer {layer} has no projection weights here"
        )
    item = _column(columns, f"{form}.item", torch.int32, 1)
    count = _column(columns, f"{form}.count", torch.int32, 1)
    units = _column(columns, f"{form}.units", torch.int32, 1)
    query = _column(columns, f"{form}.query", config.dtype, 3)
    pairs, (query_dim, _) = len(item), layout.routed_dims(form)
    if query.shape != (pairs, layout.branch_heads, query_dim) or len(count) != pairs:
        raise ValueError(f"{pairs} pairs came with query rows {tuple(query.shape)}")
    if bool((count < 1).any()) or int(count.sum()) != len(units) or bool((item < 0).any()):
        raise ValueError("unit counts do not add up to the listed units")
    hidden = torch.zeros(pairs, 2, dtype=torch.int32)
    unit_tokens = _unit_tokens(world, message)
    if unit_tokens > 1 or f"{form}.hidden" in columns:
        hidden = _column(columns, f"{form}.hidden", torch.int32, 2)
    offsets = None
    if f"{form}.offsets" in columns:
        offsets = _column(columns, f"{form}.offsets", torch.int32, 1)
        _check_offsets(offsets, count)

    _check_ids(units, _corpus_ids(world, of_index=False), unit_tokens)
    capacity = _corpus_ids(world, of_index=False) // unit_tokens
    longest = int(count.max()) if pairs else 0
    if longest > capacity or hidden.shape != (pairs, 2):
        raise ValueError(f"a pair lists {longest} units of {capacity}, or `hidden` is malformed")
    if not bool(query.isfinite().all()):
        raise ValueError("routed query rows are not finite")
    rows = query.to(world.compute_dtype)
    branch = item.long() % config.num_branches
    if not torch.equal(
        units // config.block_tokens % config.num_branches, branch.repeat_interleave(count)
    ):
        raise ValueError("a pair lists units of another branch than its own")
    weights = world.weights[layer]
    if form == "B":
        assert weights is not None
        rows = by_branch(rows, branch, weights.w_uk, reference.absorb)
    # Tile by tile, so that one long list does not pad all the others beyond the workspace.
    step = max(config.workspace_bytes // (max(longest, 1) * unit_tokens * _LISTED_BYTES), 1)
    starts = count.long().cumsum(0) - count
    done = []
    for first in range(0, max(pairs, 1), step):
        tile = slice(first, first + step)
        begin = int(starts[first]) if pairs else 0
        listed = padded_lists(units[begin:], count[tile])
        at = None if offsets is None else padded_lists(offsets[begin:], count[tile])
        done.append(
            _attended(world, layer, rows[tile], listed, hidden[tile], unit_tokens, offsets=at)
        )
    out, lse, covered = (torch.cat(parts) for parts in zip(*done, strict=True))
    if form == "B":
        assert weights is not None
        out = by_branch(out, branch, weights.w_uv, reference.project)
    return {
        f"{form}.out": out.to(config.dtype),
        f"{form}.lse": lse,
        f"{form}.covered": tagged(covered, item),
    }


def _attended(
    world: World,
    layer: int,
    rows: Tensor,
    listed: Tensor,
    hidden: Tensor,
    unit_tokens: int,
    *,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Partials and coverage of absorbed rows (P, h, K) over their listed units (P, U), attached at
    offsets (P, U)."""
    ids, seen = unit_entries(
        listed,
        hidden,
        unit_tokens=unit_tokens,
        block_tokens=world.config.block_tokens,
        num_branches=world.config.num_branches,
    )
    ids, seen = ids.flatten(1), seen.flatten(1)
    index, here = world.entries.resolve(layer, ids)
    valid = here & seen & (ids < _corpus_ids(world, of_index=False))
    if layer == 0:
        world.entries.touch(index[valid])
    covered = coverage(*world.entries.identify(index), valid)
    at = entry_offsets(offsets, unit_tokens)
    read = pool_reader(world, layer)
    out, lse = attend_at(world, layer, rows, index, valid, read, offsets=at)
    return out, lse, covered


def _check_offsets(offsets: Tensor, count: Tensor) -> None:
    """As many offsets as listed units, and of each pair no more different ones than a request has."""
    if len(offsets) != int(count.sum()):
        raise ValueError(f"{len(offsets)} offsets came with {int(count.sum())} units")
    pair = torch.arange(len(count)).repeat_interleave(count.long())
    distinct = (pair * 2**32 + offsets + 2**31).unique() // 2**32
    if len(distinct) and int(distinct.bincount().max()) > MAX_OFFSETS:
        raise ValueError(f"a pair lists units at more than {MAX_OFFSETS} offsets")


def _fetched(world: World, layer: int, message: Message) -> dict[str, Tensor]:
    units = _column(message.columns, "fetch", torch.int32, 1)
    unit_tokens = _unit_tokens(world, message)
    _check_ids(units, _corpus_ids(world, of_index=False), unit_tokens)
    if len(units) > len(units.unique()):
        raise ValueError("units to fetch repeat")
    ids = (units[:, None] + torch.arange(unit_tokens, dtype=torch.int32)).reshape(-1)
    index, here = world.entries.resolve(layer, ids)
    if layer == 0:
        world.entries.touch(index[here])
    mark = torch.where(here, mix(*world.entries.identify(index)), 0)
    return {"fetch.rows": world.entries.rows(layer, index), "fetch.mark": mark}


def answer_select(world: World, message: Message) -> dict[str, Tensor]:
    """The best units here for a peer's index queries: `score` and `id`, (Q * k,) for a k of its own;
    and `seen` (Q,), how many entries were scored.
    """
    columns, layer = message.columns, _layer(world, message)
    if not any(name.startswith("index.") for name in columns):
        return {}
    query = _column(columns, "index.query", world.config.dtype, 3)
    weights = _column(columns, "index.weights", world.compute_dtype, 2)
    runs = _column(columns, "index.runs", torch.int32, 3)
    index = world.config.model.layers[layer].index
    if index is None or query.shape[1:] != (index.heads, index.head_dim):
        raise ValueError(f"index queries of shape {tuple(query.shape)} do not fit layer {layer}")
    finite = bool(query.isfinite().all()) and bool(weights.isfinite().all())
    if not finite or weights.shape != query.shape[:2]:
        raise ValueError("index queries or weights are malformed or not finite")
    if len(runs) != len(query) or runs.shape[2] != 2 or bool((runs < 0).any()):
        raise ValueError("index weights or scope do not fit the index queries")
    top_k, unit_tokens = message.header.top_k, _unit_tokens(world, message)
    if not 0 < top_k <= MAX_TOP_K:
        raise ValueError(f"top_k {top_k} is out of range")
    offsets = None
    if "index.offsets" in columns:
        offsets = _column(columns, "index.offsets", torch.int32, 2)
        if offsets.shape != runs.shape[:2]:
            raise ValueError("index offsets do not fit the scope")
        _check_offsets(offsets.flatten(), torch.full((len(runs),), runs.shape[1]))
        if world.config.model.layers[layer].index_rope is None:
            raise ValueError(f"layer {layer} has no rope to rotate index queries by")
    askable = None
    if "index.askable" in columns:
        askable = _column(columns, "index.askable", torch.uint8, 1)
        if len(askable) != world.world_size or bool((askable > 2).any()):
            raise ValueError("index.askable must be 0, 1 or 2 for each rank")
    room = (_corpus_ids(world, of_index=True) - runs[..., 0].long()).clamp(min=0)
    runs = torch.stack((runs[..., 0], runs[..., 1].minimum(room).to(torch.int32)), dim=-1)
    best = best_units(
        world,
        layer,
        query,
        weights,
        runs,
        top_k=top_k,
        unit_tokens=unit_tokens,
        offsets=offsets,
        askable=askable,
    )
    return {"score": best.score.flatten(), "id": best.id.flatten(), "seen": best.seen}


def _corpus_ids(world: World, of_index: bool) -> int:
    """Ids below this belong to the corpus; those above are private and never leave home."""
    return world.config.max_blocks * world.config.block_tokens * _branches(world, of_index)


def _branches(world: World, of_index: bool) -> int:
    return 1 if of_index else world.config.num_branches


def _check_ids(ids: Tensor, end: int, unit_tokens: int) -> None:
    """Ids in [0, end), each the first of a unit."""
    if len(ids) == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"ids must lie in [0, {end}), got {low}..{high}")
    if unit_tokens > 1 and bool((ids % unit_tokens != 0).any()):
        raise ValueError(f"ids must be multiples of {unit_tokens}, the first entries of units")


def _layer(world: World, message: Message) -> int:
    if not 0 <= message.header.layer < len(world.config.model.layers):
        raise ValueError(f"layer {message.header.layer} does not exist")
    return message.header.layer


def _unit_tokens(world: World, message: Message) -> int:
    unit_tokens = message.header.unit_tokens
    if unit_tokens < 1 or world.config.block_tokens % unit_tokens:
        raise ValueError(f"units of {unit_tokens} tokens do not fit the blocks")
    return unit_tokens


def _column(columns: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int) -> Tensor:
    if name not in columns:
        raise ValueError(f"column {name!r} is missing")
    column = columns[name]
    if column.dtype != dtype or column.dim() != dims:
        raise ValueError(f"column {name!r} must be {dtype} with {dims} dims, got {column.dtype}")
    return column
