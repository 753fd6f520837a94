"""What hypothesis draws: any small case of a world, and the settings of all that draw one."""

from __future__ import annotations

from typing import get_args

from cases import STORAGE, Architecture, Case, Picks
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qroam.partition.placement import PLACEMENT_POLICIES
from qroam.runtime.cost.predicate import MODES

EVERYWHERE = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def cases(draw: st.DrawFn, worlds: tuple[int, ...]) -> Case:
    """Any case of these world sizes, small enough for dense attention."""
    world = draw(st.sampled_from(worlds))
    architecture = draw(st.sampled_from(get_args(Architecture)))
    # An fp8 entry has a latent of whole tiles; the made-up layouts have none.
    storage = [name for name in STORAGE if architecture != "mixed" or not name.startswith("fp8")]
    block_tokens = draw(st.sampled_from((4, 8, 16)))
    picks = draw(st.sampled_from(get_args(Picks)))
    units = {1, 2, 4, block_tokens} | (set() if picks == "select" else {2 * block_tokens})
    tokens = st.one_of(st.sampled_from((1, block_tokens, 2 * block_tokens)), st.integers(2, 45))
    documents = tuple(draw(st.lists(tokens, min_size=1, max_size=4)))
    return Case(
        seed=draw(st.integers(0, 2**31 - 1)),
        world=world,
        architecture=architecture,
        heads=draw(st.integers(1, 2)),
        storage=draw(st.sampled_from(storage)),
        weights=draw(st.booleans()),
        layers=draw(st.integers(1, 2)),
        block_tokens=block_tokens,
        documents=documents,
        prefilled=draw(st.integers(0, len(documents))),
        chunk=draw(st.integers(11, 30)),
        policy=draw(st.sampled_from(PLACEMENT_POLICIES)),
        run=draw(st.integers(1, 3)),
        copies=draw(st.integers(1, min(world, 3))),
        index_placement=draw(st.sampled_from(("with-blocks", "replicated"))),
        mode=draw(st.sampled_from(MODES)),
        lease_entries=draw(st.sampled_from((0, 3, 40, 400))),
        reuse=draw(st.sampled_from((1.0, 16.0))),
        picks=picks,
        unit_tokens=draw(st.sampled_from(sorted(units))),
        per_branch=draw(st.booleans()),
        sink=draw(st.booleans()),
        steps=draw(st.integers(1, 2)),
        repeats=draw(st.integers(1, 2)),
        queries=tuple(draw(st.lists(st.integers(0, 8), min_size=world, max_size=world))),
        requests=draw(st.integers(0, 2)),
        stranger=draw(st.none() | st.integers(0, len(documents) - 1)),
        offsets=draw(st.booleans()),
    )
