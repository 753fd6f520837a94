"""Content hashes of blocks in vLLM's convention: equal prefixes get equal hashes.

    hash[i] = sha256(cbor((parent, (token, token, ...), extra_keys))),  parent = hash[i - 1]

Only full blocks have one. The parent of the first is the hash of a seed, as vLLM computes it under
`sha256_cbor`. Entries depend on more than their tokens, and what else they depend on goes into the
`extra_keys` of the first block, from where the chain carries it on: a salt (the model's adapter, or
the documents a prefill attended to) and the canonical position, if it is not 0.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

SEED = "vllm-none-hash"
CONTENT_BYTES = 32  # of a hash

Item = bytes | str | int | None | Sequence["Item"]


def block_hashes(
    token_ids: Sequence[int],
    *,
    block_tokens: int,
    position: int = 0,
    salt: str | None = None,
    seed: str = SEED,
) -> tuple[bytes, ...]:
    """The hash of every full block of a document.

    With position 0 they are those of vLLM's `sha256_cbor` with `cache_salt` = salt and, by `seed`,
    the same PYTHONHASHSEED (or, from 0.33 on, none).

    Raises: ValueError for token ids that are negative or beyond 64 bits.
    """
    if any(token < 0 or token >= 2**64 for token in token_ids):
        raise ValueError("token ids must be in [0, 2**64)")
    extra: list[Item] = [] if salt is None else [salt]
    if position:
        extra.append(("position", position))
    parent, hashes = _sha256_cbor(seed), []
    for start in range(0, len(token_ids) - block_tokens + 1, block_tokens):
        keys = tuple(extra) if extra and start == 0 else None
        parent = _sha256_cbor((parent, tuple(token_ids[start : start + block_tokens]), keys))
        hashes.append(parent)
    return tuple(hashes)


def split_contents(hashes: bytes) -> tuple[bytes, ...]:
    """The single hashes of a concatenation."""
    starts = range(0, len(hashes), CONTENT_BYTES)
    return tuple(hashes[at : at + CONTENT_BYTES] for at in starts)


def _sha256_cbor(item: Item) -> bytes:
    return hashlib.sha256(_cbor(item)).digest()


def _cbor(item: Item) -> bytes:
    """Canonical CBOR (RFC 8949) of what a block hash is made of: tuples of bytes, text, ints, null."""
    match item:
        case None:
            return b"\xf6"
        case int():
            return _head(0, item)
        case bytes():
            return _head(2, len(item)) + item
        case str():
            text = item.encode()
            return _head(3, len(text)) + text
        case _:
            return _head(4, len(item)) + b"".join(map(_cbor, item))


def _head(major: int, value: int) -> bytes:
    """Major type and argument, the argument as short as can be."""
    if value < 24:
        return bytes([major << 5 | value])
    for code, width in ((24, ">BB"), (25, ">BH"), (26, ">BI"), (27, ">BQ")):
        if value < 1 << 8 * (struct.calcsize(width) - 1):
            return struct.pack(width, major << 5 | code, value)
    raise ValueError(f"{value} needs more than 64 bits")
