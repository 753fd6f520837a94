"""Decode over a corpus sharded over the ranks of several nodes, compared with one process.

On each node, with the same HOST:PORT of one of them:

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT \\
        examples/multi_node_decode.py

gloo listens where the host's name resolves to, or on GLOO_SOCKET_IFNAME. Where that name does not lead
to the other nodes, torchrun needs `--local-addr ADDRESS` too, and `--rdzv-conf is_host=1` on the node
of HOST, `is_host=0` on the others.

The text of an installed package is the corpus, each file a document. Every rank builds the model of
`embed_in_engine.py` (seeded weights: its text is noise), prefills its files, and decodes a continuation
of a prompt of its own. Rank 0 first decodes all of them alone. Prints over which connections each rank
sent how many bytes, inside its node and across; exits with 1 on every rank if a token of any differs.
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
from agents import codebase
from embed_in_engine import LAYOUT, Model, Plain, Sharded, as_tokens
from torch import Tensor

from qroam.partition import uniform_model
from qroam.runtime import Runtime, RuntimeConfig

BLOCK_TOKENS = 64
PROMPT_TOKENS = 24
MAX_LOGIT_ERROR = 1e-9  # all is in fp64
SIOCGIFADDR = 0x8915

Endpoint = tuple[str, int]  # address, port


class Alone(NamedTuple):
    """What one process decoded for a rank: its tokens, and the logits (VOCAB,) of each."""

    tokens: list[int]
    logits: list[Tensor]


class Report(NamedTuple):
    """What one rank saw and did; `sockets` are the two ends of its connections, its own first."""

    node: int
    sockets: set[tuple[Endpoint, Endpoint]]
    interfaces: dict[str, str]
    bytes_to: dict[int, int]
    tokens: list[int]
    equal: int
    error: float
    decode_s: float

    @property
    def exact(self) -> bool:
        return self.equal == len(self.tokens) and self.error <= MAX_LOGIT_ERROR


def prompt_of(rank: int, documents: dict[str, Tensor]) -> Tensor:
    """A prompt that names the rank and a file."""
    names = list(documents)
    return as_tokens(f"{rank}: {names[rank % len(names)]}")[:PROMPT_TOKENS]


def decode_alone(
    model: Model, documents: dict[str, Tensor], ranks: int, tokens: int
) -> list[Alone]:
    """What each rank should decode, by one process that has everything."""
    corpus, end = Plain(model), 0
    for text in documents.values():  # a file is prefilled by itself, and attached after the others
        document = Plain(model)
        document.forward(text, end)
        corpus, end = corpus.attached(document), end + len(text)
    decoded = []
    for rank in range(ranks):
        plain, prompt = Plain(model).attached(corpus), prompt_of(rank, documents)
        logits = [plain.forward(prompt, end)]
        for at in range(tokens - 1):
            last = logits[-1].argmax().view(1)
            logits.append(plain.forward(last, end + len(prompt) + at))
        decoded.append(Alone([int(row.argmax()) for row in logits], logits))
    return decoded


def play_rank(
    model: Model, documents: dict[str, Tensor], alone: Alone, args: argparse.Namespace
) -> Report:
    """One rank: its part of the prefill, then its own request; what came of it."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    config = RuntimeConfig(
        model=uniform_model(LAYOUT, args.layers),
        max_blocks=sum(-(-len(text) // BLOCK_TOKENS) for text in documents.values()),
        block_tokens=BLOCK_TOKENS,
        request_blocks=-(-(PROMPT_TOKENS + args.tokens) // BLOCK_TOKENS),
        dtype=torch.float64,
        mode=args.mode,
        seed=args.seed,
        deadline_s=args.deadline,
    )
    with Runtime.open(config) as runtime:
        engine, end = Sharded(runtime, model), 0
        for name, text in documents.items():
            # Given the tokens, a node that has other text installed is named as out of step.
            runtime.add_document(name, token_ids=text.tolist(), position=end)
            end += len(text)
        for first in range(0, len(documents), world_size):  # file f on rank f modulo the world
            names = list(documents)[first : first + world_size]
            if rank < len(names):
                writer = runtime.request(into=names[rank])
                engine.forward(model, documents[names[rank]][None], [writer])
                runtime.release(writer)
            else:
                engine.idle(args.layers)

        started = time.perf_counter()
        request = runtime.request(list(documents))
        current, tokens, error = prompt_of(rank, documents)[None], [], 0.0
        for expected in alone.logits:
            logits = engine.forward(model, current, [request])[0]
            current = logits.argmax().view(1, 1)
            tokens.append(int(current))
            error = max(error, float((logits - expected).abs().max()))
        return Report(
            node=int(os.environ["GROUP_RANK"]),
            sockets=connections(),
            interfaces=interfaces(),
            bytes_to=runtime.stats()["bytes_to"],
            tokens=tokens,
            equal=sum(map(int.__eq__, tokens, alone.tokens)),
            error=error,
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
    print(
        "result     " + ("equal" if all(r.exact for r in reports) else "DIFFERS from one process")
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decode over nodes; start it with torchrun.")
    parser.add_argument("--package", default="email", help="whose sources are the corpus")
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--bytes-per-file", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16, help="decoded by each rank")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mode", default="auto", help="or always-route, always-fetch, random")
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
    documents = codebase(args.package, args.files, args.bytes_per_file)
    model = Model(args.layers, args.seed)
    alone: list[Any] = [None]
    with torch.no_grad():
        if rank == 0:
            alone = [decode_alone(model, documents, world_size, args.tokens)]
        dist.broadcast_object_list(alone)
        reports: list[Any] = [None] * world_size
        dist.all_gather_object(reports, play_rank(model, documents, alone[0][rank], args))
    if rank == 0:
        print_reports(reports, documents)
    dist.barrier()  # torchrun ends a node's other ranks as soon as one has failed
    dist.destroy_process_group()
    return int(not all(report.exact for report in reports))


if __name__ == "__main__":
    sys.exit(main())
