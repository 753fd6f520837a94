"""The transport of a process: made from its launcher's environment, which nothing else here reads."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from .base import Transport
from .gloo import TorchTransport
from .loopback import LoopbackTransport


def connect(deadline_s: float) -> Transport:
    """The transport of this process: over a gloo group of its own beside torch.distributed's default
    group (made from a launcher's environment, torchrun's, if there is none), or a world of one.
    """
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return LoopbackTransport.world(1, deadline_s=deadline_s)[0]
        dist.init_process_group("gloo", timeout=timedelta(seconds=max(deadline_s, 60.0)))
    if dist.get_world_size() == 1:
        return LoopbackTransport.world(1, deadline_s=deadline_s)[0]
    # Of its own: an engine's messages in the default group must never meet ours.
    group = dist.new_group(backend="gloo")
    return TorchTransport(group=group, deadline_s=deadline_s)


def default_group() -> object | None:
    """torch.distributed's default group, if it has more ranks than this one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD
