"""Who owns what and whom to ask: owners, holders of each kind, versions, and the copy to ask."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import small_config
from strategies import EVERYWHERE

from qroam.partition.directory import with_document, without_document
from qroam.partition.placement import Placement
from qroam.runtime.tables import Tables, chosen_copy, replaceable


@given(data=st.data(), ranks=st.integers(1, 5), copies=st.integers(1, 4), units=st.integers(0, 6))
@settings(EVERYWHERE, max_examples=100)
def test_the_copy_to_ask(data: st.DataObject, ranks: int, copies: int, units: int) -> None:
    """Against a plain reading: the best kind of rank, and of those the first from the preferred on."""
    rank = st.integers(-1, ranks - 1)
    table = data.draw(st.lists(st.lists(rank, min_size=copies, max_size=copies), max_size=units))
    askable = data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    preferred = data.draw(st.integers(0, copies - 1))
    owners = torch.tensor(table, dtype=torch.int32).view(-1, copies)
    vector = torch.tensor(askable, dtype=torch.uint8)
    expected, alone = [], set()
    for row in table:
        turned = row[preferred:] + row[:preferred]
        usable = [holder for holder in turned if holder >= 0 and askable[holder]]
        best = sorted(usable, key=lambda holder: -askable[holder])[:1] or [-1]
        expected += best
        alone |= set(best) if len(usable) < 2 else set()
    chosen = chosen_copy(owners, preferred, vector)
    assert chosen.tolist() == expected
    spare = replaceable(owners, chosen, vector, world_size=ranks)
    assert spare.tolist() == [rank not in alone for rank in range(ranks)]


def tables(**changes: Any) -> Tables:
    """Rank 0 of three, with a document of three blocks: owners 0, 1, 2, each with a copy at the next."""
    config = small_config(placement=Placement(copies=2), **changes)
    found = Tables(config, 0, 3)
    ranks = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32).view(3, 1, 2)
    grown = with_document(found.directory, "doc", tokens=24, position=0, ranks=ranks, capacity=9)
    found.adopt(grown)
    return found


def test_owners_of_the_corpus_and_of_private_blocks() -> None:
    found, keys = tables(), torch.tensor([0, 2, 5, 8, -1])  # 8 blocks, the last 5 are free
    expected = [[0, 1], [2, 0], [-1, -1], [-1, -1], [-1, -1]]
    assert found.owners(keys).tolist() == expected
    assert found.holders("entries", keys).tolist() == expected
    assert found.holders("index", keys[:2]).tolist() == expected[:2]
    replicated = tables(index_placement="replicated").holders("index", keys[:4])
    assert replicated.tolist() == [[0, 1, 2]] * 3 + [[-1, -1, -1]]


def test_whom_to_ask_is_said_only_when_it_matters() -> None:
    found = tables()
    assert found.askable(()) is None
    asked = found.askable((2,))
    assert asked is not None
    assert asked.tolist() == [2, 2, 0]
    assert found.scorers(torch.arange(3), asked).tolist() == [0, 1, 0]
    found.avoided = frozenset({0})
    asked = found.askable(())
    assert asked is not None
    assert asked.tolist() == [1, 2, 2]
    found.reconnect(1, 2)
    assert (found.rank, found.world_size, found.avoided) == (1, 2, frozenset())


def test_the_version_follows_directory_and_weights() -> None:
    found, other = tables(), tables()
    assert found.version == other.version
    found.mark_weights(0, [torch.ones(2)])
    assert found.version != other.version
    other.mark_weights(1, [torch.ones(2)])
    assert found.version != other.version
    same = tables()
    same.mark_weights(0, [torch.ones(2)])
    assert same.version == found.version
    same.adopt(without_document(same.directory, "doc"))
    assert same.version != found.version
    assert same.generations(torch.tensor([0, 16, 500])).tolist() == [1, 1, 0]
