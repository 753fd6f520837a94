"""The words by which a kernel names whoever is to blame."""

from __future__ import annotations

from qroam.kernels.exchange.signals import SILENT, blame


def test_blame_reads_what_the_kernels_write() -> None:
    assert blame((SILENT << 16) + 3) == (2, SILENT)
