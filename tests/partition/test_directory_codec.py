"""A directory as columns of a message: it comes back as it was, and nothing malformed is taken."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from directories import B, added, empty
from torch import Tensor

from qroam.partition.directory import (
    Directory,
    with_document,
    with_pin,
    with_quota,
    without_document,
)
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
    with pytest.raises(ValueError, match="'b' has another content hash"):
        directory_of(columns, empty(), world_size=4, capacity=9)


def several() -> Directory:
    """Three documents with a pin, quotas, a group and a position; one was removed before them."""
    directory = without_document(added(empty(), "gone", 3 * B), "gone")
    directory = added(added(directory, "a", 2 * B + 3, position=7), "ü", B)
    return with_quota(with_quota(with_pin(directory, "a", True), "g", 3), "h", 0)


def test_a_directory_comes_back_as_it_was() -> None:
    before = several()
    after = directory_of(directory_columns(before), empty(), world_size=4, capacity=9)
    assert (after.documents, after.pinned, after.quotas) == (
        before.documents,
        before.pinned,
        before.quotas,
    )
    assert (after.version, after.serial, after.hashed) == (
        before.version,
        before.serial,
        before.hashed,
    )
    for name in ("owners", "slots", "generations", "tokens", "references", "used"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name


def set_to(value: int, *places: int) -> Callable[[Tensor], Tensor]:
    def change(rows: Tensor) -> Tensor:
        rows = rows.clone()
        for place in places:
            rows.view(-1)[place] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("column", "change", "says"),
    [
        ("documents", lambda rows: rows.int(), r"documents are torch.int32"),
        ("documents", lambda rows: rows[:-1], "not valid msgpack|not what this version"),
        ("blocks", lambda rows: rows[None], r"blocks are torch.int32 \(1, 4\)"),
        ("blocks", lambda rows: rows[:-1], "document 'ü' has invalid blocks or hashes"),
        ("blocks", lambda rows: torch.cat((rows, rows[:1])), "blocks are left over"),
        ("blocks", set_to(99, 0), "document 'a' has invalid blocks or hashes"),
        ("owners", lambda rows: rows.long(), r"owners are not int32 \(16, 1\)"),
        ("owners", set_to(4, 0), "not ranks of a world of 4"),
        ("slots", set_to(9, 0), "slots are not below 9"),
        ("slots", set_to(-1, 0), "not as many as owners"),
        ("owners", set_to(2, 0, 2), "a slot is given twice"),
        ("generations", set_to(-1, 5), "a generation is negative"),
    ],
)
def test_malformed_columns_are_refused(
    column: str, change: Callable[[Tensor], Tensor], says: str
) -> None:
    columns = directory_columns(several())
    columns[column] = change(columns[column])
    with pytest.raises(ValueError, match=says):
        directory_of(columns, empty(), world_size=4, capacity=9)
