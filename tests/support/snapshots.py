"""Worlds that save and restore a case's corpus, played against dense attention as in `cases`."""

from __future__ import annotations

from pathlib import Path

from cases import Case, generator_of, make_config
from player import Player

from qroam.runtime import Runtime
from qroam.runtime.corpus.restore import RestoreReport
from qroam.runtime.corpus.snapshot import SnapshotReport
from qroam.runtime.corpus.verify import BlockCheck
from qroam.runtime.transport.base import Transport


class RestoredPlayer(Player):
    """Knows what a case's documents hold, and finds them in a snapshot instead of writing them."""

    def restore(self, folder: Path) -> RestoreReport:
        self.load_weights()
        report = self.runtime.restore(folder)
        self.learn()
        return report

    def load_weights(self) -> None:
        if self.case.weights and self.layout.projection:
            for layer in range(self.case.layers):
                self._load_weights(layer)

    def learn(self) -> None:
        """What the documents say that this rank did not add."""
        for number in range(len(self.case.documents)):
            document = self.runtime._world.directory.document(f"d{number}")
            ids = document.ids().long()
            noise = generator_of(self.case.seed, number, False)
            for layer in range(self.case.layers):
                self._invent(layer, ids, noise)
            self.documents.append(document)
        self.complete = list(self.documents)


def hashes_of(checks: list[BlockCheck]) -> dict[tuple[str, str, int, int], str]:
    """The hash of each block, all copies of which must have the same."""
    assert all(check.is_sound for check in checks), [c for c in checks if not c.is_sound]
    return {(c.kind, c.document, c.block, c.branch): c.hashes[0][1] for c in checks}


def save(
    transport: Transport, case: Case, folder: Path
) -> tuple[SnapshotReport, dict[tuple[str, str, int, int], str]]:
    """Write the case's documents, serve a step, save them beside another one, serve a third."""
    with Runtime.open(make_config(case), transport) as runtime:
        player = Player(runtime, case)
        player.add_documents()
        player.prefill()
        player.decode()
        runtime.begin_snapshot(folder)
        player.decode()
        report = runtime.finish_snapshot()
        player.decode()
        return report, hashes_of(runtime.verify_copies())


def restore(
    transport: Transport, case: Case, folder: Path
) -> tuple[RestoreReport, dict[tuple[str, str, int, int], str]]:
    """Restore, and serve the case's steps."""
    with Runtime.open(make_config(case), transport) as runtime:
        player = RestoredPlayer(runtime, case)
        report = player.restore(folder)
        hashes = hashes_of(runtime.verify_copies())
        for _ in range(case.steps):
            player.decode()
        return report, hashes
