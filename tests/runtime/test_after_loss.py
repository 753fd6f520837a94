"""What a world that lost a rank still does: leases, new documents, and having the rank back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from faults import die
from incarnations import Lives, threads
from small_world import small, small_config

from qroam.partition.placement import Placement
from qroam.runtime import BlocksLostError, PeerError, Runtime


def test_a_lease_of_a_lost_block_names_it_and_hurts_nobody() -> None:
    lives = Lives(8.0)
    config = small_config(max_blocks=16, corpus_slots=16, private_blocks=16, request_blocks=8)

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 3)) as runtime:
            world = small(runtime)
            if rank == 1:
                die(lives.end(0, rank, 3))
                return
            with pytest.raises(PeerError):
                world.check()
            runtime.rejoin(lives.end(1, min(rank, 1), 2), incarnation=1)
            if rank == 0:
                with pytest.raises(BlocksLostError) as lost:
                    runtime.copy_document(runtime.request(), "doc")
                assert lost.value.blocks == runtime.lost_blocks() != {}
            else:
                runtime.copy_document(None, None)
            runtime.idle_attend(0)

    threads([partial(survivor, rank) for rank in range(3)])


def test_a_world_with_fewer_ranks_than_copies_takes_documents_and_fills_up_later() -> None:
    lives = Lives(8.0)
    config = small_config(
        max_blocks=16,
        corpus_slots=16,
        private_blocks=8,
        request_blocks=4,
        placement=Placement(copies=2),
    )

    def survivor(rank: int) -> None:
        with Runtime.open(config, lives.end(0, rank, 2)) as runtime:
            world = small(runtime)
            if rank == 1:
                die(lives.end(0, rank, 2))
                return
            with pytest.raises(PeerError):
                world.check()
            runtime.rejoin(lives.end(1, 0, 1), incarnation=1)
            dim = config.model.layers[0].entry_dim
            runtime.add_document("added", tokens=8)
            runtime.load_document("added", 0, torch.randn(8, 1, dim, dtype=torch.float64))
            request = runtime.request()
            ids = runtime.append(request, 16)
            runtime.write(0, ids, torch.randn(16, 1, dim, dtype=torch.float64))
            runtime.publish("published", request)
            runtime.rejoin(lives.end(2, 0, 2), incarnation=2)
            checks = runtime.verify_copies()
            assert all(check.is_sound for check in checks)
            assert {len(check.hashes) for check in checks} == {2}
            assert runtime.lost_blocks() == {}

    def newcomer() -> None:
        with Runtime.open(config, lives.end(2, 1, 2), incarnation=2) as runtime:
            assert all(check.is_sound for check in runtime.verify_copies())

    works: list[Callable[[], None]] = [partial(survivor, 0), partial(survivor, 1), newcomer]
    threads(works)
