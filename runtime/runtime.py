"""Runtime: the public face. Input is checked here, at the door (`door.py`), and nowhere deeper."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..partition.directory import Document, with_pin, with_quota, without_document
from ..partition.eviction import POLICIES, Policy
from ..partition.layout import Layout
from ..partition.prefix_hash import block_hashes
from .config import RuntimeConfig
from .corpus import documents
from .corpus.document_copy import lease
from .corpus.rejoin import Former, rejoin
from .corpus.restore import RestoreReport, restore
from .corpus.snapshot import PendingSnapshot, SnapshotReport, begin_snapshot, finish_snapshot
from .corpus.verify import BlockCheck, check_blocks
from .cost.predicate import MODES, Mode
from .cpu.answer import MAX_TOP_K
from .cpu.copies import lost_blocks
from .cpu.step import Selection, attend_step, select_step
from .errors import CoverageError, PeerError, SnapshotError
from .gpu.host_step import attend_on_gpu
from .gpu.limits import check_on_cpu, check_step
from .observe.explain import DecisionLine, explain_last, predicted_last
from .scope import Attached, Request, Scope, scope_of, stacked
from .service.server import Service, start_service
from .transport.base import Transport
from .transport.tensor_parallel import joined_lane, lane_number
from .validate import (
    check_attachment,
    check_disjoint,
    check_name,
    check_offsets,
    check_scope,
    check_selection,
    check_sources,
    check_tensor,
    check_writable,
)
from .world import LayerWeights, World, default_group

T = TypeVar("T")


class Runtime:
    """One rank of a world that attends over a corpus partitioned among its ranks.

    Whatever changes the documents, `select`, `attend` and `close` are steps of the whole world: every
    rank calls the same ones in the same order, with its own queries or with none. All else is local.
    From `serve` until its service is closed, `select` and `attend` need no other rank to step.
    """

    def __init__(
        self,
        world: World,
        *,
        owns_transport: bool,
        whole: RuntimeConfig | None = None,
        heads: tuple[int, int] | None = None,
    ) -> None:
        self._world = world
        self._owns_transport = owns_transport
        self._whole, self._heads = whole or world.config, heads  # of all lanes
        self._former: Former | None = None  # while it is to rejoin
        self._default_group = default_group()  # of this life
        self._closed = False
        config = world.config
        self._free_requests = list(range(max(config.private_blocks, 1)))[::-1]
        self._free_blocks = list(range(config.private_blocks))[::-1]
        self._open_requests: list[Request] = []
        self._snapshot: PendingSnapshot | None = None

    @classmethod
    def open(
        cls,
        config: RuntimeConfig,
        transport: Transport | None = None,
        *,
        heads: tuple[int, int] | None = None,
        incarnation: int = 0,
    ) -> Runtime:
        """Open this rank. Without a transport: the default process group, one made from torchrun's
        environment, or a world of one that needs no launcher. A transport that is given serves one
        runtime after another; whoever made it closes it.

        Args:
            config: of the whole model, on every rank the same.
            heads: (start, count) of the query heads that this rank has, where the ranks of an instance
                share them (tensor-parallel lanes); None: all. Ranks with the same heads are a lane,
                and the runtime is one of that lane: its ranks are the instances, its config's layouts
                have the lane's heads, and so have queries, outputs, sinks and weights.
            incarnation: above 0, the world goes on that others `rejoin` with the same number: this
                rank gets their documents, and the copies that it is to hold. Weights it loads itself.
        Raises:
            PeerError if another rank opened with another config or incarnation. ValueError on every
            rank if the lanes do not cover all heads once, or instances are of unequal sizes; or if
            entries are to be on GPUs, and a rank has none of its own, or a package is missing.
        """
        if incarnation and config.device == "cuda":
            raise ValueError("nobody rejoins a world with entries on GPUs: its incarnation is 0")
        with joined_lane(config, transport, heads, incarnation) as joined:
            world = World(*joined)
            if incarnation:
                rejoin(world, None)
        owns_transport = joined.transport is not transport
        return cls(world, owns_transport=owns_transport, whole=config, heads=heads)

    def disconnect(self) -> None:
        """Leave a world that broke, or that is about to change; all that is stored here stays, and no
        step is taken before `rejoin`. Idempotent.

        torch.distributed may be begun anew after this; a transport that was given is its maker's to close.

        Raises: RuntimeError if the server of a service broke; or if it is still at a request, and then
            this is to be done again; or if entries are on GPUs.
        """
        self._check_open()
        check_on_cpu(self.config, "leave its world and go on")
        if self._snapshot is not None:
            self._snapshot.cancel(self.config.deadline_s)
            self._snapshot = None
        if self._world.service is not None:
            with suppress(PeerError):  # of those that are lost it is known
                self._world.service.close()
        if self._former is None:
            self._former = Former.of(self._world, None)
        if self._owns_transport:
            self._world.transport.close()

    def rejoin(self, transport: Transport | None = None, *, incarnation: int) -> None:
        """Go on in a new incarnation of the world, with those who are there now: survivors, who call
        this, and ranks that come with nothing, who `open` with the same number. A step of them all.

        Ranks may be fewer, more, or numbered anew. Documents, requests, leases and weights stay. Blocks
        get back the copies that they lost, where there is room; those that nobody has left are named
        by `lost_blocks`, and come back from a snapshot by `restore`. Documents that were changed since
        the last step, and not on all survivors, are again as they were: `documents` tells.

        Args:
            transport: as for `open`; among those who are there now. Without one, torch.distributed is
                begun anew between `disconnect` and this: `destroy_process_group`, then
                `init_process_group` with the ranks that there are now.
            incarnation: of the world, above all that this rank has seen.
        Raises: ValueError if it is not. RuntimeError if the default process group is to be used and is
            that of the former life. PeerError if a rank is lost meanwhile, and this can be done
            again without it; or if survivors do not have the same documents.
        """
        self._check_open()
        check_on_cpu(self.config, "rejoin")
        last = self._world.transport.incarnation
        if not isinstance(incarnation, int) or incarnation <= last:
            raise ValueError(f"incarnation must be a number above {last}, got {incarnation!r}")
        group = default_group()
        if transport is None and group is not None and group is self._default_group:
            raise RuntimeError(
                "the default process group is still that of the former life, and waits for who is gone: "
                "disconnect, destroy it and initialize one of those who are there now, or give a "
                "transport"
            )
        self.disconnect()
        with joined_lane(self._whole, transport, self._heads, incarnation) as joined:
            self._former = Former.of(self._world, self._former)
            self._world.reconnect(joined.transport, joined.sent_before)
            self._owns_transport = joined.transport is not transport
            self._default_group = default_group()
            rejoin(self._world, self._former)
        self._former = None

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self._world.service is not None:
            with suppress(PeerError):  # the error that ended this is the one to be heard of
                self._world.service.close()
        if error is not None and not isinstance(error, (PeerError, SnapshotError)):
            self._world.transport.abort((self.rank,), f"raised {type(error).__name__}: {error}")
        self.close()

    def close(self) -> None:
        """Leave the world; idempotent. Peers that still wait for this rank get an error that names it,
        unless the transport was given and stays open. With entries on GPUs it is a step of the world.
        """
        if not self._closed:
            self._closed = True
            if self._snapshot is not None:
                self._snapshot.cancel(self.config.deadline_s)
            try:
                if self._world.service is not None:
                    self._world.service.close()
            finally:
                try:
                    if self._world.gpu is not None:
                        self._world.gpu.close(self._world)
                finally:
                    if self._owns_transport:
                        self._world.transport.close()

    @property
    def rank(self) -> int:
        return self._world.rank

    @property
    def world_size(self) -> int:
        return self._world.world_size

    @property
    def config(self) -> RuntimeConfig:
        return self._world.config

    # Documents and requests ----------------------------------------------------------------------

    def add_document(
        self,
        name: str,
        *,
        tokens: int | None = None,
        token_ids: Sequence[int] | None = None,
        salt: str | None = None,
        position: int = 0,
        load: Tensor | None = None,
        group: str = "",
    ) -> Document:
        """Declare a document and place its blocks; its entries come by `load_document` or `write`.

        Args:
            tokens: how many, if `token_ids` are not given.
            token_ids: what the document says. Its leading blocks are then shared with a document
                that says the same up to there, at the same position with the same salt; `shared` of
                the result counts them, and whoever stored them first writes them.
            salt: all else that entries depend on, such as what the prefill attends to.
            position: canonical position of its first token.
            load: expected load of each block, for the `balanced` placement.
            group: whose quota its blocks count for.
        Raises: ValueError if the name is taken or a capacity is exhausted; nothing changes then.
        """
        self._check_not_serving()
        world = self._world
        tokens, hashes = self._content(name, tokens, token_ids, salt, position, group)
        directory = documents.added(
            world,
            world.directory,
            name,
            tokens=tokens,
            position=position,
            load=load,
            hashes=hashes,
            group=group,
        )
        world.adopt(directory)
        return directory.documents[name]

    def documents(self) -> list[Document]:
        """All documents, in the order they were added."""
        return list(self._world.directory.documents.values())

    def remove_document(self, name: str) -> None:
        """Forget a document. Blocks that no other one shares are free, here and everywhere, and what
        still refers to it (scopes, selections, requests, leases) is refused or finds nothing.

        Raises: ValueError if it is unknown or pinned.
        """
        self._check_not_serving()
        self._world.adopt(without_document(self._world.directory, name))

    def pin(self, name: str) -> None:
        """Keep a document from being removed or evicted."""
        self._check_not_serving()
        self._world.adopt(with_pin(self._world.directory, name, True))

    def unpin(self, name: str) -> None:
        """Undo `pin`."""
        self._check_not_serving()
        self._world.adopt(with_pin(self._world.directory, name, False))

    def pinned(self) -> frozenset[str]:
        """Names of the pinned documents."""
        return self._world.directory.pinned

    def set_quota(self, group: str, blocks: int | None) -> None:
        """Bound the blocks of a group's documents, shared ones counted for each; None lifts it."""
        self._check_not_serving()
        self._world.adopt(with_quota(self._world.directory, check_name(group, "group"), blocks))

    def make_room(
        self,
        name: str,
        *,
        tokens: int | None = None,
        token_ids: Sequence[int] | None = None,
        salt: str | None = None,
        position: int = 0,
        group: str = "",
        policy: Policy = "lru",
    ) -> list[str]:
        """Remove documents until `add_document` with the same arguments has room; returns their names.

        Pinned documents stay, and those that an open request of any rank reads or writes. `lru`
        removes what was attended to longest ago, `reuse` what was attended to least, old uses
        counting less (`half_life` of the config).

        Raises: ValueError on every rank, and nothing changes, if that cannot make enough room.
        """
        self._check_not_serving()
        tokens, hashes = self._content(name, tokens, token_ids, salt, position, group)
        if name in self._world.directory.documents:
            raise ValueError(f"document {name!r} exists already")
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
        in_use = {
            source.name
            for request in self._open_requests
            for source in request.sources
            if isinstance(source, Document)
        }
        with self._in_world_step():
            return documents.make_room(
                self._world,
                name,
                tokens=tokens,
                policy=policy,
                group=group,
                hashes=hashes,
                in_use=frozenset(in_use),
            )

    def publish(
        self,
        name: str,
        request: Request | None,
        *,
        token_ids: Sequence[int] | None = None,
        salt: str | None = None,
        group: str = "",
    ) -> Document:
        """Make the request's own tokens a document, at their positions; they stay with this rank.

        Every rank calls this, one of them with its request. The rows are copied bit for bit; the
        request goes on as it was.

        Args: token_ids, salt, group: as for `add_document`; the first two where the request is.
        Raises: ValueError if a token is not written yet, or as for `add_document`, on every rank.
        """
        self._check_not_serving()
        check_name(name, "document")
        check_name(group, "group")
        hashes: Sequence[bytes] = ()
        if request is not None:
            self._check_request(request)
            if request.into is not None or not request.length:
                raise ValueError("only a request's own private tokens can be published")
            if token_ids is not None and len(token_ids) != request.length:
                raise ValueError(f"{len(token_ids)} token ids for {request.length} tokens")
            missing = documents.unwritten(self._world, request)
            if missing is not None:
                raise ValueError(f"the request cannot be published: {missing} is not written")
            start = request.position - request.length
            _, hashes = self._content(name, request.length, token_ids, salt, start, group)
        with self._in_world_step():
            return documents.publish(self._world, name, request, hashes, group)

    def load_document(
        self, name: str, layer: int, entries: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Store this rank's copies out of a whole document's entries, given on every rank.

        Args:
            entries: (tokens, G, D), or (tokens, D) with one branch, the config's dtype.
            index_keys: (tokens, D_index), if the layer has an indexer of its own.
        Blocks that the document shares are left to the document that stored them first.
        """
        document = self._world.directory.document(name)
        layout = self._layer(layer)
        if isinstance(entries, Tensor) and entries.dim() == 2 and layout.num_branches == 1:
            entries = entries[:, None]
        self._check_rows(layer, document.tokens, entries, index_keys)
        first = document.shared * document.block_tokens
        keys = None if index_keys is None else index_keys[first:]
        self._world.store(layer, document.ids(first), entries[first:], keys, push=False)

    def request(
        self,
        documents: Sequence[str | tuple[str, int]] = (),
        *,
        into: str | None = None,
        start: int | None = None,
    ) -> Request:
        """A reader of documents, whose own tokens stay at home, or prefill `into` a document.

        Args:
            documents: names, or (name, position) to attach a document with its first token at that
                position instead of its own. Nothing is written: queries are rotated instead.
            start: with `into`, how many tokens of the document come from other requests; by default
                those that it shares with other documents.
        """
        self._check_open()
        world, config = self._world, self._world.config
        attached = self._attached(documents)
        if into is not None:
            document = world.directory.document(into)
            others = [attachment.document for attachment in attached]
            if document in others:
                raise ValueError(f"document {into!r} is attached and written by the same request")
            check_disjoint([*others, document])
            shared = document.shared * config.block_tokens
            start = shared if start is None else start
            if not shared <= start < document.tokens:
                raise ValueError(
                    f"start must be in [{shared}, {document.tokens}) of document {into!r}, got {start}"
                )
            request = Request(
                attached=attached,
                tail=document.blocks,
                capacity=document.tokens,
                block_tokens=config.block_tokens,
                into=document,
                length=start,
            )
        else:
            if not self._free_requests or not config.private_blocks:
                raise ValueError(
                    f"all {config.private_blocks} private blocks or requests are in use"
                )
            number = self._free_requests.pop()
            first = config.max_blocks + number * config.request_blocks
            request = Request(
                attached=attached,
                tail=tuple(range(first, first + config.request_blocks)),
                capacity=config.request_blocks * config.block_tokens,
                block_tokens=config.block_tokens,
            )
        self._open_requests.append(request)
        return request

    def append(self, request: Request, tokens: int) -> Tensor:
        """Make room for the request's next tokens, at home; returns their entry ids (tokens,) int32.

        Raises: ValueError if the request, the document or the private pool has no room; nothing
        changes then.
        """
        self._check_request(request)
        world, block_tokens = self._world, self._world.config.block_tokens
        check_sources(world, request.sources)
        first = request.length
        if tokens < 1 or first + tokens > request.capacity:
            raise ValueError(
                f"cannot append {tokens} tokens: room for {request.capacity - first} is left"
            )
        if request.into is None:
            needed = -(-(request.length + tokens) // block_tokens) - len(request.blocks)
            if needed > len(self._free_blocks):
                raise ValueError(
                    f"cannot append {tokens} tokens: {needed} private blocks needed, "
                    f"{len(self._free_blocks)} of {world.config.private_blocks} are free"
                )
            for _ in range(needed):
                block = request.tail[len(request.blocks)]
                request.blocks.append(self._free_blocks.pop())
                world.assign_private(block, request.blocks[-1])
        request.length += tokens
        return request.ids(first, first + tokens)

    def release(self, request: Request) -> None:
        """Forget a request and free its private blocks."""
        self._check_request(request)
        request.is_open = False
        self._open_requests.remove(request)
        if request.into is None:
            for block in request.tail[: len(request.blocks)]:
                self._world.release_private(block)
            self._free_blocks.extend(request.blocks)
            config = self._world.config
            number = (request.tail[0] - config.max_blocks) // config.request_blocks
            self._free_requests.append(number)

    def lease(self, request: Request | None, name: str | None) -> Tensor | None:
        """Fetch a whole document into the request's own tokens, moved to the request's position.

        For long reuse: entries and index keys of all layers come in one exchange, their rotary
        columns are rotated once, all layers together, and from then on they are the request's own,
        until it is released. Every rank calls this, those that want nothing with (None, None).

        Returns: the entry ids (tokens,) int32, as from `append`; None if nothing was wanted.
        Raises: ValueError if there is no room; CoverageError if a token of the document is unwritten,
            or was written at a layer that has had no step since.
        """
        self._check_not_serving()
        if request is None and name is None:
            with self._in_step():
                lease(self._world, None, torch.empty(0, dtype=torch.int32), 0)
            return None
        if request is None or name is None:
            raise ValueError("give a request and a document's name, or neither")
        self._check_request(request)
        if request.into is not None:
            raise ValueError("a document is leased by requests with private tokens only")
        document = self._world.directory.document(name)
        offset = request.position - document.position
        check_offsets(self.config.model, {offset})
        ids = self.append(request, document.tokens)
        with self._in_step():
            lease(self._world, document, ids, offset)
        return ids

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Store entries computed here; copies at other ranks get them with this layer's next step,
        which on GPUs an `attend` straight after the layer's `select` is not.

        Args:
            ids: (n,) int32 entry ids from `append`. entries, index_keys: as for `load_document`.
        """
        self._check_open()
        layout, world = self._layer(layer), self._world
        check_tensor(ids, "ids", (None,), torch.int32)
        if isinstance(entries, Tensor) and entries.dim() == 2 and layout.num_branches == 1:
            entries = entries[:, None]
        self._check_rows(layer, len(ids), entries, index_keys)
        check_writable(world, ids, self._open_requests)
        world.store(layer, ids, entries, index_keys, push=True)

    def load_weights(self, layer: int, w_uk: Tensor, w_uv: Tensor) -> None:
        """Give this rank a layer's projections, which makes payload form B possible; on every rank.

        From then on `attend` takes un-absorbed queries and returns projected outputs.

        Args: w_uk (G, h, nope, latent), w_uv (G, h, value, out), h the heads of a branch.
        """
        layout = self._layer(layer)
        if layout.projection is None:
            raise ValueError(f"layout {layout.name!r} has no projection")
        head = (layout.num_branches, layout.branch_heads)
        check_tensor(w_uk, "w_uk", (*head, layout.projection.nope_dim, layout.absorbed_dim), None)
        check_tensor(w_uv, "w_uv", (*head, layout.value_dim, layout.projection.out_dim), None)
        if not w_uk.is_floating_point() or not w_uv.is_floating_point():
            raise ValueError(f"weights must be floating point, got {w_uk.dtype} and {w_uv.dtype}")
        if not bool(w_uk.isfinite().all() & w_uv.isfinite().all()):
            raise ValueError("weights must be finite")
        dtype = self._world.compute_dtype
        self._world.take_weights(
            layer,
            LayerWeights(
                w_uk.detach().to(dtype).contiguous(), w_uv.detach().to(dtype).contiguous()
            ),
        )

    def scope(
        self,
        *,
        documents: Sequence[str | tuple[str, int]] | None = None,
        requests: Sequence[tuple[Request, Tensor]] | None = None,
        queries: int = 0,
    ) -> Scope:
        """What queries may see: `queries` of them see `documents`, given as for `request`; or each
        request's own tokens `(request, ids)` see its documents and its tail up to themselves.
        """
        block_tokens = self._world.config.block_tokens
        if (documents is None) == (requests is None):
            raise ValueError("give either documents or requests")
        if documents is not None:
            at = torch.zeros(queries, dtype=torch.int32)
            return scope_of(self._attached(documents), None, at, block_tokens=block_tokens)
        assert requests is not None
        scopes = []
        for request, ids in requests:
            self._check_request(request)
            check_sources(self._world, request.sources)
            check_tensor(ids, "ids", (None,), torch.int32)
            if bool((request.indices(ids) < 0).any()):
                raise ValueError(f"ids must lie in the request's {request.length} own tokens")
            scopes.append(scope_of(request.attached, request, ids, block_tokens=block_tokens))
        return stacked(scopes) if scopes else self.scope(documents=())

    # Steps ---------------------------------------------------------------------------------------

    def select(
        self,
        layer: int,
        query: Tensor,
        weights: Tensor,
        *,
        documents: Sequence[str | tuple[str, int]] | None = None,
        scope: Scope | None = None,
        top_k: int | None = None,
        unit_tokens: int = 1,
    ) -> Selection:
        """The exact global top-k of each index query over what it may see; ties to the lower id.

        Args:
            query: (Q, Hi, D_index), weights: (Q, Hi) head weights with all scales folded in.
            documents: what all queries see; or `scope` for each its own.
            top_k: units a query, the layout's by default.
            unit_tokens: 1 selects entries, more selects blocks of that many (scored by their best).
        """
        self._check_connected()
        layout = self._layer(layer)
        index = layout.index
        if index is None:
            raise ValueError(f"layer {layer} ({layout.name!r}) has no indexer")
        check_tensor(query, "index query", (None, index.heads, index.head_dim), self.config.dtype)
        check_tensor(weights, "index weights", (len(query), index.heads), None)
        whole = isinstance(unit_tokens, int) and unit_tokens >= 1
        if not whole or self.config.block_tokens % unit_tokens:
            raise ValueError(
                f"unit_tokens must divide block_tokens {self.config.block_tokens}, got {unit_tokens}"
            )
        if (documents is None) == (scope is None):
            raise ValueError("give either documents or a scope")
        if scope is None:
            scope = self.scope(documents=documents, queries=len(query))
        check_scope(self._world, scope, len(query))
        count = index.top_k if top_k is None else top_k
        if not isinstance(count, int) or not 1 <= count <= MAX_TOP_K:
            raise ValueError(f"top_k must be in [1, {MAX_TOP_K}], got {count}")
        if self.config.checked and not bool(query.isfinite().all() & weights.isfinite().all()):
            raise ValueError("index queries and weights must be finite")
        self._touch(scope)
        return self._answered(
            lambda: select_step(
                self._world,
                layer,
                query,
                weights.to(self._world.compute_dtype),
                scope,
                top_k=count,
                unit_tokens=unit_tokens,
            )
        )

    def selection(self, ids: Tensor, scope: Scope, *, unit_tokens: int = 1) -> Selection:
        """A selection made elsewhere: unit ids (Q, K) or (Q, G, K) int32, -1 padding."""
        return Selection(ids, unit_tokens, scope)

    def attend(
        self,
        layer: int,
        query: Tensor,
        selection: Selection,
        *,
        sink: Tensor | None = None,
        mode: Mode | None = None,
    ) -> Tensor:
        """Attention over the selected units of the corpus and of the requests' own tokens.

        Args:
            query: (Q, H, D): un-absorbed rows (`layout.query_dim`) if the layer's weights were
                loaded, else rows in key space (`layout.key_dim`); rope applied.
            sink: (H,) natural-log logits without a value, added to each head's softmax once.
            mode: instead of the config's, for this step.
        Returns:
            (Q, H, `layout.out_dim`), or value columns (`layout.value_dim`) without weights. A query
            that selects nothing gets 0.
        Raises:
            ValueError at the door; CoverageError if an answer is not what was asked; PeerError, or a
            BlocksLostError that names what nobody has a copy of: of a step it is not told to the
            others, who wait for this rank: it calls `idle_attend`, or attends something else.
        """
        self._check_connected()
        layout = self._layer(layer)
        dim = layout.key_dim if self._world.weights[layer] is None else layout.query_dim
        check_tensor(query, "query", (None, layout.heads, dim), self.config.dtype)
        if sink is not None:
            check_tensor(sink, "sink", (layout.heads,), None)
        if self.config.checked:
            finite = bool(query.isfinite().all())
            if not finite or (sink is not None and bool(sink.isnan().any())):
                raise ValueError("queries must be finite, and sinks not NaN")
        if mode is not None and mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        check_selection(self._world, layout, selection, len(query))
        mode = mode or self.config.mode
        attend = attend_step
        if self._world.gpu is not None:
            check_step(self.config, selection, mode)
            attend = attend_on_gpu
        self._touch(selection.scope)
        return self._answered(
            lambda: attend(self._world, layer, query, selection, sink=sink, mode=mode)
        )

    def idle_select(self, layer: int) -> None:
        """Take part in the others' `select` without a query of one's own."""
        index = self._layer(layer).index
        if index is None:
            raise ValueError(f"layer {layer} has no indexer")
        nobody = torch.empty(0, index.heads, index.head_dim, dtype=self.config.dtype)
        self.select(layer, nobody, torch.empty(0, index.heads), documents=())

    def idle_attend(self, layer: int) -> None:
        """Take part in the others' `attend` without a query of one's own."""
        layout = self._layer(layer)
        dim = layout.key_dim if self._world.weights[layer] is None else layout.query_dim
        query = torch.empty(0, layout.heads, dim, dtype=self.config.dtype)
        nothing = torch.empty(0, 0, dtype=torch.int32)
        self.attend(layer, query, Selection(nothing, 1, self.scope(documents=())))

    # Service -------------------------------------------------------------------------------------

    def serve(self, *, max_requests: int = 64, max_bytes: int = 1 << 28) -> Service:
        """Answer the others from a thread until the service is closed, whatever this engine does.

        A step of the whole world like `attend`; from then on every rank selects and attends when it
        wants to, or never, and asks only the holders of what it needs. Between services documents
        are added, removed, published, pinned and leased, and weights loaded; not meanwhile.

        Args:
            max_requests, max_bytes: requests of others taken in and not answered yet; beyond that
                (a single larger request aside) whoever asks is held back.
        Raises: ValueError; RuntimeError if this rank serves already, or entries are on GPUs; PeerError.
        """
        self._check_connected()
        check_on_cpu(self.config, "serve")
        for name, bound in (("max_requests", max_requests), ("max_bytes", max_bytes)):
            if not isinstance(bound, int) or bound < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {bound!r}")
        if self._world.service is not None:
            raise RuntimeError("this rank serves already")
        with self._in_step():
            return start_service(self._world, max_requests=max_requests, max_bytes=max_bytes)

    def avoid(self, ranks: Collection[int]) -> None:
        """Ask replicas instead of these ranks from the next step on, where there are any. Ranks that
        are lost or silent in service need not be named here.

        Raises: ValueError for a rank outside the world or this one; nothing changes then.
        """
        wrong = [rank for rank in ranks if not 0 <= rank < self.world_size or rank == self.rank]
        if wrong:
            raise ValueError(
                f"rank {self.rank} cannot avoid {wrong} in a world of {self.world_size}"
            )
        self._world.avoided = frozenset(ranks)

    def lost_blocks(self) -> dict[str, tuple[range, ...]]:
        """By document, the runs of its blocks that no rank that can be asked has a copy of, counted
        from the document's first; what needs them raises BlocksLostError.
        """
        return lost_blocks(self._world.directory, self._world.askable())

    # The corpus on disk --------------------------------------------------------------------------

    def snapshot(self, path: str | Path) -> SnapshotReport:
        """Save all closed blocks of the corpus in the folder `path`, which all ranks share; a step.

        Blocks that the folder's last snapshot has are not written again. When this returns, on any
        rank, the snapshot is on disk as a whole. Its parent folder must exist.

        Raises: SnapshotError (a ValueError) on every rank if some rank could not, or while there are
        `lost_blocks`; the last snapshot is untouched then, and the world goes on.
        """
        self.begin_snapshot(path)
        return self.finish_snapshot()

    def begin_snapshot(self, path: str | Path) -> None:
        """The first half of `snapshot`: what is closed now is written beside the following steps, or
        a service.
        """
        self._check_not_serving()
        if self._snapshot is not None:
            raise ValueError(f"a snapshot to {self._snapshot.folder} is under way: finish it first")
        with self._in_step():
            self._snapshot = begin_snapshot(self._world, Path(path))

    def finish_snapshot(self) -> SnapshotReport:
        """The second half: wait until every rank has written its part, and commit."""
        self._check_not_serving()
        if self._snapshot is None:
            raise ValueError("no snapshot is under way: begin one first")
        pending, self._snapshot = self._snapshot, None
        with self._in_step():
            return finish_snapshot(self._world, pending)

    def restore(
        self, path: str | Path, *, documents: Collection[str] | None = None
    ) -> RestoreReport:
        """Add the documents of a snapshot, placed by this world's ranks and placement; a step.

        Their groups, pins and shared beginnings come back; quotas of groups that have none here.
        Blocks that say what a document here says already are shared with it instead.

        Args: documents: only these; those that are here with blocks of which nobody has a copy are
            replaced, and what referred to them (scopes, requests) is refused, unless more of one is
            left than was saved: `remove_document` it first. None: all, as new ones.
        Raises: SnapshotError (a ValueError) on every rank. What is wrong with the manifest, the
        model, names, room or the size of a file is found before anything changes; a block whose
        bytes are damaged is found later, and the world refuses further steps then.
        """
        self._check_not_serving()
        with self._in_step():
            return restore(
                self._world, Path(path), None if documents is None else frozenset(documents)
            )

    def verify(self, sample: int | None = None) -> list[BlockCheck]:
        """Compare the hashes of a block's copies, of `sample` random closed blocks or all; a step.

        Returns: a check for each, the same on every rank; those that are not `is_sound` have copies
        that differ, are missing, or are not what they were in a snapshot.
        """
        self._check_not_serving()
        if sample is not None and (not isinstance(sample, int) or sample < 1):
            raise ValueError(f"sample must be a whole number of at least 1, got {sample!r}")
        with self._in_step():
            return check_blocks(self._world, sample)

    # Insight -------------------------------------------------------------------------------------

    def explain(self) -> list[DecisionLine]:
        """Why the last `attend` asked whom for what: a line per (query, holder)."""
        return explain_last(self._world)

    def predicted_s(self) -> float:
        """Seconds the cost model predicts for the last `attend`, as decided; 0 before the first."""
        return predicted_last(self._world)

    def drop_leases(self) -> None:
        """Forget every fetched copy."""
        world = self._world
        world.leases = [world.entries.leases(layer) for layer in range(len(world.leases))]
        if world.gpu is not None:
            world.gpu.pool.leases.drop()

    def stats(self) -> dict[str, Any]:
        """Counters since `open`: bytes as counted in the transport's send, decisions, phases, memory.

        Ranks are those of the lane, where there are lanes: instances.
        """
        return {"lane": lane_number(self._world.transport), **self._world.counted()}

    # The door ------------------------------------------------------------------------------------

    def _answered(self, ask: Callable[[], T]) -> T:
        """A step, or in service a request, which goes on to other holders while there are any."""
        service = self._world.service
        if service is not None:
            return service.persist(ask)
        with self._in_step():
            return ask()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Whatever ends a step early is told to every other rank, so that none waits in vain."""
        try:
            yield
        except (PeerError, SnapshotError):  # every rank raises it, or nothing has happened yet
            raise
        except CoverageError as error:
            self._world.transport.abort(error.holders, f"rank {self.rank} was not served: {error}")
            raise
        except BaseException as error:
            self._world.transport.abort((self.rank,), f"raised {type(error).__name__}: {error}")
            raise

    @contextmanager
    def _in_world_step(self) -> Iterator[None]:
        """A step that every rank refuses alike once all have spoken: nobody waits for anybody then."""
        try:
            yield
        except (PeerError, ValueError):
            raise
        except BaseException as error:
            self._world.transport.abort((self.rank,), f"raised {type(error).__name__}: {error}")
            raise

    def _content(
        self,
        name: str,
        tokens: int | None,
        token_ids: Sequence[int] | None,
        salt: str | None,
        position: int,
        group: str,
    ) -> tuple[int, tuple[bytes, ...]]:
        """How many tokens a document to be added has, and its blocks' hashes if it says what they are."""
        check_name(name, "document")
        check_name(group, "group")
        count = len(token_ids) if tokens is None and token_ids is not None else tokens
        whole = isinstance(count, int) and isinstance(position, int)
        if not whole or count is None or count < 1 or position < 0:
            raise ValueError(
                f"document {name!r}: needs whole tokens > 0 and position >= 0, got {count}, {position}"
            )
        if token_ids is None:
            return count, ()
        if len(token_ids) != count:
            raise ValueError(f"document {name!r}: {len(token_ids)} token ids for {count} tokens")
        block_tokens = self.config.block_tokens
        return count, block_hashes(
            token_ids, block_tokens=block_tokens, position=position, salt=salt
        )

    def _touch(self, scope: Scope) -> None:
        """Count a use of the documents that a step's queries see."""
        serials = [source.serial for source in scope.sources if isinstance(source, Document)]
        self._world.usage.touch(serials, self._world.epoch)

    def _check_rows(
        self, layer: int, count: int, entries: Tensor, index_keys: Tensor | None
    ) -> None:
        """Entries (n, G, D) and, if the layer has an indexer of its own, their index keys."""
        self._check_open()
        layout, world = self._layer(layer), self._world
        shape = (count, layout.num_branches, layout.entry_dim)
        check_tensor(entries, "entries", shape, self.config.dtype)
        if (index_keys is None) != (world.index.codecs[layer] is None):
            raise ValueError(
                f"layer {layer} of {layout.name!r}: index keys and indexer must go together"
            )
        if index_keys is not None:
            assert layout.index is not None
            check_tensor(index_keys, "index keys", (count, layout.index.head_dim), None)

    def _attached(self, wanted: Sequence[str | tuple[str, int]]) -> tuple[Attached, ...]:
        if isinstance(wanted, str):
            raise ValueError(f"documents must be a list of names, got the string {wanted!r}")
        attached = []
        for item in wanted:
            name, position = check_attachment(item)
            document = self._world.directory.document(name)
            offset = 0 if position is None else position - document.position
            attached.append(Attached(document, offset))
        documents = [document for document, _ in attached]
        if len({document.name for document in documents}) != len(documents):
            raise ValueError(f"a document is attached twice: {list(wanted)}")
        check_disjoint(documents)
        check_offsets(self.config.model, {offset for _, offset in attached})
        return tuple(attached)

    def _layer(self, layer: int) -> Layout:
        layers = self.config.model.layers
        if not isinstance(layer, int) or not 0 <= layer < len(layers):
            raise ValueError(f"layer must be in [0, {len(layers)}), got {layer}")
        return layers[layer]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the runtime is closed")

    def _check_connected(self) -> None:
        self._check_open()
        if self._former is not None:
            raise RuntimeError("the runtime is disconnected: rejoin first")

    def _check_not_serving(self) -> None:
        self._check_connected()
        self._world.check_not_serving()

    def _check_request(self, request: Request) -> None:
        self._check_open()
        if not request.is_open or request not in self._open_requests:
            raise ValueError("the request was released, or belongs to another runtime")
