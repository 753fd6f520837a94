"""World: one rank of a world, and the parts that it is made of. Each part owns its state.

tables     who owns what, as all ranks agreed                (tables.py)
stores     the blocks kept here, their slots and leases      (stores.py)
writes     rows on their way into blocks, here or elsewhere  (writes.py)
stats      every counter                                     (observe/stats.py)
progress   how far the steps of the whole world have come    (`Progress`)
exchanger  how ranks are asked                               (lockstep.py or service/server.py)
backend    what is done with entries                         (cpu/backend.py or gpu/backend.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..partition.directory import Directory
from ..partition.eviction import Usage
from ..partition.layout import Form
from .backend import Backend
from .config import RuntimeConfig
from .cost.model import LayerFacts
from .exchanger import Exchanger
from .observe.stats import Stats
from .stores import Stores, entry_codec
from .tables import Tables
from .transport.base import Sent, Transport
from .transport.messages import Header, Message
from .transport.schema import check_columns
from .writes import Writes


class LayerWeights(NamedTuple):
    """w_uk (G, H, nope, latent) and w_uv (G, H, value, out) of one layer, H the heads of a branch."""

    w_uk: Tensor
    w_uv: Tensor


@dataclass(slots=True)
class Progress:
    """Steps of the whole world: the `epoch` of the last one, and the header of the last exchange if
    everyone was answered in it, and so had taken all writes before."""

    epoch: int = 0
    answered: Header | None = None

    def restart(self, epoch: int) -> None:
        """Count on from this epoch, that all ranks have agreed on."""
        self.epoch, self.answered = epoch, None

    def begin(self) -> None:
        """One more step; no exchange in it is over yet."""
        self.restart(self.epoch + 1)

    def finish(self, header: Header) -> None:
        """Everyone was answered in the exchange of `header`."""
        self.answered = header

    def forget(self) -> None:
        """Something else happened since the last exchange."""
        self.answered = None


class World:
    """A rank's transport, tables, stores and weights. Made by `Runtime.open`."""

    def __init__(
        self,
        config: RuntimeConfig,
        transport: Transport,
        *,
        exchanger: Callable[[World], Exchanger],
        backend: Callable[[World], Backend],
        storage: Sequence[Tensor] | None = None,
        sent_before: Sent | None = None,
    ) -> None:
        """Args:
        exchanger, backend: make the two of this world.
        storage: see `Stores`.
        sent_before: what `transport` had counted when opening began; None: it begins now.
        Raises: ValueError if the placement wants more copies than there are ranks.
        """
        self.config = config
        self.transport = transport
        self.rank, self.world_size = transport.rank, transport.world_size
        self._sent_before = sent_before or transport.counted()
        layers = config.model.layers
        self.tables = Tables(config, self.rank, self.world_size)
        self.stores = Stores(config, self.world_size, storage)
        self.writes = Writes(config, self.tables, self.stores)
        self.stats = Stats(self.world_size, profile_ranges=config.profile_ranges)
        self.usage = Usage(config.half_life)
        self.progress = Progress()
        self.weights: list[LayerWeights | None] = [None] * len(layers)
        self.facts = [
            LayerFacts.of(
                layout,
                entry_bytes=entry_codec(layout).entry_bytes,
                element_bytes=config.dtype.itemsize,
            )
            for layout in layers
        ]
        self._incarnation = config.fingerprint(self.world_size, transport.incarnation)
        self.exchanger = exchanger(self)
        self.backend = backend(self)

    @property
    def directory(self) -> Directory:
        """The directory of now."""
        return self.tables.directory

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the arithmetic on this rank."""
        return torch.float64 if self.config.dtype == torch.float64 else torch.float32

    def askable(self) -> Tensor | None:
        """Whom a plan may ask, as `tables.chosen_copy` takes it; in the engine's thread."""
        return self.tables.askable(self.exchanger.unreachable())

    def forms(self, layer: int) -> tuple[Form, ...]:
        """Payload forms that can be executed: B with the projection weights, which headers compare."""
        return ("A",) if self.weights[layer] is None else ("A", "B")

    def header(self, kind: str, *, layer: int, unit_tokens: int = 1, top_k: int = 0) -> Header:
        """The header of a message of this rank, now."""
        return Header(
            kind=kind,
            incarnation=self._incarnation,
            channel=0,
            epoch=self.progress.epoch,
            tables=self.tables.version,
            layer=layer,
            unit_tokens=unit_tokens,
            top_k=top_k,
        )

    def check_columns(self, message: Message) -> None:
        """Raise ValueError for columns that messages of its kind do not have (`transport/schema.py`)."""
        check_columns(message, payload=self.config.dtype, compute=self.compute_dtype)

    def ask_by(self, exchanger: Exchanger) -> Exchanger:
        """Ask through another exchanger from now on; returns the one before."""
        self.exchanger, before = exchanger, self.exchanger
        return before

    def take_weights(self, layer: int, weights: LayerWeights) -> None:
        """Keep a layer's weights. Their mark joins the table version: ranks that differ are named."""
        self.exchanger.check_tables_may_change()
        here = self.stores.entries.device
        self.weights[layer] = LayerWeights(weights.w_uk.to(here), weights.w_uv.to(here))
        self.tables.mark_weights(layer, weights)

    def adopt(self, directory: Directory, rank: int | None = None) -> None:
        """Take over another directory: give up the blocks that are gone, with their leases and what
        was written for them and not sent, and the copies that are no longer here; give the new ones
        here their slots.

        Args: rank: which of the directory's ranks this one is; None: as the transport says.
        """
        self.exchanger.check_tables_may_change()
        rank = self.rank if rank is None else rank
        before = self.directory
        changed = before.generations != directory.generations
        changed = changed.view(-1, self.config.num_branches)[:, 0]
        unused, wanted = before.references == 0, directory.references > 0
        gone = (~unused & (changed | ~wanted)).nonzero()[:, 0]
        if len(gone):
            self.backend.meet()
            self.stores.give_up(gone)
            keys = self.stores.keys_of("entries", gone)
            self.writes.forget({"entries": keys, "index": gone})
        self.stores.release_missing(directory, rank)
        self.stores.assign_new(directory, rank)
        self.tables.adopt(directory)
        self.usage.keep({document.serial for document in directory.documents.values()})

    def reconnect(self, transport: Transport, sent_before: Sent) -> None:
        """Use another transport, as another rank perhaps: what is here stays, what was
        counted by rank begins anew.
        """
        self.transport, self._sent_before = transport, sent_before
        self.rank, self.world_size = transport.rank, transport.world_size
        self._incarnation = self.config.fingerprint(self.world_size, transport.incarnation)
        self.tables.reconnect(self.rank, self.world_size)
        self.stats.restart(self.world_size)
        self.backend.reconnect()

    def counted(self) -> dict[str, Any]:
        """The counters as plain values."""
        counted, stores, backend = self.stats.plain(), self.stores, self.backend.counted()
        sent, before = self.transport.counted(), self._sent_before
        blocks, leases = stores.entries.block_residence, stores.entries.lease_residence
        return {
            "rank": self.rank,
            **counted,
            "bytes_sent": dict(sent.bytes - before.bytes + backend.bytes_sent),
            "messages_sent": dict(sent.messages - before.messages),
            "bytes_to": dict(sent.bytes_to - before.bytes_to),
            "leases": {"hit": 0, "evicted": 0, **backend.leases},
            "failures": {
                **counted["failures"],
                "deadline": self.transport.expiries,
                "late": self.transport.late.total(),
            },
            "lifetime": {"block": blocks.lifetime.plain(), "lease": leases.lifetime.plain()},
            "reuse_gap": {"block": blocks.reuse_gap.plain(), "lease": leases.reuse_gap.plain()},
            "pool_bytes": stores.entries.num_bytes + stores.index.num_bytes,
            "lease_bytes": stores.entries.lease_bytes,
            "block_bytes": stores.entries.held_bytes + stores.index.held_bytes,
        }
