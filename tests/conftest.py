"""What all tests share: how torch is set up, how much is run, and a world of four processes.

- `pytest` (and `make test`, which spreads it over two workers) runs the quick tests.
- `pytest --full` (and `make test-all`) adds those marked `slow`, and draws more examples: see
  `support/effort.py`. Tests named on the command line (`file.py::test` or `-k NAME`) run in any case.
- Tests that start processes with deadlines, and so suffer beside one another, are marked
  `processes`; with several workers they all run on the same one. So do those of `four_ranks`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).parent / "support"
pytest.register_assert_rewrite(*(path.stem for path in SUPPORT.glob("*.py")))  # before any import

import effort  # noqa: E402
from hypothesis import settings  # noqa: E402
from ranks import RankPool  # noqa: E402

# No test here is about how long an example takes, and other work slows the machine down.
settings.register_profile("qroam", deadline=None)
settings.load_profile("qroam")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before any is imported

# Tests that run themselves as a script find what they share.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH", "")])
)

torch.set_num_threads(1)
# In this mode torch.empty and its kin come filled with NaN (integers: the largest value), so what
# was never written shows up. `warn_only`: operations without a deterministic form still run.
torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="slow tests too, and all examples")


def pytest_configure(config: pytest.Config) -> None:
    effort.full = config.getoption("--full")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("processes") or "four_ranks" in getattr(
            item, "fixturenames", ()
        ):
            item.add_marker(pytest.mark.xdist_group("processes"))
    named = config.option.keyword or any("::" in argument for argument in config.args)
    if effort.full or named:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four gloo processes, started when first used and shared by the whole run."""
    with RankPool(4, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool
