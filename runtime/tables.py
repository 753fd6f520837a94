"""Tables: who owns what, as all ranks have agreed; and whom a rank may ask for a copy.

Letters: K keys (block * G + branch), R copies of a key, W ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..partition.directory import Directory, empty_directory
from ..partition.pool import Kind
from .config import RuntimeConfig


class PastWorld(NamedTuple):
    """Which rank of how many this one was in an incarnation of the world, and its directory then."""

    rank: int
    world_size: int
    directory: Directory


class Tables:
    """The directory of this rank, which every rank has alike, and what became of the former ones.

    `settled` is the directory of the last step that all ranks took. `former` is the incarnation before
    the last one, until the directory changes: not all ranks may know yet that it ended. `avoided`
    ranks are asked only where nobody else has a copy.
    """

    def __init__(self, config: RuntimeConfig, rank: int, world_size: int) -> None:
        self._config = config
        self.rank, self.world_size = rank, world_size
        self.directory: Directory = empty_directory(
            max_blocks=config.max_blocks,
            block_tokens=config.block_tokens,
            num_branches=config.num_branches,
            copies=config.placement.copies,
            world_size=world_size,
        )
        self.settled = self.directory
        self.former: PastWorld | None = None
        self.avoided: frozenset[int] = frozenset()
        self._is_whole = True  # every block in use has all of its copies
        self._weights_mark = 0

    @property
    def version(self) -> int:
        """Of directory and weights together; headers carry it."""
        return self.directory.version ^ self._weights_mark

    def adopt(self, directory: Directory) -> None:
        """Take over another directory."""
        self.directory = directory
        held = (directory.owners >= 0).view(self._config.max_blocks, -1)
        self._is_whole = bool(held[directory.references > 0].all())
        self.former = None

    def settle(self) -> None:
        """All ranks took a step with the directory of now."""
        self.settled = self.directory

    def remember(self, former: PastWorld) -> None:
        """`former` was the world until now; it stands until the directory changes."""
        self.former = former

    def avoid(self, ranks: Iterable[int]) -> None:
        """Ask these ranks only where nobody else has a copy, instead of those named before."""
        self.avoided = frozenset(ranks)

    def reconnect(self, rank: int, world_size: int) -> None:
        """Be another rank perhaps, in a world of another size."""
        self.rank, self.world_size = rank, world_size
        self.avoided = frozenset()

    def mark_weights(self, layer: int, weights: Iterable[Tensor]) -> None:
        """Let a layer's weights count for the version, so that ranks whose weights differ are named."""
        for weight in weights:
            raw = weight.cpu().view(torch.uint8).numpy().tobytes()
            layer_mark = zlib.crc32(bytes([layer % 256]), self._weights_mark)
            self._weights_mark = zlib.crc32(raw, layer_mark)

    def generations(self, stored_ids: Tensor) -> Tensor:
        """The generations of the blocks of stored ids; of ids beyond the corpus anything."""
        generations = self.directory.generations
        keys = stored_ids.long() // self._config.block_tokens
        return generations[keys.clamp(0, len(generations) - 1)]

    def askable(self, gone: Iterable[int]) -> Tensor | None:
        """Whom a plan may ask if the ranks `gone` cannot be, as `chosen_copy` takes it."""
        gone = list(gone)
        if not gone and not self.avoided and self._is_whole:
            return None
        askable = torch.full((self.world_size,), 2, dtype=torch.uint8)
        askable[list(self.avoided)] = 1
        askable[gone] = 0
        return askable

    def scorers(self, blocks: Tensor, askable: Tensor | None) -> Tensor:
        """The rank that scores each block when index keys live with their blocks, for a requester that
        can ask `askable` (`chosen_copy`); -1 for private blocks, and where nobody can be asked.
        """
        return chosen_copy(self.owners(blocks * self._config.num_branches), 0, askable)

    def holders(self, kind: Kind, keys: Tensor) -> Tensor:
        """Ranks (n, *) that have a copy of keys (n,) of a kind; -1 for none."""
        if kind == "entries":
            return self.owners(keys)
        if self._config.index_placement == "replicated":
            everyone = torch.arange(self.world_size, dtype=torch.int32).expand(len(keys), -1)
            return torch.where((keys < self._config.max_blocks)[:, None], everyone, -1)
        return self.owners(keys * self._config.num_branches)

    def owners(self, keys: Tensor) -> Tensor:
        """Ranks (*, R) of the copies of keys (*); -1 for private ones, which are only here."""
        owners = self.directory.owners
        corpus = (keys >= 0) & (keys < len(owners))
        return torch.where(corpus[..., None], owners[torch.where(corpus, keys, 0).long()], -1)


def chosen_copy(copies: Tensor, preferred: int, askable: Tensor | None) -> Tensor:
    """Of the copies (*, R) of each unit the rank to ask (*) int64, -1 if nobody can be.

    Args: askable: (W,) uint8: 2 for ranks that may be asked, 1 where only in want of such a one, 0
    for those that cannot be. The first from copy `preferred` on is asked. None: all may be, and every
    unit has all of its copies.
    """
    if askable is None:
        return copies[..., preferred].long()
    copies = copies.long().roll(-preferred, -1)
    usable = torch.where(copies >= 0, askable[copies.clamp(min=0)], 0)
    best, at = usable.max(-1, keepdim=True)  # of equals the first
    return torch.where(best > 0, copies.gather(-1, at), -1)[..., 0]


def replaceable(
    copies: Tensor, holder: Tensor, askable: Tensor | None, *, world_size: int
) -> Tensor:
    """(W,) bool: the ranks instead of which others can be asked for all that is asked of them.

    Args: copies: (*, R) of each unit; holder: (*), who is asked, anything outside [0, W) is nobody.
    """
    usable = copies >= 0
    if askable is not None:
        usable &= askable[copies.long().clamp(min=0)] > 0
    alone = (usable.sum(-1) < 2) & (holder >= 0) & (holder < world_size)
    at = torch.where(alone, holder, world_size).reshape(-1)
    return torch.ones(world_size + 1, dtype=torch.bool).index_fill(0, at, False)[:world_size]
