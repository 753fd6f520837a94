"""RuntimeConfig: every size and choice of a runtime, frozen and checked once."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from itertools import pairwise
from typing import Literal, get_args

import torch

from ..partition.layout import ModelLayout
from ..partition.placement import Placement
from .cost.predicate import MODES, Mode
from .cost.profile import FabricProfile, load_profile
from .gpu.limits import Device, check_config

IndexPlacement = Literal["with-blocks", "replicated"]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16)
_FABRICS: dict[Device, str] = {"cpu": "loopback", "cuda": "nvlink4"}  # the defaults
_OWN_CHOICES = frozenset(
    {"deadline_s", "log_decisions", "profile_ranges"}
)  # in which ranks may differ


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """What every rank of a world must agree on, but for its own deadline, log and ranges.

    Args:
        model: the per-layer layouts.
        max_blocks: blocks the corpus may have in the whole world.
        block_tokens: B, tokens of a block.
        corpus_slots: (block, branch) copies one rank can hold; None: an even share of them all.
        private_blocks: blocks one rank keeps for the tokens of its running requests.
        request_blocks: blocks one request may grow to.
        placement, index_placement: where blocks and index keys live.
        lease_entries: fetched entries kept for reuse per layer; 0 keeps none. On GPUs whole blocks.
        half_life: exchanges after which a use of a document counts half, in reuse-aware eviction.
        mode: who decides; `random` draws from `seed`.
        reuse: R, expected uses of a fetched unit, in the cost model.
        fabric: the cost model's constants: a profile, the name of a shipped one, or the path of a TOML
            file. None: by device, `nvlink4` with "cuda" (GPUs of one host joined by NVLink), otherwise
            `loopback` (ranks of one CPU host). No profile is shipped for gloo between hosts: give one.
            `fabric_profile` is the profile in use.
        dtype: of queries and outputs, and of payloads on the wire.
        deadline_s: the longest wait for another rank.
        workspace_bytes: bound on the temporary tensors of one attention or scoring tile.
        checked: reject duplicate, foreign and invisible ids in every selection.
        log_decisions: log a JSON line per group of equal decisions (`decision_log.py`).
        profile_ranges: name the phases of a step in torch's profiler, and in NVTX with CUDA.
        device: where entries are kept and attended to; with "cuda" on each rank's current device.
        max_queries, max_units: on GPUs, the most queries of a rank's step and units of a query.
        buckets: on GPUs, smaller sizes of step, ascending, which are compiled too when a world opens; a
            step takes the smallest that holds its queries, each rank by itself.
    """

    model: ModelLayout
    max_blocks: int
    block_tokens: int = 64
    corpus_slots: int | None = None
    private_blocks: int = 16
    request_blocks: int = 16
    placement: Placement = field(default_factory=Placement)
    index_placement: IndexPlacement = "with-blocks"
    lease_entries: int = 0
    half_life: int = 10_000
    mode: Mode = "auto"
    seed: int = 0
    reuse: float = 1.0
    fabric: FabricProfile | str | None = None
    dtype: torch.dtype = torch.float32
    deadline_s: float = 30.0
    workspace_bytes: int = 32 << 20
    checked: bool = True
    log_decisions: bool = False
    profile_ranges: bool = False
    device: Device = "cpu"
    max_queries: int = 64
    max_units: int = 2048
    buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelLayout):
            raise ValueError(f"model must be a ModelLayout, got {type(self.model).__name__}")
        sizes: tuple[str, ...]
        sizes = ("max_blocks", "block_tokens", "request_blocks", "workspace_bytes", "half_life")
        sizes = (*sizes, "max_queries", "max_units")
        if self.corpus_slots is not None:
            sizes = (*sizes, "corpus_slots")
        for name in (*sizes, "private_blocks", "lease_entries", "seed"):
            value = getattr(self, name)
            if type(value) is not int or abs(value) >= 2**63:
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("private_blocks", "lease_entries"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        listed = self.buckets if type(self.buckets) is tuple else (None,)
        steps = (0, *listed, self.max_queries)
        if any(type(size) is not int for size in steps) or any(a >= b for a, b in pairwise(steps)):
            raise ValueError(
                "buckets must be a tuple of whole numbers that ascend to below "
                f"max_queries={self.max_queries}, got {self.buckets!r}"
            )
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known: {', '.join(MODES)}")
        if self.index_placement not in ("with-blocks", "replicated"):
            raise ValueError(f"unknown index placement {self.index_placement!r}")
        for name in ("reuse", "deadline_s"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
            if abs(getattr(self, name)) <= sys.float_info.max:  # 2 and 2.0 are the same choice
                object.__setattr__(self, name, float(getattr(self, name)))
        if not 1 <= self.reuse <= sys.float_info.max:
            raise ValueError(f"reuse must be finite and at least 1, got {self.reuse}")
        if not 0 < self.deadline_s <= 86400:
            raise ValueError(f"deadline_s must be in (0, 86400], got {self.deadline_s}")
        if not isinstance(self.placement, Placement):
            raise ValueError(f"placement must be a Placement, got {self.placement!r}")
        for name in ("checked", "log_decisions", "profile_ranges"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.fabric, str):
            object.__setattr__(self, "fabric", load_profile(self.fabric))
        if not (self.fabric is None or isinstance(self.fabric, FabricProfile)):
            raise ValueError(
                "fabric must be a FabricProfile, the name of a shipped one or the path of a .toml "
                f"file, or None, got {self.fabric!r}"
            )
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {self.dtype}")
        products = 8 * max(
            (layer.index.heads for layer in self.model.layers if layer.index), default=0
        )
        if self.workspace_bytes < products:
            raise ValueError(f"workspace_bytes must be at least {products}: one score of all heads")
        if self.max_ids * self.block_tokens >= 2**31:
            raise ValueError(
                f"{self.max_ids} (block, branch) keys of {self.block_tokens} tokens "
                "do not fit int32 ids"
            )
        if self.device not in get_args(Device):
            raise ValueError(f"device must be one of {get_args(Device)}, got {self.device!r}")
        if self.device == "cuda":
            check_config(
                self.model,
                self.dtype,
                max_queries=self.max_queries,
                max_units=self.max_units,
                lease_entries=self.lease_entries,
                block_tokens=self.block_tokens,
                mode=self.mode,
            )

    @property
    def fabric_profile(self) -> FabricProfile:
        """The cost model's constants: `fabric`, or the default of the device if none was given."""
        if isinstance(self.fabric, FabricProfile):
            return self.fabric
        return _shipped_profile(_FABRICS[self.device])

    @property
    def num_branches(self) -> int:
        return self.model.num_branches

    @property
    def max_ids(self) -> int:
        """(block, branch) keys: the corpus's, then those of this rank's private blocks."""
        requests = max(self.private_blocks, 1)
        return (self.max_blocks + requests * self.request_blocks) * self.num_branches

    def slots_for(self, world_size: int) -> int:
        """Corpus slots of one rank's pool."""
        if self.corpus_slots is not None:
            return self.corpus_slots
        copies = self.max_blocks * self.num_branches * self.placement.copies
        return -(-copies // world_size)

    def check_incarnation(self, incarnation: int) -> None:
        """Raises: ValueError if a world with this config does not go on in that incarnation."""
        if incarnation and self.device == "cuda":
            raise ValueError("a world with entries on GPUs is not rejoined: its incarnation is 0")

    def check_world(self, world_size: int) -> None:
        """Raises: ValueError if a world of that many ranks cannot have this config."""
        if self.placement.copies > world_size:
            raise ValueError(
                f"{self.placement.copies} copies need as many ranks, the world has {world_size}"
            )

    def described(self) -> list[str]:
        """A line `name=value` per leaf field that ranks must agree on; compared when they open.

        The fabric is described by the profile in use: a default equals the same profile given.
        """
        values = {name: getattr(self, name) for name in self.__slots__ if name not in _OWN_CHOICES}
        values["fabric"] = self.fabric_profile
        return [
            f"{leaf}={value!r}"
            for name, given in values.items()
            for leaf, value in _leaves(name, given)
        ]

    def fingerprint(self, world_size: int, incarnation: int = 0) -> int:
        """31 bits of a hash over the description and the world's incarnation, carried by every header."""
        text = "|".join([str(world_size), str(incarnation), *self.described()])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") & 0x7FFFFFFF


@cache
def _shipped_profile(name: str) -> FabricProfile:
    return load_profile(name)


def _leaves(name: str, value: object) -> Iterator[tuple[str, object]]:
    """The fields of nested dataclasses, by dotted name, so that an error names a difference exactly."""
    if is_dataclass(value):
        for inner in fields(value):
            yield from _leaves(f"{name}.{inner.name}", getattr(value, inner.name))
    elif isinstance(value, tuple) and any(map(is_dataclass, value)):
        for at, item in enumerate(value):
            yield from _leaves(f"{name}[{at}]", item)
    else:
        yield name, value
