"""A closed block's bytes in one piece, and their name, a hash.

Letters: L layers, B tokens of a block, n keys. The *record* of a key is its block's encoded rows of
every layer that stores any, in layer order, B rows each, zeros beyond the block's last token. It
holds no ids, slots or ranks, so equal blocks have equal records and equal hashes everywhere.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from ..pool import BlockStore

HASH_BYTES = 16
BATCH_BYTES = 4 << 20  # copied, hashed, sent or written at a time by one thread


def block_hash(record: Tensor, tokens: int) -> bytes:
    """The name of a closed block's bytes: 16 bytes of sha256 over its number of tokens and its record.

    Args: record: (record bytes,) uint8, contiguous, on the CPU.
    """
    hasher = hashlib.sha256(struct.pack("<q", tokens))
    hasher.update(record.numpy().data)
    return hasher.digest()[:HASH_BYTES]


def hash_records(records: Tensor, tokens: Tensor) -> Tensor:
    """(n, HASH_BYTES) uint8: the hash of each record (n, record bytes) of `tokens` (n,) tokens."""
    pairs = zip(records, tokens.tolist(), strict=True)
    return hash_table(b"".join(block_hash(record, count) for record, count in pairs))


def hash_table(hashes: bytes) -> Tensor:
    """(n, HASH_BYTES) uint8 of concatenated hashes."""
    table = torch.frombuffer(bytearray(hashes), dtype=torch.uint8) if hashes else torch.empty(0)
    return table.to(torch.uint8).view(-1, HASH_BYTES)


def is_known(table: Tensor) -> Tensor:
    """Which hashes (n, HASH_BYTES) are not all zeros: (n,) bool."""
    return (table != 0).any(1)


def record_bytes(store: BlockStore) -> int:
    return sum(codec.entry_bytes for codec in store.codecs if codec) * store.block_tokens


def rows_within(num_bytes: int, width: int) -> int:
    """Records of `width` bytes, at least one, that fit into so many bytes."""
    return max(num_bytes // max(width, 1), 1)


def closed(store: BlockStore, keys: Tensor, tokens: Tensor) -> Tensor:
    """Whether each key's block (n,) is here with all of its tokens (n,), in every layer."""
    slots = store.slot_of[keys.long()].long()
    stored = torch.tensor([codec is not None for codec in store.codecs])
    full = (store.fill[stored][:, slots.clamp(min=0)] == tokens).all(0)
    return (slots >= 0) & (tokens > 0) & full


def take_records(
    store: BlockStore, slots: Tensor, tokens: Tensor, *, into: Tensor | None = None
) -> Tensor:
    """The records (n, record bytes) uint8 of the blocks in `slots` (n,): copies, in `into` if given."""
    width = record_bytes(store)
    records = torch.empty(len(slots), width, dtype=torch.uint8) if into is None else into
    short = (tokens < store.block_tokens).nonzero()[:, 0].tolist()
    for layer, rows in _layers_of(store, records):
        store.copy_out(layer, slots, rows)
        for at in short:
            rows[at, int(tokens[at]) :] = 0
    return records


def put_records(store: BlockStore, keys: Tensor, tokens: Tensor, records: Tensor) -> None:
    """Write records (n, record bytes) into the empty blocks of `keys` (n,), which are held here."""
    slots = store.slot_of[keys.long()].long()
    for layer, rows in _layers_of(store, records):
        store.copy_in(layer, slots, rows, tokens)


def _layers_of(store: BlockStore, records: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each layer that stores anything, and its rows (n, B, entry_bytes) of records: views."""
    start = 0
    for layer, codec in enumerate(store.codecs):
        if codec is not None:
            end = start + store.block_tokens * codec.entry_bytes
            rows = records[:, start:end].view(-1, store.block_tokens, codec.entry_bytes)
            yield layer, rows
            start = end


class BlockHashes:
    """The hash each key's block had when it was last read, in the generation it then had."""

    def __init__(self, num_keys: int) -> None:
        self._hashes = torch.zeros(num_keys, HASH_BYTES, dtype=torch.uint8)
        self._generation = torch.full((num_keys,), -1, dtype=torch.int32)

    def find(self, keys: Tensor, generations: Tensor) -> tuple[Tensor, Tensor]:
        """(n, HASH_BYTES) hashes of keys (n,), and whether they are of those generations (n,)."""
        keys = keys.long()
        return self._hashes[keys], self._generation[keys] == generations

    def keep(self, keys: Tensor, generations: Tensor, hashes: Tensor) -> None:
        self._hashes[keys.long()] = hashes
        self._generation[keys.long()] = generations.to(torch.int32)
