"""One attention step over a corpus sharded over processes, compared with dense fp64 attention.

    python examples/dense_check.py --layout mlra-4 --ranks 4 --mode random

Takes any layout, codec, placement and mode, and starts its own ranks. Prints each rank's largest error,
the bytes it sent, and how many (query, branch, holder) it served locally, routed or fetched. Exits with
1 if an error is larger than allowed.

Letters: Q queries, H heads, G branches, I entries of the corpus, K units of a query.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from qroam.partition import (
    LAYOUT_NAMES,
    PLACEMENT_POLICIES,
    Form,
    Layout,
    Placement,
    make_codec,
    named_layout,
    uniform_model,
    with_codec,
)
from qroam.runtime import Runtime, RuntimeConfig

BLOCK_TOKENS = 16
F32 = torch.float32
DTYPES = {"fp64": torch.float64, "fp32": F32, "bf16": torch.bfloat16, "fp8_v32": F32}
TOLERANCE = {torch.float64: 1e-12, F32: 1e-5}
MODES = ("auto", "always-route", "always-fetch", "random")
WAYS = ("local", "route_a", "route_b", "fetch")


class Report(NamedTuple):
    """What one rank saw: its error, what was allowed, bytes as counted in the send, decisions."""

    error: float
    allowed: float
    bytes_sent: int
    ways: dict[str, int]


def attend_densely(
    layout: Layout,
    query: Tensor,
    entries: Tensor,
    listed: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """(Q, H, D) queries over entries (I, G, C) where listed (Q, I), all in `dtype`.

    With weights in the training form: keys and values of every head are expanded.
    """
    query, entries = query.to(dtype), entries.to(dtype)
    out_dim = layout.out_dim if weights else layout.value_dim
    out = torch.zeros(len(query), layout.heads, out_dim, dtype=dtype)
    for b, branch in enumerate(layout.branches):
        for i in range(branch.heads):
            keys, values = entries[:, b, -layout.key_dim :], entries[:, b, : layout.value_dim]
            if weights:
                w_uk, w_uv = weights[0][b, i].to(dtype), weights[1][b, i].to(dtype)
                latent, rope = keys.tensor_split((layout.absorbed_dim,), dim=1)
                keys, values = torch.cat((latent @ w_uk.T, rope), dim=1), values @ w_uv
            head = branch.head_start + i
            scores = query[:, head] @ keys.T * layout.softmax_scale
            shares = scores.masked_fill(~listed, -torch.inf).softmax(1)
            out[:, head] += branch.weight * (shares @ values)
    return out


def random_weights(layout: Layout, noise: torch.Generator) -> tuple[Tensor, Tensor]:
    """W_UK and W_UV whose products keep the size of their inputs."""
    assert layout.projection is not None
    heads = (layout.num_branches, layout.branch_heads)
    w_uk = torch.randn(*heads, layout.projection.nope_dim, layout.absorbed_dim, generator=noise)
    w_uv = torch.randn(*heads, layout.value_dim, layout.projection.out_dim, generator=noise)
    return w_uk * layout.absorbed_dim**-0.5, w_uv * layout.value_dim**-0.5


def play_rank(rank: int, store: str, args: argparse.Namespace) -> Report:
    """One rank: load the corpus, ask once, compare."""
    torch.set_num_threads(1)
    if args.ranks > 1:
        where = f"file://{store}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=args.ranks)
    layout = named_layout(args.layout)
    layout = with_codec(layout, args.codec or layout.codec)
    dtype = DTYPES[layout.codec]
    config = RuntimeConfig(
        model=uniform_model(layout, 1),
        max_blocks=-(-args.tokens // BLOCK_TOKENS),
        block_tokens=BLOCK_TOKENS,
        corpus_slots=-(-args.tokens // BLOCK_TOKENS) * layout.num_branches,
        placement=Placement(policy=args.placement, copies=args.copies),
        mode=args.mode,
        seed=args.seed,
        dtype=dtype,
    )
    shared, own = (torch.Generator().manual_seed(args.seed + n) for n in (0, 1 + rank))
    shape = (args.tokens, layout.num_branches, layout.entry_dim)
    corpus = torch.randn(shape, generator=shared).to(dtype)
    with Runtime.open(config) as runtime:
        runtime.add_document("corpus", tokens=args.tokens)
        keys = None
        if layout.index is not None:
            keys = torch.zeros(args.tokens, layout.index.head_dim)  # this step selects by itself
        runtime.load_document("corpus", 0, corpus, keys)
        weights = None
        if args.form == "B":
            w_uk, w_uv = random_weights(layout, shared)
            weights = w_uk.to(dtype), w_uv.to(dtype)
            runtime.load_weights(0, *weights)

        query_dim = layout.query_dim if weights else layout.key_dim
        query = torch.randn(args.queries, layout.heads, query_dim, generator=own).to(dtype)
        num_units = -(-args.tokens // args.unit_tokens)
        units = torch.rand(args.queries, num_units, generator=own).argsort(1)[:, : args.units]
        scope = runtime.scope(documents=["corpus"], queries=args.queries)
        picked = runtime.selection(units.to(torch.int32), scope, unit_tokens=args.unit_tokens)
        out = runtime.attend(0, query, picked)
        stats = runtime.stats()
    if args.ranks > 1:
        dist.destroy_process_group()

    listed = torch.zeros(args.queries, num_units, dtype=torch.bool).scatter(1, units, True)
    listed = listed.repeat_interleave(args.unit_tokens, 1)[:, : args.tokens]
    codec = make_codec(layout.codec, dim=layout.entry_dim, rope_dim=layout.rope_dim)
    kept = codec.decode(codec.encode(corpus.flatten(0, 1)), torch.float64).view(shape)
    exact = attend_densely(layout, query, kept, listed, weights, torch.float64)
    if dtype == torch.bfloat16:  # twice what eager torch errs in the same dtype
        eager = attend_densely(layout, query, kept, listed, weights, dtype)
        allowed = 2 * float((eager.double() - exact).abs().max())
    else:
        allowed = TOLERANCE[dtype]
    decisions = stats["decisions"].values()
    return Report(
        error=float((out.double() - exact).abs().max()),
        allowed=allowed,
        bytes_sent=sum(stats["bytes_sent"].values()),
        ways={way: sum(ways[way] for ways in decisions) for way in WAYS},
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check one sharded step against dense attention.")
    parser.add_argument("--layout", choices=LAYOUT_NAMES, default="mla-tiny")
    parser.add_argument("--codec", choices=DTYPES, help="the layout's own by default")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mode", choices=MODES, default="auto")
    parser.add_argument("--placement", choices=PLACEMENT_POLICIES, default="block-cyclic")
    parser.add_argument("--copies", type=int, default=1, help="of every block, on as many ranks")
    parser.add_argument("--tokens", type=int, default=500, help="of the corpus")
    parser.add_argument("--queries", type=int, default=8, help="of each rank")
    parser.add_argument("--units", type=int, default=64, help="selected by each query")
    parser.add_argument("--unit-tokens", type=int, default=1)
    parser.add_argument(
        "--form",
        choices=get_args(Form),
        default="B",
        help="B loads W_UK and W_UV, so that un-absorbed rows may be routed; A never does",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if min(args.ranks, args.tokens, args.queries, args.units, args.unit_tokens) < 1:
        parser.error("--ranks, --tokens, --queries, --units and --unit-tokens must be positive")
    return args


def main() -> int:
    args = parse_args()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.ranks, mp_context=context) as ranks,
    ):
        futures = [ranks.submit(play_rank, r, f"{folder}/store", args) for r in range(args.ranks)]
        reports = [future.result() for future in futures]
    print(f"{'rank':>4} {'max error':>10} {'allowed':>10} {'bytes sent':>11}", *WAYS, sep="  ")
    for rank, (error, allowed, sent, decided) in enumerate(reports):
        ways = (f"{decided[way]:>{len(way)}}" for way in WAYS)
        print(f"{rank:>4} {error:>10.2e} {allowed:>10.2e} {sent:>11,}", *ways, sep="  ")
    return int(not all(report.error <= report.allowed for report in reports))


if __name__ == "__main__":
    sys.exit(main())
