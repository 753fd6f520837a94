"""Records of blocks: equal wherever a block lies, and hashes that tell every bit apart."""

from __future__ import annotations

import hashlib
import struct

import torch
from snapshot_files import B

from qroam.partition.codec import make_codec
from qroam.partition.pool import BlockStore
from qroam.partition.snapshot.record import (
    BlockHashes,
    block_hash,
    closed,
    put_records,
    take_records,
)


def test_a_record_is_the_same_wherever_its_block_lies() -> None:
    codecs = [make_codec("fp32", dim=5), None, make_codec("fp8_index", dim=32)]
    one, other = (BlockStore(codecs, num_slots=4, num_keys=6, block_tokens=B) for _ in range(2))
    tokens = torch.tensor([4, 3], dtype=torch.int32)
    one.assign(torch.tensor([0, 1]), torch.tensor([2, 0]))
    for layer, codec in enumerate(codecs):
        if codec is not None:
            entries = torch.randn(7, codec.dim, generator=torch.Generator().manual_seed(layer))
            assert not closed(one, torch.tensor([0, 1]), tokens).any()
            one.write(layer, torch.arange(7), codec.encode(entries))
    assert closed(one, torch.tensor([0, 1]), tokens).all()
    assert not closed(one, torch.tensor([0, 1, 5]), torch.tensor([3, 4, 4])).any()
    records = take_records(one, torch.tensor([2, 0]), tokens)
    assert not records[1, 3 * 20 : 4 * 20].any()  # what lies beyond the last token says nothing
    other.assign(torch.tensor([4, 3]), torch.tensor([1, 3]))
    put_records(other, torch.tensor([4, 3]), tokens, records)
    assert torch.equal(take_records(other, torch.tensor([1, 3]), tokens), records)
    for layer in (0, 2):
        at = torch.arange(7)
        there = torch.tensor([16, 17, 18, 19, 12, 13, 14])
        ours, theirs = one.resolve(layer, at)[0], other.resolve(layer, there)[0]
        assert torch.equal(one.rows(layer, ours), other.rows(layer, theirs))


def test_a_hash_tells_every_bit_and_the_tokens_apart() -> None:
    record = torch.zeros(40, dtype=torch.uint8)
    names = {block_hash(record, tokens) for tokens in (1, 2, 3)}
    for at in range(40):
        changed = record.clone()
        changed[at] = 1 << (at % 8)
        names.add(block_hash(changed, 3))
    assert len(names) == 43
    # Pinned: snapshots of earlier versions stay readable.
    assert block_hash(record, 3) == hashlib.sha256(struct.pack("<q", 3) + bytes(40)).digest()[:16]


def test_a_known_hash_is_of_one_generation() -> None:
    hashes = BlockHashes(3)
    keys, name = torch.tensor([1]), torch.full((1, 16), 7, dtype=torch.uint8)
    assert not hashes.find(keys, torch.tensor([0]))[1].any()
    hashes.keep(keys, torch.tensor([4]), name)
    found, known = hashes.find(torch.tensor([0, 1, 1]), torch.tensor([4, 4, 5]))
    assert known.tolist() == [False, True, False]
    assert torch.equal(found[1], name[0])
