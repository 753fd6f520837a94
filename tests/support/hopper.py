"""A Hopper GPU that is not there: tensors claim to be on it, and what is launched is compiled only."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qroam.kernels import plan as plan_module
from qroam.kernels.pool_layout import PoolLayout

GPU = torch.device("cuda:0")


BF16, F32, I32, U8 = torch.bfloat16, torch.float32, torch.int32, torch.uint8


def on_gpu(*shape: int, dtype: torch.dtype = I32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=GPU)


def fetched(*, entry_bytes: int, world: int) -> tuple[PoolLayout, plan_module.Plan, Tensor]:
    """A pool of 61 layers, the plan of 64 items of 2048 units, and its `came`."""
    rows, listed = 64, 2048
    pool = PoolLayout(
        layers=61, keys=65536, slots=4096, block_tokens=64, entry_bytes=entry_bytes,
        staged=rows * listed,
    )  # fmt: skip
    plan = plan_module.Plan.make(
        num_items=rows, num_listed=listed, world_size=world, num_forms=1, device=GPU
    )
    return pool, plan, on_gpu(rows * listed, 2)


def fetch(*, entry_bytes: int, counted: bool = False) -> None:
    from qroam.kernels.fetch import fetch

    pool, plan, came = fetched(entry_bytes=entry_bytes, world=8)
    memory = on_gpu(pool.num_bytes, dtype=U8)
    peers = on_gpu(8, dtype=torch.int64)
    uses = on_gpu(pool.keys) if counted else None
    fetch(pool, 60, peers, plan.fetch_units, plan.counts, memory=memory, came=came, uses=uses)


class StandIn(TorchFunctionMode):
    """Tensors without memory that claim to be on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func == Tensor.device.__get__:
            return GPU
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def pretend_hopper(seen: Callable[[Any], None]) -> None:
    """Compile for sm_90 what is launched from now on instead of running it, and show it to `seen`."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction, MockTensor

    device = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    driver.set_active(cast(Any, device))
    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=60 << 20)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_properties = lambda device=None: cast(Any, properties)
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        def mock(value: Any) -> Any:
            return MockTensor(value.dtype) if isinstance(value, Tensor) else value

        mocked = {name: mock(value) for name, value in options.items()}
        compiled = run(kernel, *map(mock, args), grid=grid, warmup=True, **mocked)
        seen(compiled)
        return compiled

    JITFunction.run = compile_only
