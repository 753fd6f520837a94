"""A holder checks what it is asked: whoever asks something malformed is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from at_offsets import B, opened
from ranks import run_loopback
from spoiling import on, said
from torch import Tensor

from qroam.partition.presets import named_layout, uniform_model
from qroam.runtime import PeerError, Runtime, RuntimeConfig
from qroam.runtime.cpu.answer import answer_attend
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.loopback import LoopbackTransport
from qroam.runtime.transport.messages import Header, Message


def test_a_malformed_span_names_its_sender() -> None:
    spoil = on("attend", "A.hidden", lambda rows: rows[:, :1])
    for told in said(spoil, "always-route", unit_tokens=4):
        assert told.startswith("rank 1: "), told


@pytest.mark.parametrize(
    ("kind", "column", "change"),
    [
        ("attend", "A.offsets", lambda rows: torch.arange(len(rows), dtype=torch.int32)),
        ("attend", "A.offsets", lambda rows: rows[1:]),
        ("attend", "A.offsets", lambda rows: rows.long()),
        ("select", "index.offsets", lambda rows: rows[:, :0]),
        ("select", "index.offsets", lambda rows: rows.long()),
    ],
    ids=["too many", "one short", "another dtype", "none for a run", "index, another dtype"],
)
def test_wrong_offsets_name_their_sender(
    kind: str, column: str, change: Callable[[Tensor], Tensor]
) -> None:
    told, by_itself = said(on(kind, column, change), "always-route", position=7)
    assert told.startswith("rank 1: "), told
    assert by_itself.startswith("rank 1: ") or by_itself == "nothing"


def test_weights_that_differ_are_noticed() -> None:
    """Form B projects at the holder, with its own weights: they must be the requester's."""
    config = RuntimeConfig(
        model=uniform_model(named_layout("mla-tiny"), 1), max_blocks=8, deadline_s=10.0
    )

    def work(end: Transport) -> str:
        with Runtime.open(config, end) as runtime:
            generator = torch.Generator().manual_seed(end.rank)
            w_uk = torch.randn(1, 4, 32, 64, generator=generator)
            runtime.load_weights(0, w_uk, torch.randn(1, 4, 64, 32, generator=generator))
            with pytest.raises(PeerError, match="load_weights") as caught:
                runtime.idle_attend(0)
            return str(caught.value)

    assert all("tables" in told for told in run_loopback(2, work))


def test_a_column_nobody_reads_names_its_sender() -> None:
    class Adding(LoopbackTransport):
        def post_shares(self, header: Header, shares: Sequence[Mapping[str, Tensor]]) -> None:
            if self.rank == 1 and header.kind == "attend":
                shares = [{**share, "C.query": torch.ones(1)} for share in shares]
            super().post_shares(header, shares)

    config = RuntimeConfig(model=uniform_model(named_layout("mla-tiny"), 1), max_blocks=8)

    def work(end: Transport) -> str:
        with Runtime.open(config, end) as runtime, pytest.raises(PeerError) as caught:
            runtime.idle_attend(0)
        return str(caught.value)

    told, _ = run_loopback(2, work, transports=Adding.world(2, deadline_s=10.0))
    assert told == "rank 1: sent an invalid message: 'attend' messages have no column C.query"


def asked(runtime: Runtime, units: list[int], **sizes: int) -> dict[str, Tensor]:
    """What this rank answers to a message that fetches these units of layer 0."""
    header = runtime._world.header("attend", layer=0, **sizes)
    columns = {"fetch": torch.tensor(units, dtype=torch.int32)}
    return answer_attend(runtime._world, Message(header, columns))


def test_fetched_rows_are_those_that_are_stored_and_a_mark_says_what_is_missing() -> None:
    with opened() as runtime:
        store, document = runtime._world.stores.entries, runtime.documents()[1]
        unwritten = 4 * B  # the first block that no document has
        ids = torch.tensor([document.start, document.start + 3, unwritten], dtype=torch.int32)
        found = asked(runtime, ids.tolist())
        index, here = store.resolve(0, ids)
        assert here.tolist() == [True, True, False]
        assert torch.equal(found["fetch.rows"][:2], store.rows(0, index[:2]))
        assert (found["fetch.mark"] != 0).tolist() == [True, True, False]


def test_what_cannot_be_fetched_is_refused() -> None:
    with opened() as runtime:
        for units, sizes, says in (
            ([4, 4], {}, "units to fetch repeat"),
            ([-1], {}, "ids"),
            ([1 << 20], {}, "ids"),
            ([0], {"unit_tokens": 3}, "units of 3 tokens do not fit the blocks"),
        ):
            with pytest.raises(ValueError, match=says):
                asked(runtime, units, **sizes)
        assert asked(runtime, [])["fetch.rows"].shape[0] == 0
