"""Route or fetch, per (item, holder), on the device: launcher and kernel.

Letters: N items, W ranks. The closed form is that of the cost model, term by term and in its order
of operations in float64 without contraction, so the ways are the ones that it gives, ties included.
The constants come as `Prices`; nothing here knows fabrics or layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

Mode = Literal["auto", "always-route", "always-fetch", "given"]
MODES: tuple[Mode, ...] = get_args(Mode)
LOCAL, ROUTE, FETCH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # ROUTE + 1: form B
MODE_AUTO, MODE_ROUTE, MODE_FETCH, MODE_GIVEN = (tl.constexpr(i) for i in range(len(MODES)))
MAX_ITEMS = 1024
_NUM_PRICES = tl.constexpr(21)
_NUM_FORM_PRICES = tl.constexpr(5)
_FORMS = tl.constexpr(2)


@dataclass(frozen=True, slots=True, kw_only=True)
class FormPrices:
    """Of one payload form: bytes out and back (coverage included) and at the holder, per item.

    `weight_bytes` are read once per branch of an exchange; `merge_s` is per partial.
    """

    out_bytes: float
    back_bytes: float
    weight_bytes: float
    project_flop: float
    merge_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """The constants of the closed form: seconds, bytes, and rates per second.

    Where units are pulled, nothing is packed and no request sent: `request_header_bytes`,
    `request_unit_bytes`, `reply_header_bytes` and `pack_base_s` are 0 and `pack_rate` is infinite.
    Without splicing `rope_bytes` is 0.

    Args:
        unit_attend_s: attention of one item over one unit.
        splice_base_s: once, if anything is rotated.
        out_rates, in_rates, fetch_rates: for 1, 2, ... W holders at once, of which each gets that.
        forms: the forms that may be chosen, by name; A before B. `merge_s` is of the layout's first.
    """

    header_bytes: float
    item_bytes: float
    unit_bytes: float
    probe_s: float
    attend_base_s: float
    unit_attend_s: float
    merge_base_s: float
    merge_s: float
    memory_rate: float
    flop_rate: float
    branches: float
    request_header_bytes: float
    request_unit_bytes: float
    reply_header_bytes: float
    unit_tokens: float
    entry_bytes: float
    pack_base_s: float
    pack_rate: float
    rope_bytes: float
    splice_base_s: float
    splice_rate: float
    reuse: float
    out_rates: tuple[float, ...]
    in_rates: tuple[float, ...]
    fetch_rates: tuple[float, ...]
    forms: tuple[tuple[Literal["A", "B"], FormPrices], ...]

    def table(self, device: torch.device | str) -> PriceTable:
        """The constants where the kernels read them.

        Raises: ValueError unless `forms` are A, B or both, and the rates are of equal number.
        """
        names = tuple(name for name, _ in self.forms)
        if names not in (("A",), ("B",), ("A", "B")):
            raise ValueError(f"forms must be A, B or A and B, got {names}")
        world = len(self.out_rates)
        if world == 0 or not world == len(self.in_rates) == len(self.fetch_rates):
            raise ValueError(
                "out_rates, in_rates and fetch_rates need one rate for each number of holders, got "
                f"{world}, {len(self.in_rates)} and {len(self.fetch_rates)}"
            )
        shared = [
            *(self.header_bytes, self.item_bytes, self.unit_bytes, self.probe_s),
            *(self.attend_base_s, self.unit_attend_s, self.merge_base_s, self.memory_rate),
            *(self.flop_rate, self.branches, self.merge_s),
            *(self.request_header_bytes, self.request_unit_bytes, self.reply_header_bytes),
            *(self.entry_bytes, self.pack_base_s, self.pack_rate, self.rope_bytes),
            *(self.splice_base_s, self.splice_rate, self.unit_tokens),
        ]
        forms = [
            [f.out_bytes, f.back_bytes, f.weight_bytes, f.project_flop, f.merge_s]
            for _, f in self.forms
        ]
        forms += [[0.0] * len(forms[0])] * (2 - len(forms))
        values = [*shared, *forms[0], *forms[1], self.reuse]
        values += [*self.out_rates, *self.in_rates, *self.fetch_rates]
        numbers = torch.tensor(values, dtype=torch.float64, device=device)
        return PriceTable(numbers, world, len(names), 2 if names[0] == "A" else 3)


@dataclass(frozen=True, slots=True)
class PriceTable:
    """`Prices` as (P,) float64, for `world_size` ranks; ways first_way, first_way + 1, ... route."""

    numbers: Tensor
    world_size: int
    num_forms: int
    first_way: int


@triton.jit
def _route_s(shared, form, items, units, wait_s, out_rate, in_rate):
    """`CostModel.route(...).total`: parts in its order."""
    header, item_bytes, unit_bytes, probe, attend, unit_attend, merge, memory, flop, most = shared
    out_bytes, back_bytes, weight_bytes, project_flop, merge_item = form
    used = tl.where(items > 0, 1.0, 0.0).to(tl.float64)
    lists = items * item_bytes + units * unit_bytes
    weights = tl.minimum(items, most) * weight_bytes
    total = used * probe + (used * header + items * out_bytes + lists) / out_rate
    total += used * wait_s
    total += weights / memory + items * project_flop / flop
    total += used * attend + units * unit_attend
    total += (used * header + items * back_bytes) / in_rate
    total += used * merge + items * merge_item
    return total


@triton.jit
def _fetch_s(shared, fetching, items, units, unique, mixed, out_rate, fetch_rate):
    """`CostModel.fetch(...).total`: parts in its order; `mixed` is 0 or 1."""
    _, _, _, probe, attend, unit_attend, merge, _, _, _ = shared
    merge_item, ask, ask_unit, reply_header, entry, pack, pack_rate, rope, splice, splice_rate, unit_tokens, reuse = fetching  # noqa: E501  # fmt: skip
    used = tl.where(items > 0, 1.0, 0.0).to(tl.float64)
    entries = unique * unit_tokens
    reply = used * reply_header + entries * entry
    rotated = 2 * entries * rope
    spliced = tl.where(rotated > 0, splice, 0.0)
    total = used * probe / reuse + (used * ask + unique * ask_unit) / out_rate / reuse
    total += (used * pack + reply / pack_rate) / reuse
    total += reply / fetch_rate / reuse
    total += (spliced + rotated / splice_rate) / reuse
    total += used * attend + units * unit_attend
    total += mixed * (used * merge + items * merge_item)
    return total


@triton.jit
def three_sums(a, b, c):
    """Sums over axis 0 of three tiles in one reduction, as each is a trip through shared memory."""
    ab, cc = tl.split(tl.sum(tl.join(tl.join(a, c), tl.join(b, c)), axis=0))
    a, c = tl.split(ab)
    b, _ = tl.split(cc)
    return a, b, c


@triton.jit
def _num_sharers(pairs_units_ptr, rank, N, W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Holders other than this rank of which anything is wanted, at least 1."""
    n = tl.arange(0, BN)[:, None]
    num = 0
    for first in range(0, W, BW):
        w = first + tl.arange(0, BW)[None, :]
        here = (n < N) & (w < W) & (w != rank)
        units = tl.load(pairs_units_ptr + n * W + w, mask=here, other=0)
        num += tl.sum((tl.max(units, axis=0) > 0).to(tl.int32), axis=0)
    return tl.maximum(num, 1)


@triton.jit
def decide_columns(
    first, pairs_units_ptr, fair_units_ptr, unique, wait_s_ptr, prices_ptr, rank, N,
    W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BW_ALL: tl.constexpr,
    MODE: tl.constexpr, FORMS: tl.constexpr, FIRST_WAY: tl.constexpr,
):  # fmt: skip
    """Ways (BN, BW) int32 of all items at the BW holders from `first` on; unique (BW,) int32."""
    n, w = tl.arange(0, BN)[:, None], first + tl.arange(0, BW)[None, :]
    here = (n < N) & (w < W)
    units = tl.load(pairs_units_ptr + n * W + w, mask=here, other=0)
    remote = (units > 0) & (w != rank)
    rest = tl.where((units > 0) & (w == rank), LOCAL, 0)
    all_fetch = tl.where(remote, FETCH, rest)
    if MODE == MODE_FETCH:
        way = all_fetch
    elif MODE == MODE_ROUTE and FORMS == 1:
        way = tl.where(remote, FIRST_WAY, rest)
    else:
        way = _priced(
            first, units, remote, rest, n, w, here, pairs_units_ptr, fair_units_ptr, unique,
            wait_s_ptr, prices_ptr, rank, N, W, BN, BW, BW_ALL, MODE, FORMS, FIRST_WAY,
        )  # fmt: skip
    return way


@triton.jit
def _priced(
    first, units, remote, rest, n, w, here, pairs_units_ptr, fair_units_ptr, unique,
    wait_s_ptr, prices_ptr, rank, N,
    W: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BW_ALL: tl.constexpr,
    MODE: tl.constexpr, FORMS: tl.constexpr, FIRST_WAY: tl.constexpr,
):  # fmt: skip
    """Where costs decide; see `decide_columns`."""
    all_fetch = tl.where(remote, FETCH, rest)
    p = prices_ptr
    shared = (
        tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4),
        tl.load(p + 5), tl.load(p + 6), tl.load(p + 7), tl.load(p + 8), tl.load(p + 9),
    )  # fmt: skip
    reuse_at = p + _NUM_PRICES + _FORMS * _NUM_FORM_PRICES
    fetching = (
        tl.load(p + 10), tl.load(p + 11), tl.load(p + 12), tl.load(p + 13), tl.load(p + 14),
        tl.load(p + 15), tl.load(p + 16), tl.load(p + 17), tl.load(p + 18), tl.load(p + 19),
        tl.load(p + 20), tl.load(reuse_at),
    )  # fmt: skip
    wait_s = tl.zeros((BW,), tl.float64)
    if wait_s_ptr is not None:
        w_row = first + tl.arange(0, BW)
        wait_s = tl.load(wait_s_ptr + w_row, mask=w_row < W, other=0.0)

    fair = tl.load(fair_units_ptr + n * W + w, mask=here, other=0.0)
    mine = tl.where(remote, units, 0).to(tl.float64)
    unique = unique.to(tl.float64)
    private = tl.where(remote, tl.maximum(2 * fair - mine, 0.0), 0.0)
    both = tl.sum(remote.to(tl.int64) + (tl.where(remote, units, 0).to(tl.int64) << 32), axis=0)
    items, listed = (both & 0xFFFFFFFF).to(tl.float64), (both >> 32).to(tl.float64)
    if W == BW:  # the tile has all holders
        sharers = tl.maximum(tl.sum((items > 0).to(tl.int32), axis=0), 1)
    else:
        sharers = _num_sharers(pairs_units_ptr, rank, N, W, BN, BW_ALL)
    out_rate = tl.load(reuse_at + sharers)
    in_rate = tl.load(reuse_at + W + sharers)
    fetch_rate = tl.load(reuse_at + 2 * W + sharers)
    none = tl.zeros((BW,), tl.float64)
    fetch_s = _fetch_s(
        shared, fetching, items, listed, tl.minimum(unique, listed), none, out_rate, fetch_rate
    )
    route_s = none
    home = tl.full((BW,), FIRST_WAY, tl.int32)
    for f in tl.static_range(FORMS):
        at = p + _NUM_PRICES + f * _NUM_FORM_PRICES
        form = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
        this_s = _route_s(shared, form, items, listed, wait_s, out_rate, in_rate)
        if f == 0:
            route_s = this_s
        else:
            home = tl.where(this_s < route_s, FIRST_WAY + f, home)
            route_s = tl.minimum(this_s, route_s)
    all_route = tl.where(remote, home[None, :], rest)
    way = all_route
    if MODE == MODE_AUTO:
        way = tl.where((route_s < fetch_s)[None, :], all_route, all_fetch)
        best_s = tl.minimum(route_s, fetch_s)
        others = tl.maximum(unique[None, :] - fair, 0.0)
        fewer, less = items[None, :] - 1.0, listed[None, :] - mine
        fetch_gain = _fetch_s(shared, fetching, items, listed, unique, none, out_rate, fetch_rate)[
            None, :
        ] - _fetch_s(shared, fetching, fewer, less, others, none[None, :], out_rate, fetch_rate)
        for f in tl.static_range(FORMS):
            at = p + _NUM_PRICES + f * _NUM_FORM_PRICES
            form = (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4))
            route_gain = _route_s(shared, form, items, listed, wait_s, out_rate, in_rate)[
                None, :
            ] - _route_s(shared, form, fewer, less, wait_s[None, :], out_rate, in_rate)
            routed = remote & (route_gain < fetch_gain)
            r_items, r_units, r_private = three_sums(
                tl.where(routed, 1.0, 0.0).to(tl.float64),
                tl.where(routed, mine, 0.0),
                tl.where(routed, private, 0.0),
            )
            f_items, f_units = items - r_items, listed - r_units
            mixed = tl.where(r_items > 0, 1.0, 0.0).to(tl.float64)
            f_unique = tl.minimum(unique - r_private, f_units)
            mix_s = _route_s(shared, form, r_items, r_units, wait_s, out_rate, in_rate) + _fetch_s(
                shared, fetching, f_items, f_units, f_unique, mixed, out_rate, fetch_rate
            )
            mix = tl.where(routed, FIRST_WAY + f, all_fetch)
            way = tl.where((mix_s < best_s)[None, :], mix, way)
            best_s = tl.minimum(mix_s, best_s)
    return way


@triton.jit
def _decide_kernel(
    pairs_units_ptr, fair_units_ptr, unique_units_ptr, first_ptr, wait_s_ptr, prices_ptr, way_ptr,
    rank, N, W: tl.constexpr, BN: tl.constexpr, BW_ALL: tl.constexpr,
    MODE: tl.constexpr, FORMS: tl.constexpr, FIRST_WAY: tl.constexpr,
):  # fmt: skip
    """One holder. Where `first` (N, W) is given, its sum is the number of different units."""
    holder = tl.program_id(0)
    n = tl.arange(0, BN)
    if first_ptr is not None:
        unique = tl.load(first_ptr + n * W + holder, mask=n < N, other=0)
        unique = tl.sum(unique, axis=0) + tl.zeros((1,), tl.int32)
    else:
        unique = tl.load(unique_units_ptr + holder + tl.arange(0, 1))
    way = decide_columns(
        holder, pairs_units_ptr, fair_units_ptr, unique, wait_s_ptr, prices_ptr, rank, N,
        W, BN, 1, BW_ALL, MODE, FORMS, FIRST_WAY,
    )  # fmt: skip
    at = n[:, None] * W + holder + tl.arange(0, 1)[None, :]
    tl.store(way_ptr + at, way.to(tl.int8), mask=n[:, None] < N)


def launch_decide(
    pairs_units: Tensor,
    fair_units: Tensor,
    unique_units: Tensor,
    first: Tensor | None,
    wait_s: Tensor | None,
    prices: PriceTable,
    way: Tensor,
    *,
    rank: int,
    mode: Mode,
) -> None:
    """The kernel on tensors that have been checked; one program a holder."""
    num_items, world = pairs_units.shape
    _decide_kernel[(world,)](
        pairs_units, fair_units, unique_units, first, wait_s, prices.numbers, way,
        rank, num_items, W=world, BN=triton.next_power_of_2(num_items),
        BW_ALL=min(triton.next_power_of_2(world), 8), MODE=MODES.index(mode),
        FORMS=prices.num_forms, FIRST_WAY=prices.first_way,
        num_warps=4 if num_items <= 256 else 8, enable_fp_fusion=False,
    )  # fmt: skip


def decide(
    pairs_units: Tensor,
    unique_units: Tensor,
    fair_units: Tensor,
    prices: PriceTable,
    *,
    rank: int,
    mode: Mode = "auto",
    wait_s: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A way for every (item, holder): the cheapest of fetch all, route all, and the marginal mix.

    Args:
        pairs_units: (N, W) int32, units of each item at each holder; column `rank` is local.
        unique_units: (W,) int32, different units at each holder.
        fair_units: (N, W) float64, each unit divided by the number of items that list it.
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
    shape, device = tuple(pairs_units.shape), pairs_units.device
    if out is None:
        out = torch.empty(shape, dtype=torch.int8, device=device)
    check_tensors(
        device,
        pairs_units=(pairs_units, shape, torch.int32),
        unique_units=(unique_units, shape[1:], torch.int32),
        fair_units=(fair_units, shape, torch.float64),
        wait_s=(wait_s, shape[1:], torch.float64),
        out=(out, shape, torch.int8),
    )
    check_choice(prices, device, world_size=shape[1], rank=rank, mode=mode)
    if mode == "given":
        raise ValueError("mode 'given' leaves nothing to decide")
    launch_decide(
        pairs_units, fair_units, unique_units, None, wait_s, prices, out, rank=rank, mode=mode
    )
    return out


def check_tensors(
    device: torch.device, **expected: tuple[Tensor | None, tuple[int, ...], torch.dtype]
) -> None:
    """Raise ValueError unless each tensor (None is left out) is contiguous, on `device` and so."""
    for name, (tensor, shape, dtype) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        if not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"{name} must be contiguous on {device}, got strides {tensor.stride()} "
                f"on {tensor.device}"
            )


def check_choice(
    prices: PriceTable, device: torch.device, *, world_size: int, rank: int, mode: Mode
) -> None:
    """Raise ValueError for prices, a rank or a mode that cannot be."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
    if prices.world_size != world_size or prices.numbers.device != device:
        raise ValueError(
            f"prices must be for {world_size} ranks on {device}, got {prices.world_size} on "
            f"{prices.numbers.device}"
        )
