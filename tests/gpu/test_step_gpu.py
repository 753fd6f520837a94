"""The step on two GPUs in both payload forms: any plan, through both send paths, equals fp64.

Each rank is a process that takes the same turns: other queries and selections every time, some of
them empty, now and then a rank without any. What is wrong comes back as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from ranks import RankPool
from torch import Tensor
from wires import replay_unevenly

from qroam.kernels import reference
from qroam.kernels.decide import FETCH, LOCAL, ROUTE, PlanMode
from qroam.kernels.exchange.layout import Wire
from qroam.kernels.exchange.types import Ends
from qroam.kernels.plan import BlockTable
from qroam.kernels.pool_layout import PoolLayout
from qroam.partition.codec import make_codec
from qroam.partition.layout import Form
from qroam.partition.presets import named_layout, with_codec
from qroam.runtime.cost.model import CostModel, LayerFacts
from qroam.runtime.cost.prices import prices_of
from qroam.runtime.cost.profile import load_profile
from qroam.runtime.gpu.pool import GpuPool
from qroam.runtime.gpu.step import GpuStep
from qroam.runtime.gpu.symmetric_memory import SymmetricMemory
from qroam.runtime.transport.base import Transport
from qroam.runtime.transport.gloo import TorchTransport

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
LAYOUT = with_codec(named_layout("mla-v3.2"), "bf16")
HEADS, LATENT, ROPE, NOPE, VALUE = 128, 512, 64, 128, 128
ROWS, LISTED, FEWEST = 8, 256, 64
BLOCKS, B = 64, 64
BF16 = torch.bfloat16
FORMS: tuple[Form, Form] = ("A", "B")
TURNS = 5  # of each mode
REPLAYS, VARIANTS = 10_000, 8
POOL = PoolLayout(
    layers=1, keys=BLOCKS, slots=BLOCKS, block_tokens=B, entry_bytes=2 * (LATENT + ROPE),
    staged=ROWS * LISTED,
)  # fmt: skip
LATE_S = 60.0  # that ranks may be apart while they compile


class Corpus(NamedTuple):
    """The same on both ranks: entries (ids, D), owner of each block, and the layer's weights."""

    entries: Tensor
    owner: Tensor
    w_uk: Tensor
    w_uv: Tensor

    @staticmethod
    def make(device: torch.device) -> Corpus:
        g = torch.Generator().manual_seed(11)
        entries = torch.randn(BLOCKS * B, LATENT + ROPE, generator=g)
        owner = torch.randint(0, 2, (BLOCKS,), generator=g, dtype=torch.int32)
        w_uk = torch.randn(HEADS, NOPE, LATENT, generator=g) * NOPE**-0.5
        w_uv = torch.randn(HEADS, LATENT, VALUE, generator=g) * LATENT**-0.5
        entries, w_uk, w_uv = (t.to(device, BF16) for t in (entries, w_uk, w_uv))
        return Corpus(entries, owner, w_uk, w_uv)

    def slots(self, rank: int) -> Tensor:
        """(BLOCKS,) int32: where a rank has its blocks, -1 for those of the other."""
        own = self.owner == rank
        return torch.where(own, own.cumsum(0) - 1, -1).to(torch.int32)

    def pool(self, rank: int, memory: Tensor, peers: Tensor | None = None) -> GpuPool:
        codec = make_codec("bf16", dim=LATENT + ROPE, rope_dim=ROPE)
        pool = GpuPool(memory, POOL, codec, rank=rank, peers=peers)
        slots, zeros = self.slots(rank), torch.zeros(BLOCKS, dtype=torch.int32)
        own = (slots >= 0).nonzero()[:, 0].to(memory.device)
        pool.entries(0)[: len(own) * B] = self.entries.view(BLOCKS, B, -1)[own].flatten(0, 1)
        pool.slot_of.copy_(slots)
        pool.fill.fill_(B)
        directory = BlockTable.of(
            self.owner[:, None], zeros, torch.full_like(zeros, B), slots, rank=rank, block_tokens=B,
            num_branches=1,
        )  # fmt: skip
        pool.directory.records.copy_(directory.records)
        return pool


class Turn(NamedTuple):
    """What a rank asks: query (ROWS, H, D), NaN where nothing is listed, and units (ROWS, LISTED)."""

    query: Tensor
    units: Tensor

    @staticmethod
    def draw(corpus: Corpus, rank: int, turn: int, columns: int) -> Turn:
        g = torch.Generator().manual_seed(100 * turn + rank)
        units = torch.full((ROWS, LISTED), -1, dtype=torch.int32)
        query = torch.randn(ROWS, HEADS, columns, generator=g)
        owner = corpus.owner.repeat_interleave(B)
        for row in range(ROWS):
            kind = int(torch.randint(0, 5, (1,), generator=g))
            if kind == 0 or turn % 4 == 1 + rank:  # an empty row, or an idle rank
                query[row] = torch.nan
                continue
            ids = torch.randperm(BLOCKS * B, generator=g)
            if kind < 3:  # all of one holder
                ids = ids[owner[ids] == kind - 1]
            count = int(torch.randint(FEWEST, LISTED + 1, (1,), generator=g))
            ids = ids[:count].int()
            units[row, torch.randperm(LISTED, generator=g)[: len(ids)]] = ids
        return Turn(query.to(corpus.entries), units)

    def ways(self, corpus: Corpus, rank: int, turn: int, form: Form) -> Tensor:
        """(ROWS, 2) int8: a way at random for every holder of which something is listed."""
        g = torch.Generator().manual_seed(7000 + 100 * turn + rank)
        holder = torch.where(self.units >= 0, corpus.owner[self.units.clamp(min=0).long() // B], -1)
        asked = torch.stack([(holder == other).any(1) for other in range(2)], 1)
        away = torch.where(torch.rand(ROWS, 2, generator=g) < 0.5, FETCH, ROUTE + (form == "B"))
        way = torch.where(torch.arange(2) == rank, LOCAL, away)
        return torch.where(asked, way, 0).to(torch.int8)


def due(corpus: Corpus, turn: Turn, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse in fp64; or as eager torch computes them in bf16, softmax in fp32."""
    device = corpus.entries.device
    query, units = turn.query.to(dtype), turn.units.to(device)
    w_uk, w_uv = (w[None].to(dtype) for w in (corpus.w_uk, corpus.w_uv))
    valid = units >= 0
    query = torch.where(valid.any(1)[:, None, None], query, 0)
    if form == "B":
        query = reference.absorb(query[:, None], w_uk)[:, 0]
    entries = corpus.entries.to(dtype)[units.clamp(min=0).long()]
    if dtype == torch.float64:
        out, lse = reference.attend(
            query, entries, valid, value_dim=LATENT, scale=LAYOUT.softmax_scale
        )
    else:
        scores = query.float() @ entries.float().mT * LAYOUT.softmax_scale
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
        lse = scores.logsumexp(-1)
        shares = torch.where(lse[..., None] == -torch.inf, 0, scores.softmax(-1))
        out = shares.to(dtype) @ entries[..., :LATENT]
    if form == "B":
        out = reference.project(out[:, None], w_uv)[:, 0]
    return out, lse


def complaints(
    corpus: Corpus, turn: Turn, form: Form, out: Tensor, lse: Tensor, fault: Tensor
) -> Iterator[str]:
    """What is wrong with a rank's results: at most twice eager's error is allowed."""
    if bool(fault.any()):
        yield f"faults {fault.tolist()}"
    exact, exact_lse = due(corpus, turn, form, torch.float64)
    eager, eager_lse = due(corpus, turn, form, BF16)
    empty = (turn.units < 0).all(1).to(out.device)
    if bool(out[empty].any()) or not bool((lse[empty] == -torch.inf).all()):
        yield "an empty row has a result"
    listed = ~empty
    if not bool(listed.any()):
        return
    for name, found, theirs, right, rounding in (
        ("out", out, eager, exact, torch.finfo(BF16).eps * float(exact.abs().max())),
        ("lse", lse, eager_lse, exact_lse, 1e-4),  # exp2 and log2 of the device
    ):
        error = (found.double() - right)[listed].abs().flatten(1).amax(1)
        most = 2 * (float((theirs.double() - right)[listed].abs().max()) + rounding)
        wrong = ~(error <= most)
        if bool(wrong.any()):
            rows = listed.nonzero()[wrong, 0].tolist()
            worst = float(error[wrong].max())
            yield f"{name}: rows {rows} err by up to {worst:.2e}, allowed are {most:.2e}"


def wires(*, staged: bool) -> list[Wire]:
    dims = [LAYOUT.routed_dims(form) for form in FORMS]
    return [
        Wire(
            world_size=2, rows=ROWS, heads=HEADS, query_words=HEADS * out // 2,
            answer_words=HEADS * back // 2, units=LISTED, chunk=2, staged=staged,
        )
        for out, back in dims
    ]  # fmt: skip


def step_of(
    corpus: Corpus, pool: GpuPool, form: Form, *, ends: Ends | None, rank: int, world: int
) -> GpuStep:
    model = CostModel(
        facts=LayerFacts.of(LAYOUT, entry_bytes=pool.map.entry_bytes, element_bytes=2),
        profile=load_profile("nvlink4"),
    )
    device = pool.memory.device
    return GpuStep(
        pool, [LAYOUT], prices=prices_of(model, world=world, forms=(form,), device=device), ends=ends,
        rank=rank, world_size=world, rows=ROWS, listed=LISTED, dtype=BF16,
        weights=[(corpus.w_uk, corpus.w_uv)] if form == "B" else None,
    )  # fmt: skip


def taken_turns(
    step: GpuStep, corpus: Corpus, form: Form, rank: int, modes: Sequence[PlanMode]
) -> Iterator[str]:
    """What is wrong with a rank's turns, each in the next of the modes."""
    for number in range(TURNS * len(modes)):
        mode = modes[number % len(modes)]
        turn = Turn.draw(corpus, rank, number, LAYOUT.routed_dims(form)[0])
        step.query.copy_(turn.query)
        step.units.copy_(turn.units)
        step.out.fill_(torch.nan)
        step.lse.fill_(torch.nan)
        step.fault.fill_(-1)
        if mode == "given":
            step.plan.way.copy_(turn.ways(corpus, rank, number, form))
        step.replay(0, mode)
        torch.cuda.synchronize()
        found = [*complaints(corpus, turn, form, step.out, step.lse, step.fault)]
        route, ways = ROUTE + (form == "B"), set(step.plan.way.flatten().tolist())
        never = {"always-route": FETCH, "always-fetch": route}.get(mode)
        if never in ways or not ways <= {0, LOCAL, route, FETCH}:
            found.append(f"ways {step.plan.way.tolist()}")
        yield from (f"form {form}, turn {number}, {mode}: {what}" for what in found)


def lived(transport: Transport, put: bool, modes: tuple[PlanMode, ...]) -> list[str]:
    """A rank's turns in both forms; what was wrong, first of all."""
    assert isinstance(transport, TorchTransport)
    rank, device = transport.rank, torch.device("cuda", transport.rank)
    torch.cuda.set_device(device)
    corpus = Corpus.make(device)
    peers = SymmetricMemory(
        wires(staged=put), group=transport.group, device=device, deadline_s=LATE_S, put=put,
        heap=POOL.num_bytes,
    )  # fmt: skip
    pool = corpus.pool(rank, peers.heap, peers.heaps)
    wrong: list[str] = []
    for channel, form in enumerate(FORMS):
        step = step_of(corpus, pool, form, ends=peers.ends(channel), rank=rank, world=2)
        torch.cuda.synchronize()
        wrong += taken_turns(step, corpus, form, rank, modes)
        peers.check()
        if put:
            wrong += [f"form {form}: {mode} was not refused" for mode in taken(step)]
    peers.close()
    return wrong[:6]


def taken(step: GpuStep) -> Iterator[PlanMode]:
    """Modes that may fetch and yet are not refused."""
    modes: tuple[PlanMode, ...] = ("auto", "always-fetch", "given")
    for mode in modes:
        for verb in (step.run, step.make_plan, step.carry_out):
            try:
                verb(0, mode)
            except ValueError:
                continue
            yield mode


class Soak:
    """A step of form A that takes the next of its turns by itself: its queries, selection and, if they are
    given, ways, random mixes of both, are changed on the device, and what comes is compared bit by bit
    with the first time.
    """

    def __init__(self, step: GpuStep, corpus: Corpus, rank: int, mode: PlanMode) -> None:
        device, self._mode = corpus.entries.device, mode
        turns = [Turn.draw(corpus, rank, n, LATENT + ROPE) for n in range(VARIANTS)]
        self._query = torch.stack([turn.query for turn in turns])
        self._units = torch.stack([turn.units for turn in turns]).to(device)
        ways = [turn.ways(corpus, rank, n, "A") for n, turn in enumerate(turns)]
        self._way = torch.stack(ways).to(device)
        self.turns, self._step = turns, step
        self._out = torch.zeros(VARIANTS, *step.out.shape, dtype=BF16, device=device)
        self._lse = torch.zeros(VARIANTS, *step.lse.shape, device=device)
        self._turn = torch.zeros(1, dtype=torch.int64, device=device)
        self.wrong = torch.zeros(1, dtype=torch.int64, device=device)

    def take(self) -> None:
        step, at = self._step, self._turn % VARIANTS
        step.query.copy_(self._query.index_select(0, at)[0])
        step.units.copy_(self._units.index_select(0, at)[0])
        step.plan.way.copy_(self._way.index_select(0, at)[0])
        step.run(0, self._mode)
        for found, first in ((step.out, self._out), (step.lse, self._lse)):
            bits = torch.int16 if found.dtype == BF16 else torch.int32
            differs = found.view(bits) != first.index_select(0, at)[0].view(bits)
            self.wrong += differs.any()
        self.wrong += step.fault.any()
        self._turn += 1

    def keep(self, number: int) -> None:
        """What this turn left is right."""
        self._out[number].copy_(self._step.out)
        self._lse[number].copy_(self._step.lse)


def soaked(transport: Transport, mode: PlanMode) -> list[str]:
    """Turns one by one against fp64; then replays back to back, one rank late at first and both now and
    then, that must leave the same bits. What was wrong."""
    assert isinstance(transport, TorchTransport)
    rank, device = transport.rank, torch.device("cuda", transport.rank)
    torch.cuda.set_device(device)
    corpus = Corpus.make(device)
    peers = SymmetricMemory(
        wires(staged=False)[:1], group=transport.group, device=device, deadline_s=LATE_S,
        heap=POOL.num_bytes,
    )  # fmt: skip
    pool = corpus.pool(rank, peers.heap, peers.heaps)
    step = step_of(corpus, pool, "A", ends=peers.ends(), rank=rank, world=2)
    soak = Soak(step, corpus, rank, mode)
    torch.cuda.synchronize()
    found: list[str] = []
    for number, turn in enumerate(soak.turns):
        soak.take()
        torch.cuda.synchronize()
        found += complaints(corpus, turn, "A", step.out, step.lse, step.fault)
        soak.keep(number)
    soak.wrong.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        soak.take()
    replay_unevenly(graph, rank, REPLAYS)
    peers.check()
    if int(soak.wrong):
        found.append(f"{int(soak.wrong)} results differ in {REPLAYS} replays")
    peers.close()
    return found[:6]


@pytest.mark.parametrize("mode", ["given", "always-route", "auto"])
def test_replays_leave_the_same_bits(tmp_path: Path, mode: PlanMode) -> None:
    with RankPool(2, tmp_path, deadline_s=LATE_S, patience_s=400.0) as pool:
        assert pool.run(soaked, mode) == [[], []]


@pytest.mark.parametrize(
    ("put", "modes"),
    [
        (False, ("always-route", "given", "always-fetch", "auto", "given")),
        (True, ("always-route",)),
    ],
    ids=["stores", "put"],
)
def test_any_plan_in_both_forms(tmp_path: Path, put: bool, modes: tuple[PlanMode, ...]) -> None:
    with RankPool(2, tmp_path, deadline_s=LATE_S, patience_s=400.0) as pool:
        assert pool.run(lived, put, modes) == [[], []]


@pytest.mark.parametrize("form", FORMS)
def test_a_world_of_one(form: Form) -> None:
    device = torch.device("cuda", 0)
    corpus = Corpus.make(device)
    corpus = corpus._replace(owner=torch.zeros_like(corpus.owner))
    pool = corpus.pool(0, torch.zeros(POOL.num_bytes, dtype=torch.uint8, device=device))
    step = step_of(corpus, pool, form, ends=None, rank=0, world=1)
    assert [*taken_turns(step, corpus, form, 0, ["auto"])] == []
