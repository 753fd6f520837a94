"""The state of the calling process stays outside: each call under it equals the plain call, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from effort import slow_after
from ranks import run_loopback
from torch import Tensor

from qroam.partition import named_layout, uniform_model
from qroam.runtime import Runtime, RuntimeConfig, Transport
from qroam.runtime.ambient import own_context

LAYOUT = named_layout("mla-tiny")
E, K = (torch.randn(64, n, generator=torch.Generator().manual_seed(n)) for n in (80, 32))
QUERY = torch.randn(2, 4, 80, generator=torch.Generator().manual_seed(1))
INDEX_QUERY = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(2))
WEIGHTS = torch.rand(2, 4, generator=torch.Generator().manual_seed(3))
LOAD = torch.ones(8)
SINK = torch.randn(4, generator=torch.Generator().manual_seed(4))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def strictly_deterministic() -> Iterator[None]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


State = Callable[[], AbstractContextManager[object]]
STATES: dict[str, State] = {  # of a thread
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "grad": torch.enable_grad,
}
PROCESS_STATES: dict[str, State] = {  # of all threads
    "default fp64": lambda: default_dtype(torch.float64),
    "default bf16": lambda: default_dtype(torch.bfloat16),
    "deterministic": strictly_deterministic,
}


def calls(end: Transport, folder: Path, inside: State) -> list[Tensor]:
    """The numbers that come out of every call of a runtime, each made inside of a state of its own."""
    found: list[Tensor] = []
    config = RuntimeConfig(
        model=uniform_model(LAYOUT, 1), max_blocks=64, block_tokens=8, deadline_s=60.0
    )
    query = QUERY.clone().requires_grad_()
    with inside():
        runtime = Runtime.open(config, end)
    with inside():
        runtime.set_quota("g", 60)
        runtime.add_document("d", tokens=64, token_ids=range(64), load=LOAD)
        runtime.load_document("d", 0, E, K)
        runtime.pin("d")
    with inside():
        chosen = runtime.select(0, INDEX_QUERY, WEIGHTS, documents=["d"], top_k=20)
        for mode in ("auto", "always-route", "always-fetch", "random"):
            found.append(runtime.attend(0, query, chosen, sink=SINK, mode=mode))
        elsewhere = runtime.select(0, INDEX_QUERY, WEIGHTS, documents=[("d", 9)], top_k=20)
        found += [chosen.ids, elsewhere.ids, runtime.attend(0, QUERY, elsewhere)]
    with inside():
        request = runtime.request(["d"])
        ids = runtime.append(request, 3)
        runtime.write(0, ids, E[:3], K[:3])
        runtime.publish("p", request if runtime.rank == 0 else None)
        copied = runtime.copy_document(request, "p")
        assert copied is not None
        scope = runtime.scope(requests=[(request, copied[-2:])])
        own = runtime.select(0, INDEX_QUERY, WEIGHTS, scope=scope, top_k=9)
        found += [own.ids, runtime.attend(0, QUERY, own)]
        runtime.release(request)
    with inside():
        runtime.snapshot(folder / "s")
        assert all(check.is_sound for check in runtime.verify_copies())
        runtime.make_room("n", tokens=8)
    with inside(), runtime.serve() as service:
        found.append(runtime.attend(0, QUERY, chosen))
        service.wait(30.0)
    with inside():
        runtime.idle_select(0)
        runtime.idle_attend(0)
        lines = [(line.way, line.margin) for line in runtime.explain()]
        found.append(
            torch.tensor([len(lines), runtime.predicted_s()], dtype=torch.float64, device="cpu")
        )
        runtime.unpin("d")
        runtime.remove_document("d")
        runtime.restore(folder / "s", documents=["d"])
        again = runtime.select(0, INDEX_QUERY, WEIGHTS, documents=["d"], top_k=20)
        found += [again.ids, runtime.attend(0, QUERY, again)]
        runtime.close()
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("state", slow_after(3, [*STATES, *PROCESS_STATES]))
def test_every_call_equals_the_plain_one(state: str, world: int, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("plain", "state")]
    for folder in folders:
        folder.mkdir()
    plain = run_loopback(world, lambda end: calls(end, folders[0], nullcontext))
    with PROCESS_STATES.get(state, nullcontext)():
        inside = STATES.get(state, nullcontext)
        found = run_loopback(world, lambda end: calls(end, folders[1], inside))
    for ours, theirs in zip(plain, found, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (b.dtype, b.device, b.requires_grad) == (a.dtype, a.device, False)
            assert torch.equal(a, b), state


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_compiled_callers_get_the_same(world: int) -> None:
    def work(end: Transport) -> list[Tensor]:
        config = RuntimeConfig(model=uniform_model(LAYOUT, 1), max_blocks=32, block_tokens=8)
        with Runtime.open(config, end) as runtime:
            runtime.add_document("d", tokens=64)
            runtime.load_document("d", 0, E, K)
            select = torch.compile(runtime.select, backend="eager")
            chosen = select(0, INDEX_QUERY, WEIGHTS, documents=["d"], top_k=20)
            plain = runtime.attend(0, QUERY, chosen)
            compiled = torch.compile(runtime.attend, backend="eager")(0, QUERY, chosen)

            def layer(query: Tensor) -> Tensor:
                return runtime.attend(0, query + 0, chosen) * 2

            inlined = torch.compile(layer, backend="eager")(QUERY)
            return [plain, compiled, inlined / 2]

    for plain, compiled, inlined in run_loopback(world, work):
        assert torch.equal(plain, compiled)
        assert torch.equal(plain, inlined)


def test_the_state_is_back_afterwards() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        with own_context():
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
            assert not torch.is_autocast_enabled("cpu")
            assert torch.get_default_device() == torch.device("cpu")
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_device() == torch.device("meta")
    with pytest.raises(KeyError), own_context():
        raise KeyError
    assert torch.is_grad_enabled()
