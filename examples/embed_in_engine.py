"""The smallest decode loop of one's own over a sharded corpus, checked against one process.

    python examples/embed_in_engine.py --ranks 2 --tokens 16

A byte-level model with seeded weights (its text is noise) prefills this file on rank 0, and every rank
then decodes a continuation of a prompt of its own. What an engine has to do is in `Sharded`; `Plain`
is the same attention over tensors of one process, and all tokens must be equal.

Letters: T new tokens, L layers, H heads, E entries seen, K entries selected.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from qroam.partition import IndexLayout, mla, uniform_model
from qroam.runtime import Request, Runtime, RuntimeConfig

VOCAB, HIDDEN, HEADS, LATENT, ROPE, NOPE, VALUE = 256, 64, 4, 32, 8, 16, 16
INDEX_HEADS, INDEX_DIM, TOP_K = 2, 16, 48
SCALE = (NOPE + ROPE) ** -0.5
LAYOUT = mla(
    name="own",
    heads=HEADS,
    latent=LATENT,
    rope=ROPE,
    nope=NOPE,
    value=VALUE,
    softmax_scale=SCALE,
    codec="fp64",
    index=IndexLayout(
        heads=INDEX_HEADS, head_dim=INDEX_DIM, rope_dim=ROPE, pairing="half", top_k=TOP_K
    ),
    index_codec="fp64",
)


class Projected(NamedTuple):
    """A layer's view of new tokens: query (T, H, NOPE + ROPE), entry (T, LATENT + ROPE), and the
    indexer's query (T, Hi, D), head weights (T, Hi) and key (T, D)."""

    query: Tensor
    entry: Tensor
    index_query: Tensor
    index_weights: Tensor
    index_key: Tensor


# Takes a layer and what it projected; returns (T, H, VALUE).
Attention = Callable[[int, Projected], Tensor]


class Model:
    """A transformer with multi-head latent attention; everything but its attention is local."""

    def __init__(self, layers: int, seed: int) -> None:
        self.noise = torch.Generator().manual_seed(seed)
        self.embedding = self._matrix(VOCAB, HIDDEN) * 8
        self.layers = [
            {
                "query": self._matrix(HIDDEN, HEADS * (NOPE + ROPE)) * 4,
                "entry": self._matrix(HIDDEN, LATENT + ROPE),
                "index_query": self._matrix(HIDDEN, INDEX_HEADS * INDEX_DIM),
                "index_weights": self._matrix(HIDDEN, INDEX_HEADS),
                "index_key": self._matrix(HIDDEN, INDEX_DIM),
                "w_uk": self._matrix(HEADS, NOPE, LATENT),
                "w_uv": self._matrix(HEADS, LATENT, VALUE),
                "out": self._matrix(HEADS * VALUE, HIDDEN) * 4,
                "up": self._matrix(HIDDEN, 2 * HIDDEN),
                "down": self._matrix(2 * HIDDEN, HIDDEN),
            }
            for _ in range(layers)
        ]

    def _matrix(self, *shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=self.noise, dtype=torch.float64)
        return drawn / math.sqrt(shape[-2])

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attention) -> Tensor:
        """Logits (T, VOCAB) of the tokens (T,) at these positions (T,)."""
        x = self.embedding[tokens]
        for layer, weights in enumerate(self.layers):
            h = norm(x)
            query = (h @ weights["query"]).view(-1, HEADS, NOPE + ROPE)
            entry = h @ weights["entry"]
            projected = Projected(
                torch.cat((query[..., :NOPE], rotated(query[..., NOPE:], positions)), -1),
                torch.cat((norm(entry[:, :LATENT]), rotated(entry[:, LATENT:], positions)), -1),
                (h @ weights["index_query"]).view(-1, INDEX_HEADS, INDEX_DIM),
                h @ weights["index_weights"],
                h @ weights["index_key"],
            )
            x = x + attend(layer, projected).flatten(1) @ weights["out"]
            x = x + F.silu(norm(x) @ weights["up"]) @ weights["down"]
        return norm(x) @ self.embedding.T


def norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions on the last dimension of x (T, ..., ROPE)."""
    angle = positions[:, None] * 10000.0 ** (-torch.arange(0, ROPE, 2, dtype=torch.float64) / ROPE)
    cos, sin = (f(angle).view(len(x), *[1] * (x.dim() - 2), -1) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Sharded:
    """Attention through a runtime: what an engine does per forward pass and per layer."""

    def __init__(self, runtime: Runtime, model: Model) -> None:
        self.runtime = runtime
        for layer, weights in enumerate(model.layers):
            runtime.load_weights(layer, weights["w_uk"][None], weights["w_uv"][None])

    def forward(self, model: Model, tokens: Tensor, requests: Sequence[Request]) -> Tensor:
        """The logits after the new tokens (R, T) of each request, (R, VOCAB)."""
        length = tokens.shape[1]
        positions = torch.cat(
            [torch.arange(request.position, request.position + length) for request in requests]
        )
        ids = [self.runtime.append(request, length) for request in requests]
        scope = self.runtime.scope(requests=list(zip(requests, ids, strict=True)))

        def attend(layer: int, new: Projected) -> Tensor:
            self.runtime.write(layer, torch.cat(ids), new.entry, new.index_key)
            chosen = self.runtime.select(layer, new.index_query, new.index_weights, scope=scope)
            return self.runtime.attend(layer, new.query, chosen)

        logits = model.forward(tokens.flatten(), positions, attend)
        return logits.view(len(requests), length, VOCAB)[:, -1]

    def idle(self, layers: int) -> None:
        """Take part in the others' forward pass without tokens of one's own."""
        for layer in range(layers):
            self.runtime.idle_select(layer)
            self.runtime.idle_attend(layer)


class Plain:
    """The same attention in one process: all that a sequence sees, per layer, in plain tensors."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.entries = [torch.empty(0, LATENT + ROPE, dtype=torch.float64) for _ in model.layers]
        self.keys = [torch.empty(0, INDEX_DIM, dtype=torch.float64) for _ in model.layers]

    def attached(self, other: Plain) -> Plain:
        """This, followed by all that `other` has seen."""
        both = Plain(self.model)
        both.entries = [torch.cat(pair) for pair in zip(self.entries, other.entries, strict=True)]
        both.keys = [torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True)]
        return both

    def forward(self, tokens: Tensor, position: int) -> Tensor:
        """The logits (VOCAB,) after the tokens (T,), the first of them at `position`."""
        positions = torch.arange(position, position + len(tokens))
        return self.model.forward(tokens, positions, self._attend)[-1]

    def _attend(self, layer: int, new: Projected) -> Tensor:
        before, weights = len(self.keys[layer]), self.model.layers[layer]
        self.entries[layer] = entries = torch.cat((self.entries[layer], new.entry))
        self.keys[layer] = keys = torch.cat((self.keys[layer], new.index_key))
        ahead = torch.arange(len(keys)) > before + torch.arange(len(new.query))[:, None]
        products = torch.einsum("thd,ed->the", new.index_query, keys).relu()
        index = torch.einsum("th,the->te", new.index_weights, products)
        index = index.masked_fill(ahead, -torch.inf)
        # Many scores are exactly 0; as in the runtime the earlier entry wins.
        chosen = index.argsort(dim=1, descending=True, stable=True)[:, :TOP_K]
        unseen = torch.ones_like(ahead).scatter(1, chosen, False) | ahead
        nope = torch.einsum("ec,hnc->hen", entries[:, :LATENT], weights["w_uk"])
        scores = torch.einsum("thn,hen->hte", new.query[..., :NOPE], nope)
        scores += torch.einsum("thr,er->hte", new.query[..., NOPE:], entries[:, LATENT:])
        shares = (SCALE * scores).masked_fill(unseen, -torch.inf).softmax(-1)
        values = torch.einsum("ec,hcv->hev", entries[:, :LATENT], weights["w_uv"])
        return torch.einsum("hte,hev->thv", shares, values)


def as_tokens(text: str) -> Tensor:
    return torch.tensor(list(text.encode()))


def prompt_of(rank: int) -> Tensor:
    return as_tokens(f"rank {rank} says: ")


def decode_on_rank(rank: int, store: str, args: argparse.Namespace) -> list[int]:
    """One rank's engine: join the world, prefill or idle, then decode; returns its tokens."""
    torch.set_num_threads(1)
    if args.ranks > 1:
        where = f"file://{store}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=args.ranks)
    corpus = corpus_of(args)
    config = RuntimeConfig(
        model=uniform_model(LAYOUT, args.layers),
        max_blocks=-(-len(corpus) // 64),
        dtype=torch.float64,
        mode=args.mode,
    )
    model = Model(args.layers, args.seed)
    with Runtime.open(config) as runtime, torch.no_grad():
        engine = Sharded(runtime, model)
        runtime.add_document("corpus", tokens=len(corpus))
        if rank == 0:
            writer = runtime.request(into="corpus")
            engine.forward(model, corpus[None], [writer])
            runtime.release(writer)
        else:
            engine.idle(args.layers)

        request = runtime.request(["corpus"])
        # A step of the world has one forward pass of every rank, whatever its number of tokens.
        logits = engine.forward(model, prompt_of(rank)[None], [request])
        tokens = [int(logits.argmax())]
        while len(tokens) < args.tokens:
            logits = engine.forward(model, torch.tensor([tokens[-1:]]), [request])
            tokens.append(int(logits.argmax()))
    if args.ranks > 1:
        dist.destroy_process_group()
    return tokens


def decode_alone(rank: int, args: argparse.Namespace) -> list[int]:
    """The tokens that `rank` should decode, by one process that has everything."""
    corpus, plain = corpus_of(args), Plain(Model(args.layers, args.seed))
    plain.forward(corpus, 0)
    logits, position = plain.forward(prompt_of(rank), len(corpus)), len(prompt_of(rank))
    tokens = [int(logits.argmax())]
    while len(tokens) < args.tokens:
        logits = plain.forward(torch.tensor(tokens[-1:]), len(corpus) + position)
        position += 1
        tokens.append(int(logits.argmax()))
    return tokens


def corpus_of(args: argparse.Namespace) -> Tensor:
    return as_tokens(Path(__file__).read_text()[: args.corpus])


def main() -> int:
    parser = argparse.ArgumentParser(description="Decode over a sharded corpus, the smallest way.")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16, help="decoded by each rank")
    parser.add_argument("--corpus", type=int, default=1000, help="bytes of this file")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--mode", default="auto", help="or always-route, always-fetch, random")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(args.ranks, mp_context=context) as ranks,
    ):
        futures = [
            ranks.submit(decode_on_rank, rank, f"{folder}/store", args)
            for rank in range(args.ranks)
        ]
        decoded = [future.result() for future in futures]
    with torch.no_grad():
        expected = [decode_alone(rank, args) for rank in range(args.ranks)]
    for rank, tokens in enumerate(decoded):
        print(f"rank {rank}: {tokens}")
    same = decoded == expected
    print("equal to one process" if same else f"DIFFERS from one process: {expected}")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
