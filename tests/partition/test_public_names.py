"""README and examples take layouts, placements and scores from the packages, not from their modules."""

from __future__ import annotations

import re
from pathlib import Path

import qroam.indexer
import qroam.partition

ROOT = Path(__file__).parents[2]
MODULE = re.compile(r"(?:from|import) qroam\.(?:partition|indexer)\.\w+")


def test_public_names_are_there() -> None:
    for package in (qroam.partition, qroam.indexer):
        assert package.__all__ == sorted(package.__all__, key=_as_ruff_sorts)
        for name in package.__all__:
            assert hasattr(package, name), f"{package.__name__} has no {name}"


def test_users_import_from_the_packages() -> None:
    read = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.py"))]
    assert len(read) > 3
    wrong = {str(p.name): found for p in read if (found := MODULE.findall(p.read_text()))}
    assert not wrong, "import from qroam.partition and qroam.indexer"


def _as_ruff_sorts(name: str) -> tuple[int, str]:
    """Constants, classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)
