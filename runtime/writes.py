"""Writes: rows written here, in the copies of this rank at once, and staged for copies elsewhere.

A block is written once and in order, by whoever computed it. Copies elsewhere get the rows with the
next exchange of that layer. What was sent with a step stands in `sent` until the next step shows that
all ranks took it.

Letters: n rows, G branches, D columns, W ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..partition.codec import Codec
from ..partition.pool import KINDS, Kind
from .config import RuntimeConfig
from .stores import Stores
from .tables import Tables
from .transport.base import Column
from .transport.messages import Message
from .transport.schema import column

_COLUMNS: Mapping[Kind, str] = {"entries": "push", "index": "push_index"}


class Push(NamedTuple):
    """Written rows on their way to a copy elsewhere: stored ids (n,) and encoded rows (n, bytes)."""

    holder: Tensor
    ids: Tensor
    rows: Tensor

    def only(self, kept: Tensor) -> Push:
        """The rows that are `kept` (n,) bool."""
        return Push(self.holder[kept], self.ids[kept], self.rows[kept])


Staged = dict[Kind, list[list[Push]]]  # by kind and layer


class Writes:
    """The staged writes of one rank, and the way of rows into its stores."""

    def __init__(self, config: RuntimeConfig, tables: Tables, stores: Stores) -> None:
        self._config, self._tables, self._stores = config, tables, stores
        self._staged = self._nothing()
        self._sent: list[
            tuple[int, dict[Kind, list[Push]]]
        ] = []  # by step: its layer, what it took

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None, *, push: bool
    ) -> None:
        """Encode entries (n, G, D) and index keys (n, D) of entry ids (n,) into the copies held here.

        With `push`, copies elsewhere are staged for the layer's next step; without, other ranks are
        given the same entries and write theirs.
        """
        stored = self._stores.stored_ids(ids)
        here = self._stores.entries.holds(stored)
        flat = entries.flatten(0, 1)
        codec, index_codec = self._stores.entries.codecs[layer], self._stores.index.codecs[layer]
        assert codec is not None
        # Both are encoded before either is written: what has no encoding changes nothing.
        rows = self._encode(codec, flat, torch.ones_like(here) if push else here)
        index_rows = None
        if index_keys is not None:
            assert index_codec is not None
            index_rows = self._encode(index_codec, index_keys, torch.ones(len(ids)).bool())
        if push:
            self.write_rows(layer, ids, rows, index_rows)
            return
        self._stores.entries.write(layer, stored[here], rows)
        if index_rows is not None:
            held = self._stores.index.holds(ids)
            self._stores.index.write(layer, ids[held], index_rows[held])

    def write_rows(self, layer: int, ids: Tensor, rows: Tensor, index_rows: Tensor | None) -> None:
        """Write encoded rows (n * G, bytes) of entry ids (n,), and index keys' (n, bytes), into the
        copies here; those elsewhere are staged for the layer's next step.
        """
        stored = self._stores.stored_ids(ids)
        here = self._stores.entries.holds(stored)
        self._stores.entries.write(layer, stored[here], rows[here])
        self.stage("entries", layer, stored, rows)
        if index_rows is not None:
            here = self._stores.index.holds(ids)
            self._stores.index.write(layer, ids[here], index_rows[here])
            self.stage("index", layer, ids, index_rows)

    def apply(self, message: Message) -> None:
        """Write the rows that a peer computed for blocks, or index keys, held here.

        Raises: ValueError for rows that are not of the corpus, not numbers, or not the next ones.
        """
        for kind, name in _COLUMNS.items():
            if f"{name}.ids" in message.columns or f"{name}.rows" in message.columns:
                ids, rows = column(message, f"{name}.ids"), column(message, f"{name}.rows")
                self._check_rows(kind, message.header.layer, ids, rows)
                self._stores.of(kind).write(message.header.layer, ids, rows)

    # What is staged ------------------------------------------------------------------------------

    def stage(self, kind: Kind, layer: int, ids: Tensor, rows: Tensor) -> None:
        """Keep encoded rows (n, bytes) of ids (n,), stored ids or of index keys, for the copies
        elsewhere, until the layer's next step.
        """
        for copy in self._tables.holders(kind, ids // self._config.block_tokens).unbind(1):
            away = (copy >= 0) & (copy != self._tables.rank)
            if bool(away.any()):
                self.stage_for(kind, layer, Push(copy[away], ids[away], rows[away].cpu()))

    def stage_for(self, kind: Kind, layer: int, push: Push) -> None:
        """Keep rows for the ranks that they name."""
        self._staged[kind][layer].append(push)

    def staged_at(self, layer: int) -> dict[Kind, list[Push]]:
        """What is staged now, for `put_back` if it turns out that nobody may have got it."""
        return {kind: staged[layer] for kind, staged in self._staged.items()}

    def put_back(self, layer: int, pushes: Mapping[Kind, list[Push]]) -> None:
        """Stage again what was drained."""
        for kind, staged in self._staged.items():
            staged[layer] = pushes[kind]

    def drain(self, layer: int, not_to: Collection[int] = ()) -> list[Column]:
        """The columns of what was written for other ranks at this layer, forgotten once taken; what
        is for the ranks `not_to` stays.
        """
        columns: list[Column] = []
        staying = torch.tensor(sorted(not_to), dtype=torch.int32)
        for kind, name in _COLUMNS.items():
            staged = self._staged[kind]
            pushes, staged[layer] = staged[layer], []
            if len(staying):
                stays = [torch.isin(push.holder, staying) for push in pushes]
                kept = [push.only(here) for push, here in zip(pushes, stays, strict=True)]
                pushes = [push.only(~here) for push, here in zip(pushes, stays, strict=True)]
                staged[layer] = [push for push in kept if len(push.ids)]
            if any(len(push.ids) for push in pushes):
                holder = torch.cat([push.holder for push in pushes]).long()
                order = holder.argsort(stable=True)
                counts = torch.bincount(holder, minlength=self._tables.world_size)
                ids = torch.cat([push.ids for push in pushes])
                rows = torch.cat([push.rows for push in pushes])
                columns.append(Column(f"{name}.ids", ids, counts, order))
                columns.append(Column(f"{name}.rows", rows, counts, order))
        return columns

    # What a step took ----------------------------------------------------------------------------

    def begin_step(self, layer: int) -> int:
        """Note what a step of this layer is about to take; returns how many steps before are noted."""
        before = len(self._sent)
        self._sent.append((layer, self.staged_at(layer)))
        return before

    def confirm(self, steps: int | None = None) -> None:
        """All ranks took what the first `steps` noted ones sent; None: all of them."""
        del self._sent[:steps]

    def forget(self, gone: Mapping[Kind, Tensor]) -> None:
        """Forget rows of these keys (n,), by kind, staged or sent."""
        for kind, keys in gone.items():
            for staged in [*self._staged[kind], *(sent[kind] for _, sent in self._sent)]:
                left = [
                    push.only(~torch.isin(push.ids // self._config.block_tokens, keys))
                    for push in staged
                ]
                staged[:] = [push for push in left if len(push.ids)]

    def take_unconfirmed(self) -> Staged:
        """All that is staged, or was sent and not confirmed, and forget it here."""
        taken = {kind: [list(pushes) for pushes in self._staged[kind]] for kind in KINDS}
        for layer, sent in reversed(self._sent):
            for kind in KINDS:
                taken[kind][layer][:0] = sent[kind]
        self._sent.clear()
        self._staged = self._nothing()
        return taken

    def swap(self, staged: Staged) -> Staged:
        """Stage this instead; returns what was staged."""
        self._staged, before = staged, self._staged
        return before

    def _nothing(self) -> Staged:
        return {kind: [[] for _ in self._config.model.layers] for kind in KINDS}

    def _encode(self, codec: Codec, entries: Tensor, chosen: Tensor) -> Tensor:
        """Rows of the `chosen` (N,) of entries (N, D), where these are, tile by tile within the
        workspace."""
        at = chosen.nonzero()[:, 0]
        rows = entries.new_empty(len(at), codec.entry_bytes, dtype=torch.uint8)
        step = max(self._config.workspace_bytes // (16 * codec.dim), 1)
        for start in range(0, len(at), step):
            tile = slice(start, start + step)
            rows[tile] = codec.encode(entries[at[tile]])
        return rows

    def _check_rows(self, kind: Kind, layer: int, ids: Tensor, rows: Tensor) -> None:
        """Entries of documents, and numbers: what is stored is read without another look."""
        config = self._config
        if not 0 <= layer < len(config.model.layers):
            raise ValueError(f"layer {layer} does not exist")
        codec, branches = self._stores.of(kind).codecs[layer], self._stores.branches_of(kind)
        if codec is None or rows.shape != (len(ids), codec.entry_bytes):
            raise ValueError(f"rows {tuple(rows.shape)} were pushed that this rank does not store")
        check_ids(ids, self._stores.corpus_ids(kind), 1)
        block, offset = ids // (config.block_tokens * branches), ids % config.block_tokens
        if bool((offset >= self._tables.directory.tokens[block]).any()):
            raise ValueError("rows were pushed beyond the end of their document")
        step = max(config.workspace_bytes // (16 * codec.dim), 1)
        if not all(codec.decode(tile, torch.float64).isfinite().all() for tile in rows.split(step)):
            raise ValueError("rows were pushed that hold NaN or infinity")


def check_ids(ids: Tensor, end: int, unit_tokens: int) -> None:
    """Raise ValueError unless ids (n,) lie in [0, end), each the first of a unit."""
    if len(ids) == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= end:
        raise ValueError(f"ids must lie in [0, {end}), got {low}..{high}")
    if unit_tokens > 1 and bool((ids % unit_tokens != 0).any()):
        raise ValueError(f"ids must be multiples of {unit_tokens}, the first entries of units")
