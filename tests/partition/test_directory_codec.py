"""A directory as columns of a message: it comes back as it was, and nothing malformed is taken."""

from __future__ import annotations

import pytest
import torch
from directories import B, empty

from qroam.partition.directory import Directory, with_document, without_document
from qroam.partition.directory_codec import directory_columns, directory_of
from qroam.partition.repair import repaired


def test_a_block_that_nobody_has_is_not_shared_and_its_content_stays_known() -> None:
    hashes = [bytes([number]) * 32 for number in range(3)]

    def one_more(directory: Directory, name: str, rank: int) -> Directory:
        fresh = 3 - len(directory.prefix(hashes))
        ranks = torch.tensor([0, rank, 0], dtype=torch.int32)[3 - fresh :].view(-1, 1, 1)
        return with_document(
            directory, name, tokens=3 * B, position=0, ranks=ranks, capacity=9, hashes=hashes
        )

    def sent(directory: Directory) -> Directory:
        read = directory_of(directory_columns(directory), empty(), world_size=4, capacity=9)
        assert (read.documents, read.hashed) == (directory.documents, directory.hashed)
        return read

    before = one_more(one_more(empty(), "a", 1), "b", 1)
    lost = sent(repaired(before, [0, -1, 2, 3], world_size=4, capacity=9, index_capacity=9))
    assert lost.prefix(hashes) == lost.document("a").blocks[:1]
    again = one_more(lost, "again", 2)
    assert again.document("again").shared == 1
    assert sent(again).prefix(hashes) == again.document("again").blocks
    assert sent(without_document(again, "a")).prefix(hashes) == again.document("again").blocks
    assert sent(without_document(again, "again")).prefix(hashes) == lost.prefix(hashes)
    columns = directory_columns(again)
    columns["blocks"] = columns["blocks"].clone()
    columns["blocks"][3:6] = columns["blocks"][3:6].flip(0)  # those of b
    with pytest.raises(ValueError, match="'b' says of a block"):
        directory_of(columns, empty(), world_size=4, capacity=9)
