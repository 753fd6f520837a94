import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SUPPORT = Path(__file__).parent / "support"
pytest.register_assert_rewrite(*(path.stem for path in SUPPORT.glob("*.py")))  # before any import

from ranks import RankPool  # noqa: E402

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


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Four gloo processes, started when first used and shared by the whole run."""
    with RankPool(4, tmp_path_factory.mktemp("ranks")) as pool:
        yield pool
