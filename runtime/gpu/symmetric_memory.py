"""SymmetricMemory: the memory in which GPUs of one world exchange queries and answers.

It opens NVSHMEM, carves each channel's arena out of one symmetric allocation and hands out the
`Ends` that `kernels/exchange/launch.py` works with. After that nothing here is on the path of a step: the
kernels keep epochs, signals and aborts in device memory, and the host reads one status word.

NVSHMEM ends the process when it runs out of memory or cannot start, so all ranks compare what they
want and what they have before it is entered.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.exchange.layout import Wire
from ...kernels.exchange.roles import STAMPS
from ...kernels.exchange.signals import SILENT, blame
from ...kernels.exchange.types import Ends
from ..errors import PeerError

_ALIGNMENT = 1 << 21
_RESERVE = 1 << 30  # bytes that NVSHMEM and kernels need beside the arena
_OLDEST, _NEWEST = (3, 4), (3, 7)  # of libnvshmem: from the first up to below the second
_MAX_TAGS = 1 << 16
_UNIQUE_ID_BYTES = 128
_MOST_SENT = 1 << 14  # bytes that a rank says at once
_MOST_REASON = 2000
_BY_LIBRARY = {"NVSHMEM_DISABLE_NVLS": "1", "NVSHMEM_DISABLE_NCCL": "1", "NVSHMEM_MAX_TEAMS": "7"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a rank says before NVSHMEM starts. All but `host` to `free_bytes` must be equal."""

    wires: tuple[str, ...]
    heap: int
    incarnation: int
    put: bool
    libnvshmem: str
    nvshmem4py: str
    triton: str
    host: str
    device: str
    reaches: tuple[str, ...]
    free_bytes: int

    def encoded(self) -> bytes:
        packed: bytes = msgpack.packb(asdict(self))
        return packed

    def read(self, rank: int, raw: bytes) -> Facts:
        """The facts of another rank, of the same kinds as these.

        Raises: ValueError naming the rank if it sent anything else.
        """
        try:
            values = msgpack.unpackb(raw)
        except ValueError as error:
            raise ValueError(f"rank {rank} sent what is no msgpack: {error}") from error
        ours = msgpack.unpackb(self.encoded())
        if not isinstance(values, dict) or [(n, type(v)) for n, v in values.items()] != [
            (n, type(v)) for n, v in ours.items()
        ]:
            raise ValueError(f"rank {rank} sent other facts than {list(ours)}: {raw[:60]!r}")
        theirs: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return Facts(**theirs)

    @property
    def shared(self) -> dict[str, object]:
        own = ("host", "device", "reaches", "free_bytes")
        return {name: value for name, value in asdict(self).items() if name not in own}


def refusal(facts: Sequence[Facts], num_bytes: int) -> str | None:
    """Why these ranks cannot share an arena of `num_bytes` each, and the remedy; None if they can."""
    for rank, fact in enumerate(facts):
        for name, value in fact.shared.items():
            if value != facts[0].shared[name]:
                return (
                    f"rank {rank} has {name}={value}, rank 0 has {facts[0].shared[name]}: all ranks "
                    "must open equal wires, heaps, incarnations and ways to send, with equal packages"
                )
    found = tuple(int(part) for part in facts[0].libnvshmem.split(".")[:2])
    if not _OLDEST <= found < _NEWEST:
        oldest, newest = (".".join(map(str, limit)) for limit in (_OLDEST, _NEWEST))
        return (
            f"libnvshmem is {facts[0].libnvshmem}, qroam needs {oldest} up to below {newest}: "
            "install nvidia-nvshmem-cu13==3.4.5"
        )
    for rank, fact in enumerate(facts):
        if fact.free_bytes < num_bytes + _RESERVE:
            return (
                f"rank {rank} has {fact.free_bytes} bytes of device memory free, arena and pool take "
                f"{num_bytes} and {_RESERVE} must remain: open fewer channels, a wire of fewer rows, or "
                "a pool of fewer slots (of a Runtime: max_queries, max_units, max_blocks, corpus_slots)"
            )
    for rank, fact in enumerate(facts):
        for peer, other in enumerate(facts[:rank]):
            if (other.host, other.device) == (fact.host, fact.device):
                return (
                    f"ranks {peer} and {rank} have the same GPU, {fact.device} of {fact.host}: each must "
                    "open with one of its own"
                )
    if facts[0].put:
        return None
    for rank, fact in enumerate(facts):
        for peer, other in enumerate(facts):
            if peer != rank and (other.host != fact.host or other.device not in fact.reaches):
                return (
                    f"rank {rank} ({fact.device} of {fact.host}) cannot store to the memory of rank "
                    f"{peer} ({other.device} of {other.host}): let every rank see all GPUs of its host "
                    "(CUDA_VISIBLE_DEVICES); for GPUs that cannot be stored to, open with put=True"
                )
    return None


class SymmetricMemory:
    """One rank of a world over NVSHMEM. There is one per process, until it is closed.

    heap: (bytes,) uint8, this rank's memory beside the channels, zero at first. heaps: (W,) int64,
    where each rank's is mapped here, 0 where it cannot be reached.
    """

    def __init__(
        self,
        wires: Sequence[Wire],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        incarnation: int = 1,
        deadline_s: float = 2.0,
        put: bool = False,
        ring: int = 0,
        heap: int = 0,
    ) -> None:
        """Open it; every rank of `group` (gloo) at the same time.

        Args:
            wires: of each channel the sizes of its messages, equal everywhere; `staged` exactly if
                `put`.
            incarnation: of this world, other than that of any earlier one of these ranks.
            deadline_s: after which a silent rank is named; the kernels wait 90 % of it.
            put: send by NVSHMEM's put instead of stores, for peers of other hosts. Experimental
                until it has run over InfiniBand.
            ring: epochs whose time stamps are kept, 0 for none.
            heap: bytes that the others can read beside the channels, for a pool of blocks.
        Raises:
            ValueError: on every rank alike, before NVSHMEM is entered: naming the rank and what does
                not fit, is missing there, or differs. Also if memory of a rank turns out not to be mapped.
        """
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.device, self.deadline_s = device, deadline_s
        self._group, self._put = group, put
        self._closed = False
        self._hook: _ModuleHook | None = None
        channels, facts, reason, bitcode = len(wires), None, "", None
        try:
            self._check(wires, incarnation=incarnation, heap=heap)
            if not torch.cuda.is_available():
                raise ValueError(f"{device} was asked for, and torch finds no CUDA device here")
            torch.cuda.set_device(device)
            torch.cuda.init()
            self._library = _library()
            bitcode = str(_device_library()) if put else None
            facts = _facts(
                self._library, wires, device, heap=heap, incarnation=incarnation, put=put
            )
        except Exception as error:  # whatever it is, the others must learn of it
            reason = f"{type(error).__name__}: {error}"
        for rank, why in enumerate(gather(reason.encode()[:_MOST_REASON], group)):
            if why:
                raise ValueError(f"rank {rank}: {why.decode(errors='replace')}")
        assert facts is not None
        sizes = [
            -(-size // _ALIGNMENT) * _ALIGNMENT for size in (*(w.num_bytes for w in wires), heap)
        ]
        starts, num_bytes = [sum(sizes[:channel]) for channel in range(channels + 1)], sum(sizes)
        raw = gather(facts.encoded(), group)
        if refused := refusal([facts.read(rank, text) for rank, text in enumerate(raw)], num_bytes):
            raise ValueError(refused)
        self._start(num_bytes)
        self._base = int(self._library.malloc(num_bytes))
        bases = [
            0 if put and peer != self.rank else int(self._library.ptr(self._base, peer))
            for peer in range(self.world_size)
        ]
        unmapped = "" if put or 0 not in bases else str(bases.index(0))
        for rank, peer in enumerate(gather(unmapped.encode(), group)):
            if peer:
                self.close(abort=True)
                raise ValueError(
                    f"memory of rank {peer.decode()} is not mapped at rank {rank}, though its device "
                    "can be reached: open with put=True"
                )
        memory = _view(self._base, num_bytes, device)
        memory.zero_()
        own = starts[channels]
        self.heap = memory[own : own + heap]
        self.heaps = torch.tensor([base and base + own for base in bases], device=device)
        self._status = torch.zeros(channels, dtype=torch.int64, pin_memory=True)
        if put:
            self._hook = _ModuleHook(self._library)
        self._ends = [
            Ends(
                wire=wire,
                rank=self.rank,
                channel_tag=incarnation * channels + channel,
                arena=memory[start : start + wire.num_bytes].view(torch.int32),
                peers=torch.tensor([base and base + start for base in bases], device=device),
                epoch=torch.zeros(1, dtype=torch.int64, device=device),
                counters=torch.zeros(
                    2 * self.world_size * wire.chunks + 1, dtype=torch.int32, device=device
                ),
                tables=torch.zeros(1, dtype=torch.int32, device=device),
                status=self._status[channel : channel + 1],
                ring=torch.zeros(ring, len(STAMPS), dtype=torch.int64, device=device)
                if ring
                else None,
                budget_ns=int(0.9e9 * deadline_s),
                put=bitcode,
            )
            for channel, (wire, start) in enumerate(zip(wires, starts[:channels], strict=True))
        ]
        torch.cuda.synchronize(device)
        gather(b"", group)  # nobody writes to an arena that is not zero yet

    def _check(self, wires: Sequence[Wire], *, incarnation: int, heap: int) -> None:
        """Raise ValueError for arguments that cannot be."""
        for wire in wires:
            if wire.world_size != self.world_size or wire.staged != self._put:
                raise ValueError(
                    f"a wire of {wire.world_size} ranks, staged {wire.staged}: here are "
                    f"{self.world_size}, and wires are staged exactly if messages are put"
                )
        if not wires or incarnation < 1 or (incarnation + 1) * len(wires) > _MAX_TAGS:
            raise ValueError(
                f"incarnation {incarnation} of {len(wires)} channels: both must be positive, and "
                f"{_MAX_TAGS} channel tags are all there are"
            )
        device, deadline_s = self.device, self.deadline_s
        if device.type != "cuda" or device.index is None or not deadline_s > 0:
            raise ValueError(
                f"needs a CUDA device with its index and a deadline, got {device}, {deadline_s} s"
            )
        if heap < 0:
            raise ValueError(f"heap must not be negative, got {heap}")

    def ends(self, channel: int = 0) -> Ends:
        """What `exchange` works with on this channel."""
        return self._ends[channel]

    def mapped(self, peer: int) -> int:
        """The address here of a rank's memory of all channels, 0 if it cannot be reached. It stays
        readable while this process lives, also when that rank is dead."""
        return int(self._library.ptr(self._base, peer))

    def heap_of(self, peer: int) -> Tensor:
        """(heap,) uint8, a rank's memory beside the channels, as it is mapped here. It stays readable
        while this process lives, also when that rank is dead, and after `close(abort=True)`.

        Raises: ValueError if it cannot be reached.
        """
        address = int(self.heaps[peer])
        if not address:
            raise ValueError(f"the memory of rank {peer} is not mapped here")
        return _view(address, len(self.heap), self.device)

    def check(self) -> None:
        """Read the status that the kernels write; no synchronisation. Before a token leaves, the
        stream must have passed the exchange.

        Raises: PeerError naming the rank that was silent or sent an invalid message.
        """
        for code in self._status.tolist():
            if code:
                culprit, why = blame(code)
                reason = "sent a message of other tables or sizes"
                if why == SILENT:
                    reason = f"no answer within {self.deadline_s:g} s"
                raise PeerError((culprit,), reason)

    def stamps(self, epoch: int, channel: int = 0) -> Mapping[str, int]:
        """Nanoseconds of this GPU's clock at which that epoch was where; waits for the device."""
        ring = self._ends[channel].ring
        if ring is None:
            raise ValueError("opened without a ring of time stamps")
        return dict(zip(STAMPS, ring[epoch % len(ring)].tolist(), strict=True))

    def close(self, *, abort: bool = False) -> None:
        """End it, all ranks together; idempotent. The exchanges must be over.

        With `abort` nothing is freed, because that would wait for the dead: the process may read
        what is still mapped, and should leave by `os._exit`, since NVSHMEM's own exit waits too.
        """
        if self._closed:
            return
        self._closed = True
        if self._hook is not None:
            self._hook.remove()
        if abort:
            return
        torch.cuda.synchronize(self.device)
        gather(b"", self._group)
        self._ends = []
        self._library.free(self._base)
        self._library.hostlib_finalize()

    def _start(self, num_bytes: int) -> None:
        """Initialise NVSHMEM with a unique id of rank 0; its settings are environment variables."""
        settings = {**_BY_LIBRARY, "NVSHMEM_SYMMETRIC_SIZE": str(num_bytes + (64 << 20))}
        if not self._put:
            settings["NVSHMEM_REMOTE_TRANSPORT"] = "none"
        os.environ.update(settings)
        unique = self._library.uniqueid()
        if self.rank == 0:
            self._library.get_uniqueid(unique.ptr)
        raw = gather(ctypes.string_at(unique.ptr, _UNIQUE_ID_BYTES), self._group)[0]
        if len(raw) != _UNIQUE_ID_BYTES:
            raise ValueError(f"rank 0 sent a unique id of {len(raw)} bytes")
        ctypes.memmove(unique.ptr, raw, _UNIQUE_ID_BYTES)
        attributes = self._library.InitAttr()
        self._library.set_attr_uniqueid_args(self.rank, self.world_size, unique.ptr, attributes.ptr)
        self._library.hostlib_init_attr(self._library.Flags.INIT_WITH_UNIQUEID, attributes.ptr)


def gather(raw: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """What every rank of a gloo group sent, in rank order; so it is a barrier, too."""
    if len(raw) > _MOST_SENT:
        raise ValueError(f"{len(raw)} bytes are too long to send, {_MOST_SENT} are allowed")
    ours = torch.zeros(4 + _MOST_SENT, dtype=torch.uint8)
    text = len(raw).to_bytes(4, "little") + raw
    ours[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    everyone = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, ours, group=group)
    texts = [text.numpy().tobytes() for text in everyone]
    return [text[4 : 4 + int.from_bytes(text[:4], "little")] for text in texts]


def _library() -> Any:
    """NVSHMEM's raw bindings, their host library loaded."""
    import nvshmem.bindings as bindings  # only here: the package needs a GPU's libraries
    from cuda.pathfinder import load_nvidia_dynamic_lib

    load_nvidia_dynamic_lib("nvshmem_host")
    return bindings


def _facts(
    library: Any,
    wires: Sequence[Wire],
    device: torch.device,
    *,
    heap: int,
    incarnation: int,
    put: bool,
) -> Facts:
    parts = [ctypes.c_int() for _ in range(3)]
    library.vendor_get_version_info(*(ctypes.addressof(part) for part in parts))
    uuids = [
        str(torch.cuda.get_device_properties(index).uuid)
        for index in range(torch.cuda.device_count())
    ]
    reaches = tuple(
        uuid
        for index, uuid in enumerate(uuids)
        if index != device.index and torch.cuda.can_device_access_peer(device.index, index)
    )
    return Facts(
        wires=tuple(map(str, wires)),
        heap=heap,
        incarnation=incarnation,
        put=put,
        libnvshmem=".".join(str(part.value) for part in parts),
        nvshmem4py=version("nvshmem4py-cu13"),
        triton=version("triton"),
        host=socket.gethostname(),
        device=uuids[device.index],
        reaches=reaches,
        free_bytes=torch.cuda.mem_get_info(device)[0],
    )


class _Memory:
    """Device memory as torch takes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def _view(address: int, num_bytes: int, device: torch.device) -> Tensor:
    """(num_bytes,) uint8 over memory that is not torch's."""
    return torch.as_tensor(_Memory(address, num_bytes), device=device)


def _device_library() -> Path:
    """NVSHMEM's device functions as bitcode, beside its host library."""
    import nvidia.nvshmem

    folder = Path(next(iter(nvidia.nvshmem.__path__)))
    path = folder / "lib" / "libnvshmem_device.bc"
    if not path.exists():
        raise ValueError(f"{path} is missing: install nvidia-nvshmem-cu13==3.4.5")
    return path


class _ModuleHook:
    """Gives every module that has NVSHMEM's device state in it to the library, as it is loaded."""

    def __init__(self, library: Any) -> None:
        from triton import knobs

        self._library, self._chain = library, knobs.runtime.kernel_load_end_hook
        self._chain.add(self._loaded)

    def remove(self) -> None:
        self._chain.remove(self._loaded)

    def _loaded(self, module: int, function: int, name: str, *rest: object) -> None:
        from cuda.bindings import driver

        status, *_ = driver.cuModuleGetGlobal(module, b"nvshmemi_device_state_d")
        if status == driver.CUresult.CUDA_SUCCESS and self._library.cumodule_init(module):
            raise RuntimeError(f"NVSHMEM did not take the module of {name}")
