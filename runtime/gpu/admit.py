"""Admitting leases: pull the blocks that were fetched most out of their owners' regions (`leases.py`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.coverage import mix
from ...kernels.fetch import fetch
from .pool import GpuPool


def admit(pool: GpuPool, *, least: int) -> None:
    """Lease the blocks of others of which `least` entries, at least 1, were fetched since the last time.

    Only between a step and the next change of tables: until then nobody gives up a block that this
    rank's directory names. Waits for the device. Blocks that did not come whole and as the directory
    says are left out; what was in their slots is gone all the same.
    """
    leases, shape, device = pool.leases, pool.map, pool.memory.device
    assert leases.fetched is not None
    counts, keys = leases.fetched.cpu().sort(descending=True, stable=True)
    counts, keys = counts[counts >= least], keys[counts >= least]
    holder, slot, generation, tokens = pool.directory.records[keys.to(device)].cpu().unbind(1)
    wanted = (holder >= 0) & (holder != pool.rank) & (slot < 0) & (tokens == shape.block_tokens)
    found = torch.stack((keys, holder, generation, counts), 1)[wanted]
    slots, evicted = leases.make_room(found[:, 3])
    pool.slot_of[evicted.to(device)] = -1  # ahead of the overwriting: this rank may die meanwhile
    found = found[: len(slots)]
    found = found[found[:, 1].argsort(stable=True)]  # a fetch is grouped by holder
    if len(slots):
        at_once = shape.staged // shape.block_tokens
        parts = zip(found.split(at_once), slots.split(at_once), strict=True)
        whole = torch.cat([_pull(pool, blocks, to) for blocks, to in parts])
        leases.take(slots[whole], found[whole, 0], found[whole, 2])
    leases.fetched.zero_()  # pulls are counted, too: so the kernel is one that has been compiled


def _pull(pool: GpuPool, blocks: Tensor, slots: Tensor) -> Tensor:
    """Copy blocks (n, 4), key, holder, generation and count of each, into lease slots (n,).

    Returns: (n,) bool, which came whole at all layers.
    """
    shape, device = pool.map, pool.memory.device
    keys, holder, generation, _ = blocks.unbind(1)
    units = keys[:, None] * shape.block_tokens + torch.arange(shape.block_tokens)
    marks = mix(units, generation[:, None]).to(device)
    listed = units.reshape(-1).to(device, torch.int32)
    counts = torch.bincount(holder, minlength=len(pool.peers)) * shape.block_tokens
    counts, to = counts.to(device, torch.int32), (slots + pool.leases.first).to(device)
    came = torch.empty(len(listed), 2, dtype=torch.int32, device=device)
    whole = torch.ones(len(keys), dtype=torch.bool, device=device)
    staged = pool.memory[shape.entries_of(shape.layers) :].view(-1, shape.entry_bytes)
    for layer, stored in enumerate(pool.storage()):
        fetch(
            shape, layer, pool.peers, listed, counts, memory=pool.memory, came=came,
            uses=pool.leases.fetched,
        )  # fmt: skip
        there, mixed = came.view(*units.shape, 2).unbind(2)
        whole &= ((there == 1) & (mixed == marks)).all(1)
        stored.view(shape.slots, -1)[to] = staged[: len(listed)].view(len(keys), -1)
    return whole.cpu()
