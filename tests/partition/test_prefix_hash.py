"""Content hashes: vLLM's convention to the byte, and what makes two prefixes equal."""

from __future__ import annotations

import hashlib

import pytest

from qroam.partition.prefix_hash import block_hashes


def sha(encoded: str) -> bytes:
    return hashlib.sha256(bytes.fromhex(encoded)).digest()


def test_hashes_are_those_of_sha256_over_canonical_cbor() -> None:
    """The encodings are written out by hand from RFC 8949: array of 3, bytes of 32, array, null."""
    none = sha("6e" + b"vllm-none-hash".hex())
    tokens = (0, 23, 24, 255, 256, 65535, 65536, 2**32)
    encoded = "88" + "00" + "17" + "1818" + "18ff" + "190100" + "19ffff" + "1a00010000"
    encoded += "1b0000000100000000"
    first = sha("83" + "5820" + none.hex() + encoded + "f6")
    second = sha("83" + "5820" + first.hex() + encoded + "f6")
    assert block_hashes(tokens * 2, block_tokens=8) == (first, second)
    salted = sha("83" + "5820" + none.hex() + encoded + "81" + "62" + b"me".hex())
    assert block_hashes(tokens, block_tokens=8, salt="me") == (salted,)
    # PYTHONHASHSEED=0: vLLM hashes the text of the seed.
    (seeded,) = block_hashes(tokens, block_tokens=8, seed="0")
    assert seeded == sha("83" + "5820" + sha("6130").hex() + encoded + "f6")


def test_only_full_blocks_have_a_hash_and_it_covers_the_prefix() -> None:
    tokens = list(range(20))
    whole = block_hashes(tokens, block_tokens=8)
    assert len(whole) == 2
    assert block_hashes(tokens[:16], block_tokens=8) == whole
    assert block_hashes(tokens[:7], block_tokens=8) == ()
    later = block_hashes([*tokens[:9], 99, *tokens[10:]], block_tokens=8)
    assert later[0] == whole[0]
    assert later[1] != whole[1]
    other = block_hashes([99, *tokens[1:]], block_tokens=8)
    assert not set(other) & set(whole)


def test_salt_and_position_tell_blocks_of_equal_tokens_apart() -> None:
    tokens = list(range(16))
    kinds = [
        block_hashes(tokens, block_tokens=8, position=position, salt=salt)
        for position in (0, 1, 2)
        for salt in (None, "a", "b")
    ]
    assert len({content for kind in kinds for content in kind}) == 2 * len(kinds)


@pytest.mark.parametrize("token", [-1, 2**64])
def test_token_ids_out_of_range_are_refused(token: int) -> None:
    with pytest.raises(ValueError, match="token ids must be"):
        block_hashes([token], block_tokens=1)
