"""Runtime: the public face. Input is checked here, at the door (`door.py`), and nowhere deeper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ..partition.directory import Document, with_document
from ..partition.layout import Layout
from ..partition.placement import place
from .agreement import agree
from .config import RuntimeConfig
from .cost.predicate import MODES, Mode
from .door import check_scope, check_selection, check_tensor, check_writable
from .errors import CoverageError, PeerError
from .explain import DecisionLine, explain_last, predicted_last
from .holder import MAX_TOP_K
from .requests import Request, Scope, scope_of, stacked
from .step import Selection, attend_step, select_step
from .transport import Transport
from .world import LayerWeights, World, connect


class Runtime:
    """One rank of a world that attends over a corpus partitioned among its ranks.

    `add_document`, `select`, `attend` and `close` are steps of the whole world: every rank calls
    the same ones in the same order, with its own queries or with none. All else is local.
    """

    def __init__(self, world: World, *, owns_transport: bool) -> None:
        self._world = world
        self._owns_transport = owns_transport
        self._closed = False
        config = world.config
        self._free_requests = list(range(max(config.private_blocks, 1)))[::-1]
        self._free_blocks = list(range(config.private_blocks))[::-1]
        self._open_requests: list[Request] = []

    @classmethod
    def open(cls, config: RuntimeConfig, transport: Transport | None = None) -> Runtime:
        """Open this rank. Without a transport: the default process group, one made from torchrun's
        environment, or a world of one that needs no launcher. A transport that is given serves one
        runtime after another; whoever made it closes it.

        Raises: PeerError if another rank opened with another config.
        """
        world = World(config, transport or connect(config.deadline_s))
        runtime = cls(world, owns_transport=transport is None)
        try:
            with runtime._in_step():
                agree(world)
        except BaseException:
            runtime.close()
            raise
        return runtime

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and not isinstance(error, PeerError):
            self._world.transport.abort((self.rank,), f"raised {type(error).__name__}: {error}")
        self.close()

    def close(self) -> None:
        """Leave the world; idempotent. Peers that still wait for this rank get an error that names it,
        unless the transport was given and stays open.
        """
        if not self._closed:
            self._closed = True
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
        self, name: str, *, tokens: int, position: int = 0, load: Tensor | None = None
    ) -> Document:
        """Declare a document and place its blocks; its entries come by `load_document` or `write`.

        Args:
            position: canonical position of its first token.
            load: expected load of each block, for the `balanced` placement.
        Raises: ValueError if the name is taken or a capacity is exhausted; nothing changes then.
        """
        self._check_open()
        world, config = self._world, self._world.config
        if (
            not (isinstance(tokens, int) and isinstance(position, int))
            or tokens < 1
            or position < 0
        ):
            raise ValueError(
                f"document {name!r}: needs whole tokens > 0 and position >= 0, got {tokens}, {position}"
            )
        directory, num_blocks = world.directory, -(-tokens // config.block_tokens)
        if num_blocks > config.max_blocks - directory.num_blocks:
            raise ValueError(
                f"document {name!r} needs {num_blocks} blocks, "
                f"{config.max_blocks - directory.num_blocks} of {config.max_blocks} are free"
            )
        ranks = place(
            config.placement,
            num_blocks,
            first_block=directory.num_blocks,
            num_branches=config.num_branches,
            world_size=world.world_size,
            used=directory.used,
            load=load,
        )
        world.adopt(
            with_document(
                directory,
                name,
                tokens=tokens,
                position=position,
                ranks=ranks,
                capacity=world.corpus_slots,
            )
        )
        return world.directory.documents[name]

    def load_document(
        self, name: str, layer: int, entries: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Store this rank's copies out of a whole document's entries, given on every rank.

        Args:
            entries: (tokens, G, D), or (tokens, D) with one branch, the config's dtype.
            index_keys: (tokens, D_index), if the layer has an indexer of its own.
        """
        document = self._world.directory.document(name)
        ids = torch.arange(document.start, document.start + document.tokens, dtype=torch.int32)
        self._write(layer, ids, entries, index_keys, push=False)

    def request(
        self, documents: Sequence[str] = (), *, into: str | None = None, start: int = 0
    ) -> Request:
        """A reader of documents, whose own tokens stay at home, or prefill `into` a document.

        Args: start: with `into`, how many tokens of the document come from other requests.
        """
        self._check_open()
        world, config = self._world, self._world.config
        attached = self._documents(documents)
        if into is not None:
            document = world.directory.document(into)
            if document in attached:
                raise ValueError(f"document {into!r} is attached and written by the same request")
            if not 0 <= start < document.tokens:
                raise ValueError(f"start must be in [0, {document.tokens}), got {start}")
            end = document.start + document.tokens
            request = Request(
                documents=attached,
                tail_start=document.start,
                tail_limit=end,
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
            begin = first * config.block_tokens
            end = begin + config.request_blocks * config.block_tokens
            request = Request(documents=attached, tail_start=begin, tail_limit=end)
        self._open_requests.append(request)
        return request

    def append(self, request: Request, tokens: int) -> Tensor:
        """Make room for the request's next tokens, at home; returns their entry ids (tokens,) int32.

        Raises: ValueError if the request, the document or the private pool has no room; nothing
        changes then.
        """
        self._check_request(request)
        world, block_tokens = self._world, self._world.config.block_tokens
        first = request.tail_start + request.length
        if tokens < 1 or first + tokens > request.tail_limit:
            raise ValueError(
                f"cannot append {tokens} tokens: room for {request.tail_limit - first} is left"
            )
        if request.into is None:
            needed = -(-(request.length + tokens) // block_tokens) - len(request.blocks)
            if needed > len(self._free_blocks):
                raise ValueError(
                    f"cannot append {tokens} tokens: {needed} private blocks needed, "
                    f"{len(self._free_blocks)} of {world.config.private_blocks} are free"
                )
            for _ in range(needed):
                block = request.tail_start // block_tokens + len(request.blocks)
                request.blocks.append(self._free_blocks.pop())
                world.assign_private(block, request.blocks[-1])
        request.length += tokens
        return torch.arange(first, first + tokens, dtype=torch.int32)

    def release(self, request: Request) -> None:
        """Forget a request and free its private blocks."""
        self._check_request(request)
        request.is_open = False
        self._open_requests.remove(request)
        if request.into is None:
            first = request.tail_start // self._world.config.block_tokens
            for block in range(first, first + len(request.blocks)):
                self._world.release_private(block)
            self._free_blocks.extend(request.blocks)
            number = (first - self._world.config.max_blocks) // self._world.config.request_blocks
            self._free_requests.append(number)

    def write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Store entries computed here; copies at other ranks get them with this layer's next step.

        Args:
            ids: (n,) int32 entry ids from `append`. entries, index_keys: as for `load_document`.
        """
        self._write(layer, ids, entries, index_keys, push=True)

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
        documents: Sequence[str] | None = None,
        requests: Sequence[tuple[Request, Tensor]] | None = None,
        queries: int = 0,
    ) -> Scope:
        """What queries may see: `queries` of them see `documents`; or each request's own tokens
        `(request, ids)` see its documents and its tail up to themselves.
        """
        block_tokens = self._world.config.block_tokens
        if (documents is None) == (requests is None):
            raise ValueError("give either documents or requests")
        if documents is not None:
            at = torch.zeros(queries, dtype=torch.int32)
            return scope_of(self._documents(documents), None, at, block_tokens=block_tokens)
        assert requests is not None
        scopes = []
        for request, ids in requests:
            self._check_request(request)
            check_tensor(ids, "ids", (None,), torch.int32)
            end = request.tail_start + request.length
            if bool(((ids < request.tail_start) | (ids >= end)).any()):
                raise ValueError(f"ids must lie in the request's [{request.tail_start}, {end})")
            scopes.append(
                scope_of(request.documents, request.tail_start, ids, block_tokens=block_tokens)
            )
        return stacked(scopes) if scopes else self.scope(documents=())

    # Steps ---------------------------------------------------------------------------------------

    def select(
        self,
        layer: int,
        query: Tensor,
        weights: Tensor,
        *,
        documents: Sequence[str] | None = None,
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
        self._check_open()
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
        check_scope(scope, len(query))
        count = index.top_k if top_k is None else top_k
        if not isinstance(count, int) or not 1 <= count <= MAX_TOP_K:
            raise ValueError(f"top_k must be in [1, {MAX_TOP_K}], got {count}")
        if self.config.checked and not bool(query.isfinite().all() & weights.isfinite().all()):
            raise ValueError("index queries and weights must be finite")
        with self._in_step():
            return select_step(
                self._world,
                layer,
                query,
                weights.to(self._world.compute_dtype),
                scope,
                top_k=count,
                unit_tokens=unit_tokens,
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
            ValueError at the door; CoverageError if an answer is not what was asked; PeerError.
        """
        self._check_open()
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
        with self._in_step():
            return attend_step(
                self._world, layer, query, selection, sink=sink, mode=mode or self.config.mode
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

    def stats(self) -> dict[str, Any]:
        """Counters since `open`: bytes as counted in the transport's send, decisions, phases, memory."""
        return self._world.snapshot()

    # The door ------------------------------------------------------------------------------------

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """Whatever ends a step early is told to every other rank, so that none waits in vain."""
        try:
            yield
        except PeerError:
            raise
        except CoverageError as error:
            self._world.transport.abort(error.holders, f"rank {self.rank} was not served: {error}")
            raise
        except BaseException as error:
            self._world.transport.abort((self.rank,), f"raised {type(error).__name__}: {error}")
            raise

    def _write(
        self, layer: int, ids: Tensor, entries: Tensor, index_keys: Tensor | None, *, push: bool
    ) -> None:
        self._check_open()
        layout, world = self._layer(layer), self._world
        check_tensor(ids, "ids", (None,), torch.int32)
        if isinstance(entries, Tensor) and entries.dim() == 2 and layout.num_branches == 1:
            entries = entries[:, None]
        shape = (len(ids), layout.num_branches, layout.entry_dim)
        check_tensor(entries, "entries", shape, self.config.dtype)
        if (index_keys is None) != (world.index.codecs[layer] is None):
            raise ValueError(
                f"layer {layer} of {layout.name!r}: index keys and indexer must go together"
            )
        if index_keys is not None:
            assert layout.index is not None
            check_tensor(index_keys, "index keys", (len(ids), layout.index.head_dim), None)
        check_writable(world, ids)
        world.store(layer, ids, entries, index_keys, push=push)

    def _documents(self, names: Sequence[str]) -> tuple[Document, ...]:
        if isinstance(names, str):
            raise ValueError(f"documents must be a list of names, got the string {names!r}")
        if len(set(names)) != len(names):
            raise ValueError(f"a document is attached twice: {list(names)}")
        return tuple(self._world.directory.document(name) for name in names)

    def _layer(self, layer: int) -> Layout:
        layers = self.config.model.layers
        if not isinstance(layer, int) or not 0 <= layer < len(layers):
            raise ValueError(f"layer must be in [0, {len(layers)}), got {layer}")
        return layers[layer]

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the runtime is closed")

    def _check_request(self, request: Request) -> None:
        self._check_open()
        if not request.is_open or request not in self._open_requests:
            raise ValueError("the request was released, or belongs to another runtime")
