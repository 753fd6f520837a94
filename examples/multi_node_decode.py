"""Decode over a corpus sharded over the ranks of several nodes, checked against one process.

On each node, with the same HOST:PORT of one of them:

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
        examples/multi_node_decode.py

gloo listens where the host's name resolves to, or on GLOO_SOCKET_IFNAME. Where that name does not lead
to the other nodes, torchrun needs `--local-addr ADDRESS` too, and `--rdzv-conf is_host=1` on the node
of HOST, `is_host=0` on the others.

Every rank builds the same small DeepSeek-V3.2-architecture model (seeded weights: its text is noise),
prefills its part of a corpus of source text, and decodes a continuation of a prompt of its own. Rank 0
first does all of it alone with transformers' own unsharded model. Prints what each rank was connected
by and what it sent inside its node and across; exits 1 on every rank if a token of any differs.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
import sys
import time
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from qroam.partition import Placement
from qroam.runtime import Runtime, RuntimeConfig
from qroam.runtime.adapters.hf import HFEngine, model_layout
from qroam.runtime.cost.predicate import MODES
from qroam.runtime.tools.demo import MAX_LOGIT_ERROR, MAX_SUBSTITUTED
from qroam.runtime.tools.demo_instance import corpus_chunks
from qroam.runtime.tools.demo_model import (
    CHUNK_TOKENS,
    PROMPT_TOKENS,
    Reference,
    build_model,
    load_corpus,
    prompts,
    run_reference,
)
from qroam.runtime.tools.near_ties import TieReview

BLOCK_TOKENS = 64
SIOCGIFADDR = 0x8915

Endpoint = tuple[str, int]  # address, port


class Report(NamedTuple):
    """What one rank saw and did; `sockets` are the two ends of its connections, its own first."""

    node: int
    sockets: set[tuple[Endpoint, Endpoint]]
    interfaces: dict[str, str]
    bytes_to: dict[int, int]
    selections: int
    substituted: int
    tokens: list[int]
    equal: int
    error: float
    decode_s: float

    @property
    def exact(self) -> bool:
        few = self.substituted <= MAX_SUBSTITUTED * self.selections
        return self.equal == len(self.tokens) and self.error <= MAX_LOGIT_ERROR and few


def play_rank(
    model: PreTrainedModel,
    documents: dict[str, Tensor],
    prompt: Tensor,
    reference: Reference,
    args: argparse.Namespace,
) -> Report:
    """One rank: its part of the prefill, then its own request; what came of it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    blocks = sum(-(-len(document) // BLOCK_TOKENS) for document in documents.values())
    private = -(-(PROMPT_TOKENS + args.tokens) // BLOCK_TOKENS)
    run = CHUNK_TOKENS // BLOCK_TOKENS  # whole chunks stay with the rank that prefills them
    config = RuntimeConfig(
        model=model_layout(model.config),
        max_blocks=blocks,
        block_tokens=BLOCK_TOKENS,
        corpus_slots=min(-(-blocks // (run * world_size)) * run, blocks),
        private_blocks=private,
        request_blocks=private,
        placement=Placement(policy="block-cyclic", run=run),
        mode=args.mode,
        seed=args.seed,
        deadline_s=args.deadline,
    )
    sequence_of: dict[int, int] = {}
    review = TieReview(reference.ties, sequence_of)
    with Runtime.open(config) as runtime:
        engine = HFEngine(model, runtime, review=review)
        position = 0
        for name, text in documents.items():
            # Given the tokens, a node that has other text installed is out of step, and named.
            runtime.add_document(name, token_ids=text.tolist(), position=position)
            position += len(text)
        engine.prefill(corpus_chunks(documents))

        started = time.perf_counter()
        request = runtime.request(list(documents))
        sequence_of[id(request)] = rank
        cache, current = engine.cache(), prompt[None]
        tokens, logits = [], []
        for _ in range(args.tokens):
            out = engine.forward(current, [request], cache)
            assert out is not None
            current = out.argmax(-1, keepdim=True)
            tokens.append(int(current))
            logits.append(out[0])
        error = (torch.stack(logits) - reference.logits[rank]).abs().max()
        return Report(
            node=int(os.environ["GROUP_RANK"]),
            sockets=connections(),
            interfaces=interfaces(),
            bytes_to=runtime.stats()["bytes_to"],
            selections=review.rows,
            substituted=review.substituted,
            tokens=tokens,
            equal=int((torch.tensor(tokens) == reference.tokens[rank]).sum()),
            error=float(error),
            decode_s=time.perf_counter() - started,
        )


def connections() -> set[tuple[Endpoint, Endpoint]]:
    """The established TCP connections of this process, its own end first, as Linux lists them."""
    mine = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            mine.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        except FileNotFoundError:
            continue  # the listing's own descriptor
    established = "01"
    found = set()
    for table in Path("/proc/self/net").glob("tcp*"):  # tcp, and tcp6 where there is IPv6
        for line in table.read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == established and f"socket:[{fields[9]}]" in mine:
                found.add((endpoint_of(fields[1]), endpoint_of(fields[2])))
    return found


def endpoint_of(text: str) -> Endpoint:
    """Of "0100007F:1F90": hexadecimal words of four bytes in the machine's own order, and the port."""
    words, port = text.split(":")
    raw = bytes.fromhex(words)
    if sys.byteorder == "little":
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    address = ip_address(raw)
    return str(getattr(address, "ipv4_mapped", None) or address), int(port, 16)


def interfaces() -> dict[str, str]:
    """The name of the interface that has each IPv4 address of this node."""
    names = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                raw = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue  # it has none
            names[socket.inet_ntoa(raw[20:24])] = name
    return names


def print_reports(reports: list[Report], documents: dict[str, Tensor]) -> None:
    tokens = sum(len(document) for document in documents.values())
    nodes = len({report.node for report in reports})
    print(
        f"corpus     {tokens:,} tokens of {len(documents)} files, over {len(reports)} ranks "
        f"of {nodes} nodes"
    )
    totals = {"inside": 0, "across": 0}
    for rank, report in enumerate(reports):
        used = {
            f"{report.interfaces.get(own[0], '?')} {own[0]}"
            for peer in reports
            for own, other in report.sockets
            if (other, own) in peer.sockets
        }
        sent = {"inside": 0, "across": 0}
        for peer, num_bytes in report.bytes_to.items():
            sent["inside" if reports[peer].node == report.node else "across"] += num_bytes
        for where, num_bytes in sent.items():
            totals[where] += num_bytes
        print(
            f"rank {rank}     node {report.node}, {' and '.join(sorted(used))}: "
            f"sent {sent['inside']:,} bytes inside its node, {sent['across']:,} across; "
            f"{report.equal} of {len(report.tokens)} tokens equal, "
            f"max logit error {report.error:.1e}, decode {report.decode_s:.1f} s"
        )
    print(f"bytes      {totals['inside']:,} inside nodes, {totals['across']:,} across nodes")
    rows = sum(report.selections for report in reports)
    substituted = sum(report.substituted for report in reports)
    print(f"near-ties  {substituted} of {rows:,} selections taken from the one process")
    print(
        "result     " + ("equal" if all(r.exact for r in reports) else "DIFFERS from one process")
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode over nodes; start it with torchrun.")
    parser.add_argument("--corpus", type=Path, help="folder of sources; Python's own by default")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--bytes-per-file", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16, help="decoded by each rank")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds, of any wait")
    args = parser.parse_args()
    if min(args.files, args.bytes_per_file, args.tokens, args.layers) < 1:
        parser.error("--files, --bytes-per-file, --tokens and --layers must be positive")
    if "GROUP_RANK" not in os.environ:
        parser.error("start it with torchrun, see the top of the file")
    return args


def main() -> int:
    args = parse_args()
    # Others wait for rank 0's unsharded decode, so longer than for a peer in a step.
    dist.init_process_group("gloo", timeout=timedelta(seconds=10 * args.deadline))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    documents = load_corpus(args.corpus, args.files, args.bytes_per_file)
    asked = prompts(documents, world_size)
    most = sum(len(text) for text in documents.values()) + PROMPT_TOKENS + args.tokens
    model = build_model(args.layers, args.seed, most)
    alone: list[Any] = [None]
    if rank == 0:
        chunks = [chunk.tokens for chunk in corpus_chunks(documents)]
        alone = [run_reference(model, chunks, asked, args.tokens, lambda *_: None)]
    dist.broadcast_object_list(alone)
    reports: list[Any] = [None] * world_size
    dist.all_gather_object(reports, play_rank(model, documents, asked[rank], alone[0], args))
    if rank == 0:
        print_reports(reports, documents)
    dist.barrier()  # torchrun ends a node's other ranks as soon as one has failed
    dist.destroy_process_group()
    return int(not all(report.exact for report in reports))


if __name__ == "__main__":
    sys.exit(main())
