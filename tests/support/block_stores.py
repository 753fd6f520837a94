"""Small block stores of each codec, and rows for them."""

from __future__ import annotations

import torch
from torch import Tensor

from qroam.partition.codec import Codec, make_codec
from qroam.partition.pool import BlockStore

B = 8


DIMS = {"fp64": (6, 0), "fp32": (5, 0), "bf16": (7, 0), "fp8_v32": (144, 16), "fp8_index": (32, 0)}


def codec_of(name: str) -> Codec:
    dim, rope_dim = DIMS[name]
    return make_codec(name, dim=dim, rope_dim=rope_dim)


def store_of(
    *codecs: Codec | None, slots: int = 4, keys: int = 8, lease_entries: int = 0
) -> BlockStore:
    return BlockStore(
        codecs, num_slots=slots, num_keys=keys, block_tokens=B, lease_entries=lease_entries
    )


def rows_for(codec: Codec, count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return codec.encode(torch.randn(count, codec.dim, generator=generator, dtype=torch.float64))


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
