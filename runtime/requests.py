"""The open requests of a rank, and the seats of its private blocks.

A request with private tokens has a range of block ids beyond the corpus for itself, and takes a seat in
this rank's pool for each block that its tokens fill.
"""

from __future__ import annotations

from torch import Tensor

from ..partition.bounds import MAX_TOKENS, whole
from ..partition.directory import Document
from .config import RuntimeConfig
from .scope import Attached, Request
from .stores import Stores


class Requests:
    """Opens, extends and releases requests."""

    def __init__(self, config: RuntimeConfig, stores: Stores) -> None:
        self._config, self._stores = config, stores
        self._free_numbers = list(range(max(config.private_blocks, 1)))[::-1]
        self._free_seats = list(range(config.private_blocks))[::-1]
        self.open: list[Request] = []

    def reader(self, attached: tuple[Attached, ...]) -> Request:
        """A request with private tokens. Raises: ValueError if there is no room for another one."""
        config = self._config
        if not self._free_numbers or not config.private_blocks:
            raise ValueError(f"all {config.private_blocks} private blocks or requests are in use")
        first = config.max_blocks + self._free_numbers.pop() * config.request_blocks
        request = Request(
            attached=attached,
            tail=tuple(range(first, first + config.request_blocks)),
            capacity=config.request_blocks * config.block_tokens,
            block_tokens=config.block_tokens,
        )
        self.open.append(request)
        return request

    def writer(
        self, attached: tuple[Attached, ...], document: Document, start: int | None
    ) -> Request:
        """A request whose tokens are those of `document` from `start` on, by default from the first
        that it does not share.

        Raises: ValueError if `start` is not one of them.
        """
        shared = document.shared * self._config.block_tokens
        name = f"start in document {document.name!r}"
        start = shared if start is None else whole(start, name, shared, document.tokens - 1)
        if start >= document.tokens:
            raise ValueError(
                f"document {document.name!r} shares all of its blocks: none is written"
            )
        request = Request(
            attached=attached,
            tail=document.blocks,
            capacity=document.tokens,
            block_tokens=self._config.block_tokens,
            into=document,
            length=start,
        )
        self.open.append(request)
        return request

    def append(self, request: Request, tokens: int) -> Tensor:
        """Entry ids (tokens,) int32 of the request's next tokens; private blocks get their seats.

        Raises: ValueError if the request or the private pool has no room; nothing changes then.
        """
        first, block_tokens = request.length, self._config.block_tokens
        tokens = whole(tokens, "the number of tokens to append", 1, MAX_TOKENS)
        if first + tokens > request.capacity:
            raise ValueError(
                f"cannot append {tokens} tokens: room for {request.capacity - first} is left"
            )
        if request.into is None:
            needed = -(-(first + tokens) // block_tokens) - len(request.blocks)
            if needed > len(self._free_seats):
                raise ValueError(
                    f"cannot append {tokens} tokens: {needed} private blocks needed, "
                    f"{len(self._free_seats)} of {self._config.private_blocks} are free"
                )
            for _ in range(needed):
                block = request.tail[len(request.blocks)]
                request.blocks.append(self._free_seats.pop())
                self._stores.assign_private(block, request.blocks[-1])
        request.length += tokens
        return request.ids(first, first + tokens)

    def release(self, request: Request) -> None:
        """Forget a request and free its private blocks."""
        request.is_open = False
        self.open.remove(request)
        if request.into is None:
            for block in request.tail[: len(request.blocks)]:
                self._stores.release_private(block)
            self._free_seats.extend(request.blocks)
            config = self._config
            number = (request.tail[0] - config.max_blocks) // config.request_blocks
            self._free_numbers.append(number)

    def check(self, request: Request) -> None:
        """Raises: ValueError unless the request is one of these."""
        if not isinstance(request, Request):
            raise ValueError(f"a request is expected, got {type(request).__name__}")
        if not request.is_open or request not in self.open:
            raise ValueError("the request was released, or belongs to another runtime")

    def documents(self) -> frozenset[str]:
        """Names of the documents that open requests read or write."""
        return frozenset(
            source.name
            for request in self.open
            for source in request.sources
            if isinstance(source, Document)
        )
