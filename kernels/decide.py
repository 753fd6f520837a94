"""Route or fetch, per (item, holder), on the device: the launcher of `decide` in plan.cu.

Letters: N items, W ranks. The closed form is that of the cost model, product by product and in its
order, in float64 without contraction, so the ways are the ones that it gives, ties included. Its
constants come as a `PriceTable`; nothing here knows fabrics or layouts.
"""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from . import nvrtc
from .checks import check_tensor
from .limits import MAX_ITEMS, MAX_PLAN_RANKS

PlanMode = Literal["auto", "always-route", "always-fetch", "given"]
PLAN_MODES: tuple[PlanMode, ...] = get_args(PlanMode)
LOCAL, ROUTE, FETCH = 1, 2, 4  # ROUTE + 1: form B
SOURCE = Path(__file__).with_name("plan.cu")
COLUMN_BYTES = 8 * 21  # of plan.cu's Column
_PRICES = 16


@dataclass(frozen=True, slots=True)
class PriceTable:
    """What an exchange costs, in seconds, if 1, 2, ... W holders are talked to at once.

    numbers (W, 16) float64. A row holds the lines of up to two forms that may be chosen (`used`,
    `items`, `units`, `weights`), of the fetch (`used`, `items`, `units`, `unique`, `found`) and of the
    merge of its partials (`used`, `items`), then the number of branches. `first_way` is the way of the
    first form, 2 or 3.
    """

    numbers: Tensor
    num_forms: int
    first_way: int

    @property
    def world_size(self) -> int:
        return len(self.numbers)


_TENSORS = (
    *("units", "hidden", "records", "fill", "wait_s", "prices"),
    *("pairs_units", "unique_units", "fair_units", "way", "expected"),
    *("items", "units_of", "items_expected", "route_units", "pairs", "listed"),
    *("fetch_units", "counts", "place", "local_units", "local_lengths"),
    *("listers", "seats", "demand", "reps", "gate"),
)
_NUMBERS = (*("rank", "num_items", "num_listed", "num_keys", "first_way"),)


class StepArgs(ctypes.Structure):
    """plan.cu's StepArgs."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _TENSORS),
        *((name, ctypes.c_int) for name in _NUMBERS),
    )


def step_of(tensors: dict[str, Tensor | None], prices: PriceTable, **numbers: int) -> StepArgs:
    """`StepArgs` of these tensors; those that are not named are not read."""
    pointers = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    return StepArgs(
        **pointers,
        **numbers,
        prices=prices.numbers.data_ptr(),
        first_way=prices.first_way,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """plan.cu's Fixed: what a kernel is compiled for."""

    threads: int
    per_thread: int = 1
    parts: int = 1
    block_tokens: int = 1
    unit_tokens: int = 1
    num_branches: int = 1
    world_size: int
    words: int = 1
    num_forms: int
    mode: PlanMode
    stages: int = 0
    together: int = 0

    def name(self, kernel: str) -> str:
        values = [PLAN_MODES.index(v) if isinstance(v, str) else v for v in astuple(self)]
        return f"{kernel}<Fixed<{', '.join(map(str, values))}>>"


def decide(
    pairs_units: Tensor,
    unique_units: Tensor,
    fair_units: Tensor,
    prices: PriceTable,
    *,
    rank: int,
    mode: PlanMode = "auto",
    wait_s: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A way for every (item, holder): the cheapest of fetch all, route all, and the marginal mix.

    Args:
        pairs_units: (N, W) int32, units of each item at each holder; column `rank` is local.
        unique_units: (W,) int32, different units at each holder.
        fair_units: (N, W) float64, each unit divided by the number of items that list it, in
            multiples of 2**-28.
        wait_s: (W,) float64, what each holder is busy with before it starts.
    Returns:
        way: (N, W) int8: 0 nothing, 1 local, 2 routed as form A, 3 as form B, 4 fetched.
    Raises:
        ValueError: naming what does not fit.
    """
    if pairs_units.dim() != 2 or not 1 <= len(pairs_units) <= MAX_ITEMS:
        raise ValueError(
            f"pairs_units must be (N, W) of 1 to {MAX_ITEMS} items, got {tuple(pairs_units.shape)}"
        )
    (num_items, world), device = pairs_units.shape, pairs_units.device
    if out is None:
        out = torch.empty(num_items, world, dtype=torch.int8, device=device)
    check_tensor(pairs_units, "pairs_units", (num_items, world), torch.int32, device)
    check_tensor(unique_units, "unique_units", (world,), torch.int32, device)
    check_tensor(fair_units, "fair_units", (num_items, world), torch.float64, device)
    check_tensor(wait_s, "wait_s", (world,), torch.float64, device)
    check_tensor(out, "out", (num_items, world), torch.int8, device)
    check_choice(prices, device, world_size=world, rank=rank, mode=mode)
    if mode == "given":
        raise ValueError("mode 'given' leaves nothing to decide")
    fixed = Fixed(
        threads=32 * min(world, 32), world_size=world, num_forms=prices.num_forms, mode=mode
    )
    tensors = {
        "pairs_units": pairs_units,
        "unique_units": unique_units,
        "fair_units": fair_units,
        "wait_s": wait_s,
        "way": out,
        "demand": torch.empty(world, num_items, 2, dtype=torch.int64, device=device),
    }
    nvrtc.launch(
        SOURCE,
        fixed.name("decide"),
        step_of(tensors, prices, rank=rank, num_items=num_items),
        grid=1,
        block=fixed.threads,
        shared_bytes=COLUMN_BYTES * world,
        device=device,
    )
    return out


def check_choice(
    prices: PriceTable, device: torch.device, *, world_size: int, rank: int, mode: PlanMode
) -> None:
    """Raise ValueError for invalid prices, rank or mode."""
    if mode not in PLAN_MODES:
        raise ValueError(f"mode must be one of {', '.join(PLAN_MODES)}, got {mode!r}")
    if not 1 <= world_size <= MAX_PLAN_RANKS:
        raise ValueError(f"there may be 1 to {MAX_PLAN_RANKS} ranks, got {world_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    check_tensor(prices.numbers, "prices", (world_size, _PRICES), torch.float64, device)
