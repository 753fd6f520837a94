"""Runtime: the public face. Arguments are checked here (`validate.py`), and nowhere deeper."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..partition.bounds import MAX_TOKENS, whole
from ..partition.directory import Document, with_pin, with_quota, without_document
from ..partition.eviction import POLICIES, Policy
from .ambient import isolated
from .config import RuntimeConfig
from .copies import lost_blocks
from .corpus.document_copy import answer_copies, copy_document
from .corpus.documents import added, content, make_room, publish, published_content
from .corpus.rejoin import rejoin
from .corpus.restore import RestoreReport, restore
from .corpus.snapshot import PendingSnapshot, SnapshotReport, begin_snapshot, finish_snapshot
from .corpus.verify import BlockCheck, check_blocks
from .cost.predicate import Mode
from .cpu.backend import CpuBackend
from .errors import PeerError, SnapshotError
from .lockstep import Lockstep, agreed_step, step
from .membership import Membership
from .observe.explain import DecisionLine, explain_last, predicted_last
from .requests import Requests
from .scope import Request, Scope, Selection, scope_of, stacked
from .service.server import Service, start_service
from .transport.base import Sent, Transport
from .transport.tensor_parallel import joined_lane, lane_number
from .validate import (
    check_attached,
    check_attend,
    check_copy,
    check_count,
    check_disjoint,
    check_layer,
    check_name,
    check_own_ids,
    check_rows,
    check_select,
    check_sources,
    check_tensor,
    check_weights,
    check_writable,
)
from .world import LayerWeights, World


@isolated
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
        """`whole` is the config of all tensor-parallel lanes, if `world` is one of several."""
        self._world = world
        self._membership = Membership(
            world, whole or world.config, heads, owns_transport=owns_transport
        )
        self._requests = Requests(world.config, world.stores)
        self._snapshot: PendingSnapshot | None = None
        self._closed = False

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
        config.check_incarnation(incarnation)
        with joined_lane(config, transport, heads, incarnation) as joined:
            world = opened_world(*joined)
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
        self._world.backend.require("leave its world and go on")
        self._cancel_snapshot()
        with suppress(PeerError):  # of those that are lost it is known
            self._world.exchanger.close()
        self._membership.leave()

    def rejoin(self, transport: Transport | None = None, *, incarnation: int) -> None:
        """Go on in a new incarnation of the world, with those who are there now: survivors, who call
        this, and ranks that come with nothing, who `open` with the same number. A step of them all.

        Ranks may be fewer, more, or numbered anew. Documents, requests, leases and weights stay. Blocks
        get back the copies that they lost, where there is room; those that nobody has left are named
        by `lost_blocks`, and come back from a snapshot by `restore`. Documents that were changed since
        the last step, and not on all survivors, are again as they were: see `documents`.

        Args:
            transport: as for `open`; among those who are there now. Without one, torch.distributed is
                begun anew between `disconnect` and this: `destroy_process_group`, then
                `init_process_group` with the ranks that there are now.
            incarnation: of the world, above all that this rank has seen.
        Raises: ValueError if it is not. RuntimeError if the default process group is to be used and is
            that of the former incarnation. PeerError if a rank is lost meanwhile, and this can be done
            again without it; or if survivors do not have the same documents.
        """
        self._check_open()
        self._world.backend.require("rejoin")
        self._membership.check_rejoin(transport, incarnation)
        self.disconnect()
        self._membership.rejoin(transport, incarnation)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            with suppress(PeerError):  # the first error is the one to raise
                self._world.exchanger.close()
            if not isinstance(error, (PeerError, SnapshotError)):
                reason = f"raised {type(error).__name__}: {error}"
                self._world.transport.abort((self.rank,), reason)
        self.close()

    def close(self) -> None:
        """Leave the world; idempotent. Peers that still wait for this rank get an error that names it,
        unless the transport was given and stays open. With entries on GPUs it is a step of the world.
        """
        if self._closed:
            return
        self._closed = True
        with ExitStack() as closing:  # last in, first out, whatever one of them raises
            closing.callback(self._membership.close)
            closing.callback(self._world.backend.close)
            closing.callback(self._world.exchanger.close)
            closing.callback(self._cancel_snapshot)

    @property
    def rank(self) -> int:
        """This rank, of the lane where there are lanes."""
        return self._world.rank

    @property
    def world_size(self) -> int:
        """Ranks of the world; instances, where there are tensor-parallel lanes."""
        return self._world.world_size

    @property
    def config(self) -> RuntimeConfig:
        """The config that this rank was opened with, with the lane's heads where there are lanes."""
        return self._world.config

    # Documents and requests ------------------------------------------------------------------------

    def add_document(
        self,
        name: str,
        *,
        tokens: int | None = None,
        token_ids: Sequence[int] | Tensor | None = None,
        salt: str | None = None,
        position: int = 0,
        load: Tensor | None = None,
        group: str = "",
    ) -> Document:
        """Declare a document and place its blocks; its entries come by `load_document` or `write`.

        Args:
            tokens: how many, if `token_ids` are not given.
            token_ids: the document's tokens, a sequence or a tensor. Its leading blocks are then shared
                with a document that begins alike, at the same position with the same salt; `shared`
                of the result counts them, and the document that stored them first writes them.
            salt: all else that entries depend on, such as what the prefill attends to.
            position: canonical position of its first token.
            load: expected load of each block, for the `balanced` placement.
            group: whose quota its blocks count for.
        Raises: ValueError if the name is taken or a capacity is exhausted; nothing changes then.
        """
        self._check_tables_may_change()
        world = self._world
        new = content(world.config, name, tokens, token_ids, salt, position, group)
        directory = added(
            world,
            world.directory,
            name,
            tokens=new.tokens,
            position=new.position,
            load=load,
            hashes=new.hashes,
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
        self._check_tables_may_change()
        self._world.adopt(without_document(self._world.directory, name))

    def pin(self, name: str) -> None:
        """Keep a document from being removed or evicted. Raises: ValueError if it is unknown."""
        self._check_tables_may_change()
        self._world.adopt(with_pin(self._world.directory, name, True))

    def unpin(self, name: str) -> None:
        """Undo `pin`. Raises: ValueError if the document is unknown."""
        self._check_tables_may_change()
        self._world.adopt(with_pin(self._world.directory, name, False))

    def pinned(self) -> frozenset[str]:
        """Names of the pinned documents."""
        return self._world.directory.pinned

    def set_quota(self, group: str, blocks: int | None) -> None:
        """Bound the blocks of a group's documents, shared ones counted for each; None lifts it.

        Raises: ValueError for a bound below 0; nothing changes then.
        """
        self._check_tables_may_change()
        self._world.adopt(with_quota(self._world.directory, check_name(group, "group"), blocks))

    def make_room(
        self,
        name: str,
        *,
        tokens: int | None = None,
        token_ids: Sequence[int] | Tensor | None = None,
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
        self._check_tables_may_change()
        config, in_use = self.config, self._requests.documents()
        wanted = content(config, name, tokens, token_ids, salt, position, group)
        if name in self._world.directory.documents:
            raise ValueError(f"document {name!r} exists already")
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}; known: {', '.join(POLICIES)}")
        with agreed_step(self._world):
            return make_room(self._world, wanted, policy=policy, in_use=in_use)

    def publish(
        self,
        name: str,
        request: Request | None,
        *,
        token_ids: Sequence[int] | Tensor | None = None,
        salt: str | None = None,
        group: str = "",
    ) -> Document:
        """Make the request's own tokens a document, at their positions; they stay with this rank.

        Every rank calls this, one of them with its request. The rows are copied bit for bit; the
        request goes on as it was.

        Args: token_ids, salt, group: as for `add_document`; the first two where the request is.
        Raises: ValueError if a token is not written yet, or as for `add_document`, on every rank.
        """
        self._check_tables_may_change()
        check_name(name, "document")
        check_name(group, "group")
        hashes: Sequence[bytes] = ()
        if request is not None:
            self._requests.check(request)
            hashes = published_content(self._world, name, request, token_ids, salt, group)
        with agreed_step(self._world):
            return publish(self._world, name, request, hashes, group)

    def load_document(
        self, name: str, layer: int, entries: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Store this rank's copies out of a whole document's entries, given on every rank.

        Args:
            entries: (tokens, G, D), or (tokens, D) with one branch, the config's dtype.
            index_keys: (tokens, D_index), if the layer has an indexer of its own.
        Blocks that the document shares are left to the document that stored them first.
        Raises: ValueError for an unknown document, or rows that are not those of the layer.
        """
        self._check_open()
        document = self._world.directory.document(name)
        entries = check_rows(self._world, layer, document.tokens, entries, index_keys)
        first = document.shared * document.block_tokens
        keys = None if index_keys is None else index_keys[first:]
        self._world.backend.write(layer, document.ids(first), entries[first:], keys, push=False)

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
        Raises: ValueError for documents that are unknown or cannot be attached together, or if there is
            no room for another request.
        """
        self._check_open()
        attached = check_attached(self._world, documents)
        if into is None:
            return self._requests.reader(attached)
        document = self._world.directory.document(into)
        others = [attachment.document for attachment in attached]
        if document in others:
            raise ValueError(f"document {into!r} is attached and written by the same request")
        check_disjoint([*others, document])
        return self._requests.writer(attached, document, start)

    def append(self, request: Request, tokens: int) -> Tensor:
        """Make room for the request's next tokens, at home; returns their entry ids (tokens,) int32.

        Raises: ValueError if the request, the document or the private pool has no room; nothing
        changes then.
        """
        self._check_open()
        self._requests.check(request)
        check_sources(self._world, request.sources)
        return self._requests.append(request, tokens)

    def release(self, request: Request) -> None:
        """Forget a request and free its private blocks. Raises: ValueError if it was released."""
        self._check_open()
        self._requests.check(request)
        self._requests.release(request)

    def copy_document(self, request: Request | None, name: str | None) -> Tensor | None:
        """Copy a whole document into the request's own tokens, moved to the request's position.

        For long reuse: entries and index keys of all layers come in one exchange, their rotary
        columns are rotated once, all layers together, and from then on they are the request's own,
        until it is released. Every rank calls this, those that want nothing with (None, None).

        Returns: the entry ids (tokens,) int32, as from `append`; None if nothing was wanted.
        Raises: ValueError if there is no room; CoverageError if a token of the document is unwritten,
            or was written at a layer that has had no step since.
        """
        self._check_tables_may_change()
        if request is None and name is None:
            with step(self._world):
                answer_copies(self._world)
            return None
        if request is None or name is None:
            raise ValueError("give a request and a document's name, or neither")
        self._requests.check(request)
        document, offset = check_copy(self._world, request, name)
        ids = self.append(request, document.tokens)
        with step(self._world):
            copy_document(self._world, document, ids, offset)
        return ids

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Store entries computed here; copies at other ranks get them with this layer's next step,
        which on GPUs an `attend` straight after the layer's `select` is not.

        Args:
            ids: (n,) int32 entry ids from `append`. entries, index_keys: as for `load_document`.
        Raises: ValueError for ids that no open request appended, or that were written already.
        """
        self._check_open()
        check_tensor(ids, "ids", (None,), torch.int32)
        entries = check_rows(self._world, layer, len(ids), entries, index_keys)
        check_writable(self._world, ids, self._requests.open)
        self._world.backend.write(layer, ids, entries, index_keys, push=True)

    def load_weights(self, layer: int, w_uk: Tensor, w_uv: Tensor) -> None:
        """Give this rank a layer's projections, which makes payload form B possible; on every rank.

        From then on `attend` takes un-absorbed queries and returns projected outputs.

        Args: w_uk (G, h, nope, latent), w_uv (G, h, value, out), h the heads of a branch.
        Raises: ValueError for other shapes, or a layout without a projection; RuntimeError in service.
        """
        self._check_open()
        check_weights(check_layer(self.config.model, layer), w_uk, w_uv)
        dtype = self._world.compute_dtype
        weights = (weight.detach().to(dtype).contiguous() for weight in (w_uk, w_uv))
        self._world.take_weights(layer, LayerWeights(*weights))

    def scope(
        self,
        *,
        documents: Sequence[str | tuple[str, int]] | None = None,
        requests: Sequence[tuple[Request, Tensor]] | None = None,
        queries: int = 0,
    ) -> Scope:
        """What queries may see: `queries` of them see `documents`, given as for `request`; or each
        request's own tokens `(request, ids)` see its documents and its tail up to themselves.

        Raises: ValueError for unknown documents, released requests, or ids that are not theirs.
        """
        block_tokens = self.config.block_tokens
        if (documents is None) == (requests is None):
            raise ValueError("give either documents or requests")
        if documents is not None:
            count = whole(queries, "queries", 0, MAX_TOKENS)
            at = torch.zeros(count, dtype=torch.int32)
            attached = check_attached(self._world, documents)
            return scope_of(attached, None, at, block_tokens=block_tokens)
        scopes = []
        for request, ids in requests or ():
            self._requests.check(request)
            check_sources(self._world, request.sources)
            check_own_ids(request, ids)
            scopes.append(scope_of(request.attached, request, ids, block_tokens=block_tokens))
        return stacked(scopes) if scopes else self.scope(documents=())

    # Steps -----------------------------------------------------------------------------------------

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
        Returns: units of each query, ascending, -1 where a query sees fewer than `top_k`.
        Raises: ValueError; CoverageError if an entry in sight was not scored; PeerError as `attend`.
        """
        self._check_connected()
        if (documents is None) == (scope is None):
            raise ValueError("give either documents or a scope")
        if scope is None:
            check_tensor(query, "index query", (None, None, None), None)
            scope = self.scope(documents=documents, queries=len(query))
        world = self._world
        count = check_select(world, layer, query, weights, scope, top_k, unit_tokens)
        self._touch(scope)
        weights = weights.to(world.compute_dtype)
        select = partial(world.backend.select, layer, query, weights, scope)
        return world.exchanger.attempt(lambda: select(top_k=count, unit_tokens=unit_tokens))

    def selection(self, ids: Tensor, scope: Scope, *, unit_tokens: int = 1) -> Selection:
        """A selection made elsewhere: unit ids (Q, K) or (Q, G, K) int32, -1 padding.

        It is checked when it is attended to.
        """
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
            ValueError for bad arguments; CoverageError if an answer is not what was asked; PeerError, or a
            BlocksLostError that names the blocks that no rank has a copy of. In lockstep the others do
            not learn of it and wait for this rank: it calls `idle_attend`, or attends something else.
        """
        self._check_connected()
        world, way = self._world, self.config.mode if mode is None else mode
        check_attend(world, layer, query, selection, sink=sink, mode=way)
        world.backend.check_attend(selection, way)
        self._touch(selection.scope)
        return world.exchanger.attempt(
            lambda: world.backend.attend(layer, query, selection, sink=sink, mode=way)
        )

    def idle_select(self, layer: int) -> None:
        """Take part in the others' `select` without a query of one's own."""
        index = check_layer(self.config.model, layer).index
        if index is None:
            raise ValueError(f"layer {layer} has no indexer")
        nobody = torch.empty(0, index.heads, index.head_dim, dtype=self.config.dtype)
        self.select(
            layer, nobody, torch.empty(0, index.heads, dtype=self.config.dtype), documents=()
        )

    def idle_attend(self, layer: int) -> None:
        """Take part in the others' `attend` without a query of one's own."""
        layout = check_layer(self.config.model, layer)
        dim = layout.key_dim if self._world.weights[layer] is None else layout.query_dim
        query = torch.empty(0, layout.heads, dim, dtype=self.config.dtype)
        nothing = torch.empty(0, 0, dtype=torch.int32)
        self.attend(layer, query, Selection(nothing, 1, self.scope(documents=())))

    # Service ---------------------------------------------------------------------------------------

    def serve(self, *, max_requests: int = 64, max_bytes: int = 1 << 28) -> Service:
        """Answer the others from a thread until the service is closed, whatever this engine does.

        A step of the whole world like `attend`; from then on every rank selects and attends when it
        wants to, or never, and asks only the holders of what it needs. Between services documents
        are added, removed, published, pinned and copied, and weights loaded; not meanwhile.

        Args:
            max_requests, max_bytes: requests of others taken in and not answered yet; beyond that
                (a single larger request aside) whoever asks is held back.
        Raises: ValueError; RuntimeError if this rank serves already, or entries are on GPUs; PeerError.
        """
        self._check_connected()
        world = self._world
        world.backend.require("serve")
        check_count(max_requests, "max_requests")
        check_count(max_bytes, "max_bytes")
        answers = world.backend.answers()
        return start_service(world, answers, max_requests=max_requests, max_bytes=max_bytes)

    def avoid(self, ranks: Collection[int]) -> None:
        """Ask replicas instead of these ranks from the next step on, where there are any. Ranks that
        are lost or silent in service need not be named here.

        Raises: ValueError for a rank outside the world or this one; nothing changes then.
        """
        others = set(range(self.world_size)) - {self.rank}
        wrong = [rank for rank in ranks if type(rank) is not int or rank not in others]
        if wrong:
            raise ValueError(
                f"rank {self.rank} cannot avoid {wrong} in a world of {self.world_size}"
            )
        self._world.tables.avoid(ranks)

    def lost_blocks(self) -> dict[str, tuple[range, ...]]:
        """By document, the runs of its blocks that no rank that can be asked has a copy of, counted
        from the document's first; what needs them raises BlocksLostError.
        """
        return lost_blocks(self._world.directory, self._world.askable())

    # The corpus on disk ----------------------------------------------------------------------------

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
        a service. Raises: as `snapshot`.
        """
        self._check_tables_may_change()
        if self._snapshot is not None:
            raise ValueError(f"a snapshot to {self._snapshot.folder} is under way: finish it first")
        with step(self._world):
            self._snapshot = begin_snapshot(self._world, Path(path))

    def finish_snapshot(self) -> SnapshotReport:
        """The second half: wait until every rank has written its part, and commit.

        Raises: as `snapshot`.
        """
        self._check_tables_may_change()
        if self._snapshot is None:
            raise ValueError("no snapshot is under way: begin one first")
        pending, self._snapshot = self._snapshot, None
        with step(self._world):
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
        self._check_tables_may_change()
        only = None if documents is None else frozenset(documents)
        with step(self._world):
            return restore(self._world, Path(path), only)

    def verify_copies(self, sample: int | None = None) -> list[BlockCheck]:
        """Compare the hashes of a block's copies, of `sample` random closed blocks or all; a step.

        Returns: a check for each, the same on every rank; those that are not `is_sound` have copies
        that differ, are missing, or are not what they were in a snapshot.
        """
        self._check_tables_may_change()
        if sample is not None:
            check_count(sample, "sample")
        with step(self._world):
            return check_blocks(self._world, sample)

    # Insight ---------------------------------------------------------------------------------------

    def explain(self) -> list[DecisionLine]:
        """Why the last `attend` asked whom for what: a line per (query, holder)."""
        return explain_last(self._world.backend.last_step())

    def predicted_s(self) -> float:
        """Seconds the cost model predicts for the last `attend`, as decided; 0 before the first."""
        return predicted_last(self._world.backend.last_step())

    def drop_leases(self) -> None:
        """Forget every fetched copy."""
        self._world.backend.drop_leases()

    def stats(self) -> dict[str, Any]:
        """Counters since `open`: bytes as counted in the transport's send, decisions, phases, memory.

        Ranks are those of the lane, where there are lanes: instances.
        """
        return {"lane": lane_number(self._world.transport), **self._world.counted()}

    # What holds before a call ----------------------------------------------------------------------

    def _touch(self, scope: Scope) -> None:
        """Count a use of the documents that a step's queries see."""
        serials = [source.serial for source in scope.sources if isinstance(source, Document)]
        self._world.usage.touch(serials, self._world.progress.epoch)

    def _cancel_snapshot(self) -> None:
        if self._snapshot is not None:
            self._snapshot.cancel(self.config.deadline_s)
            self._snapshot = None

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the runtime is closed")

    def _check_connected(self) -> None:
        self._check_open()
        if not self._membership.is_connected:
            raise RuntimeError("the runtime is disconnected: rejoin first")

    def _check_tables_may_change(self) -> None:
        self._check_connected()
        self._world.exchanger.check_tables_may_change()


def opened_world(config: RuntimeConfig, transport: Transport, sent_before: Sent) -> World:
    """The world of a rank, with the backend of the config's device: chosen here, and nowhere else.

    Raises: as `Runtime.open`.
    """
    config.check_world(transport.world_size)
    if config.device == "cpu":
        return World(
            config, transport, exchanger=Lockstep, backend=CpuBackend, sent_before=sent_before
        )
    from .gpu.backend import GpuBackend  # only here: they need Triton
    from .gpu.open import open_gpu

    opened = open_gpu(config, transport)
    try:
        return World(
            config,
            transport,
            exchanger=Lockstep,
            backend=partial(GpuBackend, opened=opened),
            storage=opened.pool.storage(),
            sent_before=sent_before,
        )
    except BaseException:
        if opened.shared is not None:
            opened.shared.close(abort=True)
        raise
