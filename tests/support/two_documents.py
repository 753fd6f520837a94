"""A runtime with two documents and a request, with entries, keys and queries that tests know."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qroam.partition.presets import named_layout, uniform_model, with_codec
from qroam.runtime import Request, Runtime, RuntimeConfig
from qroam.runtime.scope import Selection
from qroam.runtime.transport.base import Transport

B = 8


TOKENS = {"a": 4 * B, "b": 2 * B + 3}


LAYOUT = with_codec(named_layout("mla-tiny"), "fp64", "fp64")


MODEL = uniform_model(LAYOUT, 2)


Q, H, D, HI, DI = 3, LAYOUT.heads, LAYOUT.key_dim, 4, 32


def config(**changes: Any) -> RuntimeConfig:
    sizes: dict[str, Any] = {
        "model": MODEL,
        "max_blocks": 16,
        "block_tokens": B,
        "corpus_slots": 12,
        "private_blocks": 3,
        "request_blocks": 2,
        "dtype": torch.float64,
        "deadline_s": 10.0,
    }
    return RuntimeConfig(**(sizes | changes))


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ENTRIES = {name: numbers(tokens, D, seed=tokens) for name, tokens in TOKENS.items()}


KEYS = {name: numbers(tokens, DI, seed=tokens + 1) for name, tokens in TOKENS.items()}


QUERY, INDEX_QUERY, WEIGHTS = numbers(Q, H, D), numbers(Q, HI, DI), numbers(Q, HI).abs()


class Bench:
    """A runtime with two documents and a request whose tokens are written, and one correct step."""

    def __init__(self, transport: Transport, **changes: Any) -> None:
        self.runtime = runtime = Runtime.open(config(**changes), transport)
        for name, tokens in TOKENS.items():
            runtime.add_document(name, tokens=tokens)
            for layer in range(2):
                runtime.load_document(name, layer, ENTRIES[name], KEYS[name])
        self.request = runtime.request(["a"])
        self.at = runtime.append(self.request, 2)
        for layer in range(2):
            runtime.write(layer, self.at, numbers(2, D, seed=5), numbers(2, DI, seed=6))
        self.scope = runtime.scope(documents=["a"], queries=Q)
        self.closed = runtime.request()
        runtime.release(self.closed)
        # Equal in every field to `request`, but not ours.
        self.foreign = Request(
            attached=self.request.attached,
            tail=self.request.tail,
            capacity=self.request.capacity,
            block_tokens=B,
            length=self.request.length,
            blocks=list(self.request.blocks),
        )

    def step(self) -> Tensor:
        selection = self.runtime.select(0, INDEX_QUERY, WEIGHTS, scope=self.scope, top_k=9)
        mine = self.runtime.scope(requests=[(self.request, self.at)])
        both = self.runtime.selection(torch.tensor([[0, 1, int(self.at[0])]] * 2).int(), mine)
        return torch.cat(
            [self.runtime.attend(0, QUERY, selection), self.runtime.attend(1, QUERY[:2], both)]
        )

    def state(self) -> list[Any]:
        world = self.runtime._world
        tables = [
            table.tolist()
            for store in (world.stores.entries, world.stores.index)
            for table in (store.fill, store.slot_of, store.key_of)
        ]
        request = (self.request.length, list(self.request.blocks), self.request.is_open)
        requests = self.runtime._requests
        free = (list(requests._free_seats), list(requests._free_numbers))
        staged = world.writes._staged
        pushes = [len(p) for p in staged["entries"] + staged["index"]]
        return [tables, request, free, pushes, world.directory.version, world.progress.epoch]

    def pick(self, *ids: int, unit_tokens: int = 1) -> Selection:
        return self.runtime.selection(
            torch.tensor([list(ids)] * Q, dtype=torch.int32), self.scope, unit_tokens=unit_tokens
        )

    def attend(self, ids: Tensor, query: Tensor = QUERY, **sizes: Any) -> Tensor:
        return self.runtime.attend(0, query, self.runtime.selection(ids, self.scope, **sizes))

    def select(
        self, query: Tensor = INDEX_QUERY, weights: Tensor = WEIGHTS, **args: Any
    ) -> Selection:
        return self.runtime.select(
            args.pop("layer", 0), query, weights, **({"documents": ["a"]} | args)
        )

    def write(self, *ids: int, rows: int | None = None, **args: Any) -> None:
        count = len(ids) if rows is None else rows
        entries = args.get("entries", numbers(count, D))
        keys = args.get("keys", numbers(count, DI))
        self.runtime.write(
            args.get("layer", 0), torch.tensor(ids, dtype=torch.int32), entries, keys
        )
