"""Errors name the ranks, queries and blocks that are at fault."""

from __future__ import annotations

import pytest

from qroam.runtime import BlocksLostError, CoverageError, PeerError, SnapshotError
from qroam.runtime.errors import Complaint, coverage_error, in_words


def test_a_peer_error_names_its_culprits() -> None:
    error = PeerError((2, 0), "no answer within 1 s")
    assert str(error) == "rank 2, rank 0: no answer within 1 s"
    assert (error.culprits, error.reason) == ((2, 0), "no answer within 1 s")
    assert str(PeerError((), "nobody is to blame")) == "nobody is to blame"


def test_lost_blocks_are_named_as_runs_of_a_document() -> None:
    blocks = {"a": (range(2), range(5, 6)), "b": (range(3, 7),)}
    assert in_words(blocks) == "0-1, 5 of 'a'; 3-6 of 'b'"
    error = BlocksLostError((1,), "it closed its runtime", blocks)
    assert error.blocks == blocks
    assert str(error).startswith("rank 1: it closed its runtime; nobody else has a copy of blocks ")
    assert str(error).endswith("0-1, 5 of 'a'; 3-6 of 'b'")
    with pytest.raises(PeerError):
        raise error


def test_a_coverage_error_names_layer_queries_and_holders_and_counts_the_rest() -> None:
    complaints = [Complaint(item, item % 3, "lacked 2 entries") for item in range(6)]
    error = coverage_error(7, complaints, branches=2)
    assert isinstance(error, CoverageError)
    assert error.holders == (0, 1, 2)
    assert str(error) == (
        "layer 7: query 0 at rank 0 lacked 2 entries; query 0 at rank 1 lacked 2 entries; "
        "query 1 at rank 2 lacked 2 entries; query 1 at rank 0 lacked 2 entries; and 2 more"
    )
    assert "more" not in str(coverage_error(0, complaints[:4], branches=1))


def test_bad_snapshots_are_bad_input_and_lost_peers_are_not() -> None:
    assert issubclass(SnapshotError, ValueError)
    assert issubclass(PeerError, RuntimeError)
    assert issubclass(CoverageError, RuntimeError)
