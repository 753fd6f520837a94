"""Result lines say what ran where, at which commit, and how to run it again from any checkout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

RESULTS = sorted((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.jsonl"))
SAID = {"bench", "case", "metric", "value", "unit", "baseline", "baseline_value", "ratio"} | {
    "device", "versions", "date", "commit", "command",
}  # fmt: skip


def test_there_are_results() -> None:
    assert len(RESULTS) > 10


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_lines_are_whole_and_name_no_place(path: Path) -> None:
    for number, text in enumerate(path.read_text().splitlines(), start=1):
        line = json.loads(text)
        where = f"{path.name}:{number}"
        assert line.keys() >= SAID, where
        assert re.fullmatch(r"[0-9a-f]{7,40}", line["commit"]), where
        assert re.match(r"python benchmarks/\w+\.py( |$)", line["command"]), where
        assert not re.search(r"(^|[\s'=])/", line["command"]), where
