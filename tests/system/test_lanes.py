"""Instances with tensor-parallel lanes: a rank has some of the heads, and its lane is its world.

World: 2 instances of 2 lanes unless said; ranks 0 and 1 are instance 0, 2 and 3 instance 1. Letters:
Q queries, H heads of the model, G its branches, h heads of a branch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import Architecture, Case, make_config
from effort import slow_after, slow_between
from instances import (
    HALVES,
    HEADS,
    INSTANCES,
    PREFILLED,
    TOKENS,
    B,
    Play,
    Q,
    config_of,
    whole_layout,
)
from player import Player
from ranks import RankPool, run_loopback
from torch import Tensor

from qroam.partition.head_split import Heads, lane_layout
from qroam.partition.layout import Form, Layout
from qroam.runtime import Runtime
from qroam.runtime.observe.explain import DecisionLine
from qroam.runtime.tools.cli import main
from qroam.runtime.transport.base import Transport

UNEVEN: tuple[Heads, ...] = ((0, 3), (3, 5))


class Played(NamedTuple):
    """A rank's outputs (Q, its heads, D) and selections in order, counters, and the last decisions."""

    outs: list[Tensor]
    selections: list[Tensor]
    stats: dict[str, Any]
    lines: list[DecisionLine]
    predicted_s: float


def run_part(transport: Transport, play: Play, heads: Heads | None, own_world: bool) -> Played:
    """A rank's part: all of the heads, or those of its lane; in a world of all lanes, or of its own."""
    whole = whole_layout(play)
    start, count = heads or (0, HEADS)
    local = lane_layout(whole, start, count)
    layout = local if own_world else whole
    with Runtime.open(
        config_of(play, layout), transport, heads=None if own_world else heads
    ) as runtime:
        assert runtime.config.model.layers == (local,)
        assert runtime.world_size == INSTANCES
        return _played(runtime, play, Share(whole, start, start + count))


class Share(NamedTuple):
    """What a lane with heads [start, end) is given of the tensors of the whole model."""

    whole: Layout
    start: int
    end: int

    def heads(self, rows: Tensor, dim: int) -> Tensor:
        return rows.narrow(dim, self.start, self.end - self.start)

    def branches(self, entries: Tensor) -> Tensor:
        return entries[:, [b for b, _, _ in self._kept()]]

    def weights(self, weight: Tensor) -> Tensor:
        """Of (G, h, ...) the branches kept, and their heads."""
        return torch.stack([weight[b, first:last] for b, first, last in self._kept()])

    def _kept(self) -> list[tuple[int, int, int]]:
        kept = []
        for b, branch in enumerate(self.whole.branches):
            ours = [
                head
                for head in range(branch.heads)
                if self.start <= branch.head_start + head < self.end
            ]
            if ours:
                kept.append((b, ours[0], ours[-1] + 1))
        return kept


def _played(runtime: Runtime, play: Play, share: Share) -> Played:
    layout, noise = share.whole, torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    if play.weights:
        assert layout.projection is not None
        nope, out = layout.projection.nope_dim, layout.projection.out_dim
        branch = (layout.num_branches, layout.branch_heads)
        w_uk = normal(*branch, nope, layout.absorbed_dim) / math.sqrt(layout.absorbed_dim)
        w_uv = normal(*branch, layout.value_dim, out) / math.sqrt(layout.value_dim)
        runtime.load_weights(0, share.weights(w_uk), share.weights(w_uv))
    contents = {}
    for name, tokens in (("loaded", TOKENS), ("prefilled", PREFILLED)):
        runtime.add_document(name, tokens=tokens)
        entries = normal(tokens, layout.num_branches, layout.entry_dim)
        contents[name] = share.branches(entries), normal(tokens, 8).float()
    runtime.load_document("loaded", 0, *contents["loaded"])
    if runtime.rank == 1:  # what is written here travels to the lane's other rank
        with_rows = runtime.request(into="prefilled")
        ids = runtime.append(with_rows, PREFILLED)
        runtime.write(0, ids, *contents["prefilled"])
    runtime.idle_attend(0)

    request = runtime.request(["loaded", "prefilled"])
    outs, selections = [], []
    noise.manual_seed(100 + runtime.rank)

    def step() -> None:
        at = runtime.append(request, Q)
        entries = normal(Q, layout.num_branches, layout.entry_dim)
        runtime.write(0, at, share.branches(entries), normal(Q, 8).float())
        scope = runtime.scope(requests=[(request, at)])
        selection = runtime.select(0, normal(Q, 3, 8), normal(Q, 3), scope=scope)
        dim = layout.query_dim if play.weights else layout.key_dim
        query, sink = normal(Q, layout.heads, dim), normal(layout.heads)
        out = runtime.attend(0, share.heads(query, 1), selection, sink=share.heads(sink, 0))
        outs.append(out)
        selections.append(selection.ids)

    step()
    if play.serves:
        with runtime.serve() as service:
            step()
            assert service.wait(10.0)
    step()
    return Played(outs, selections, runtime.stats(), runtime.explain(), runtime.predicted_s())


def in_lanes(transport: Transport, play: Play) -> Played:
    lane = play.lanes[transport.rank % len(play.lanes)]
    return run_part(transport, play, lane, own_world=False)


def by_lane(play: Play, played: Sequence[Played]) -> list[list[Played]]:
    """The ranks' parts, lane by lane, instances in order."""
    return [list(played[at :: len(play.lanes)]) for at in range(len(play.lanes))]


def check_against_one_lane(play: Play, lanes: list[list[Played]]) -> None:
    alone = run_loopback(INSTANCES, lambda end: run_part(end, play, None, own_world=True))
    for instance, expected in enumerate(alone):
        parts = [lane[instance] for lane in lanes]
        assert len(expected.outs) == (3 if play.serves else 2)
        for at, out in enumerate(expected.outs):
            together = torch.cat([part.outs[at] for part in parts], dim=1)
            assert together.shape == out.shape
            assert float((together - out).abs().max()) <= 1e-12
        for part in parts:
            for mine, ids in zip(part.selections, expected.selections, strict=True):
                assert torch.equal(mine, ids), "lanes select the same"


PLAYS = {
    "form B": Play(),
    "key space": Play(weights=False),
    "uneven": Play(lanes=UNEVEN),
    "route": Play(mode="always-route", weights=False, copies=2),
    "fetch": Play(mode="always-fetch", lease_entries=64),
    "service": Play(serves=True, mode="always-route"),
    "mlra-4": Play(architecture="mlra-4", lanes=UNEVEN),
    "mlra-4 key space": Play(architecture="mlra-4", weights=False),
    "mlra-2": Play(architecture="mlra-2"),
    "mlra-2 quarters": Play(architecture="mlra-2", lanes=((0, 2), (2, 2), (4, 2), (6, 2))),
    "mlra-2 key space": Play(architecture="mlra-2", weights=False, serves=True),
}


@pytest.mark.parametrize("play", slow_between(2, PLAYS.values()), ids=PLAYS.keys())
def test_lanes_equal_the_single_lane(play: Play) -> None:
    played = run_loopback(INSTANCES * len(play.lanes), lambda end: in_lanes(end, play))
    check_against_one_lane(play, by_lane(play, played))


def gloo_lanes(transport: Transport, play: Play) -> tuple[Played, Played]:
    """Over the pool's transport, which goes on, and over one that the runtime makes and closes."""
    given = in_lanes(transport, play)
    lane = play.lanes[transport.rank % len(play.lanes)]
    with Runtime.open(config_of(play, whole_layout(play)), heads=lane) as runtime:
        share = Share(whole_layout(play), lane[0], sum(lane))
        return given, _played(runtime, play, share)


def test_lanes_equal_the_single_lane_on_four_processes(four_ranks: RankPool) -> None:
    play = PLAYS["service"]
    both = four_ranks.run(gloo_lanes, play)
    for played in zip(*both, strict=True):
        check_against_one_lane(play, by_lane(play, played))


@pytest.mark.parametrize("play", slow_after(1, [PLAYS["form B"], PLAYS["uneven"], PLAYS["mlra-2"]]))
def test_a_lane_is_a_world_of_its_own(play: Play) -> None:
    """Bit by bit, byte by byte, and in what it decides and predicts."""
    play = replace(play, mode="auto")
    played = run_loopback(INSTANCES * len(play.lanes), lambda end: in_lanes(end, play))
    for heads, ranks in zip(play.lanes, by_lane(play, played), strict=True):
        alone = run_loopback(INSTANCES, partial(run_part, play=play, heads=heads, own_world=True))
        for mine, theirs in zip(ranks, alone, strict=True):
            for out, expected in zip(mine.outs, theirs.outs, strict=True):
                assert torch.equal(out, expected)
            for counter in ("decisions", "block_bytes", "pool_bytes"):
                assert mine.stats[counter] == theirs.stats[counter]
            for kind in ("select", "select-answer", "attend", "attend-answer"):
                assert mine.stats["bytes_sent"][kind] == theirs.stats["bytes_sent"][kind]
                assert mine.stats["messages_sent"][kind] == theirs.stats["messages_sent"][kind]
            assert mine.lines == theirs.lines
            assert mine.predicted_s == theirs.predicted_s


# Bytes, memory, decisions -------------------------------------------------------------------------


def sent(played: Played) -> int:
    return sum(played.stats["bytes_sent"][kind] for kind in ("attend", "attend-answer"))


@pytest.mark.parametrize("weights", [True, False], ids=["form B or A", "form A"])
def test_a_lane_sends_the_rows_of_its_heads(weights: bool) -> None:
    """The lanes' messages are shorter by the rows of the other heads, and by nothing else."""
    play = Play(mode="always-route", weights=weights)
    alone = run_loopback(INSTANCES, lambda end: run_part(end, play, None, own_world=True))
    played = run_loopback(INSTANCES * 2, lambda end: in_lanes(end, play))
    whole = whole_layout(play)
    half = lane_layout(whole, *HALVES[0])
    forms = Counter(line.way for part in alone for line in part.lines if line.way != "LOCAL")
    (way,) = forms
    form: Form = "B" if way == "ROUTE_B" else "A"
    pairs = 2 * forms[way]  # of both steps: each query has units at both instances
    more = sum(whole.payload_bytes(form, 8)) - sum(half.payload_bytes(form, 8))
    more += 4 * (whole.heads - half.heads)  # log-sum-exps are fp64 here
    assert pairs == 2 * INSTANCES * Q
    for lane in by_lane(play, played):
        assert sum(map(sent, alone)) - sum(map(sent, lane)) == pairs * more


@pytest.mark.parametrize(
    ("architecture", "share"), [("mla", 1.0), ("mlra-4", 1.0), ("mlra-2", 0.5)]
)
def test_every_lane_stores_what_its_heads_read(architecture: Architecture, share: float) -> None:
    """Latents and index keys serve all heads of a branch, so each lane has copies of its own."""
    play = Play(architecture=architecture)
    alone = run_loopback(INSTANCES, lambda end: run_part(end, play, None, own_world=True))
    played = run_loopback(INSTANCES * 2, lambda end: in_lanes(end, play))
    blocks, index = -(-TOKENS // B) + -(-PREFILLED // B), B * 8 * 4
    index_bytes = (blocks + INSTANCES) * index  # each request has a block of its own
    whole = sum(part.stats["block_bytes"] for part in alone) - index_bytes
    for lane in by_lane(play, played):
        assert sum(part.stats["block_bytes"] for part in lane) - index_bytes == share * whole


def test_the_predicate_and_explain_use_local_heads() -> None:
    """The rows of all heads are more bytes than the entries they meet, those of two heads are fewer."""
    quarters = ((0, 2), (2, 2), (4, 2), (6, 2))
    play = Play(mode="auto", weights=False, lanes=quarters, slow=True)
    alone = run_loopback(INSTANCES, lambda end: run_part(end, play, None, own_world=True))
    played = run_loopback(INSTANCES * 4, lambda end: in_lanes(end, play))
    check_against_one_lane(play, by_lane(play, played))
    for whole in alone:
        assert {line.way for line in whole.lines} == {"LOCAL", "FETCH"}
    for lane in by_lane(play, played):
        for part, whole in zip(lane, alone, strict=True):
            assert {line.way for line in part.lines} == {"LOCAL", "ROUTE_A"}
            asked = [(line.query, line.branch, line.holder, line.units) for line in whole.lines]
            assert asked == [(ln.query, ln.branch, ln.holder, ln.units) for ln in part.lines]
            assert part.predicted_s < whole.predicted_s
            remote = [ln for ln in zip(part.lines, whole.lines, strict=True) if ln[0].route_us]
            assert remote
            assert all(mine.route_us < theirs.route_us / 2 for mine, theirs in remote)


def test_the_explain_command_prices_a_lane(capsys: pytest.CaptureFixture[str]) -> None:
    steps = []
    for lanes in ("1", "8"):
        assert main(["explain", "--queries", "64", "--lanes", lanes, "--json"]) == 0
        steps.append(json.loads(capsys.readouterr().out)[-1])
    assert [step["layout"] for step in steps] == ["mla-v3.2", "mla-v3.2[0:16]"]
    whole, lane = (step["total_us"]["always-route"] for step in steps)
    assert lane < whole / 4
    assert main(["explain", "--lanes", "3"]) == 2
    assert "--lanes must divide the 128 heads of mla-v3.2, got 3" in capsys.readouterr().err


# Any script, in lanes -----------------------------------------------------------------------------

CASES = (
    Case(seed=1, picks="select", prefilled=1, lease_entries=40, sink=True, storage="fp8-fp64"),
    Case(seed=2, heads=3, weights=False, copies=2, mode="auto", offsets=True, repeats=2),
    Case(seed=3, architecture="mlra-4", heads=3, policy="branch-split", per_branch=True),
    Case(seed=4, architecture="mlra-2", heads=2, prefilled=2, index_placement="replicated"),
)


@pytest.mark.parametrize(
    "case", slow_between(2, CASES), ids=lambda case: f"{case.architecture}-{case.seed}"
)
def test_every_lane_equals_dense_attention_of_its_heads(case: Case) -> None:
    case = replace(case, world=INSTANCES)
    config = make_config(case)
    total = config.model.layers[0].heads
    first = total // 2
    lanes = ((0, first), (first, total - first))

    def play(transport: Transport) -> list[Tensor]:
        with Runtime.open(config, transport, heads=lanes[transport.rank % 2]) as runtime:
            player = Player(runtime, case)
            player.add_documents()
            player.prefill()
            player.decode()
            player.decode()
            return player.outputs

    assert all(run_loopback(INSTANCES * 2, play))
