"""CUDA C++ beside its launcher: compiled by NVRTC at first use, launched on torch's stream.

What a kernel reads is one C structure, passed by value. A first launch compiles and loads, so it
belongs outside of a graph's capture, as with Triton.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

_DYNAMIC = 48 << 10  # shared memory that a block has without asking
# Contraction would make decisions differ from the definition's in the last bit.
_OPTIONS = ("--std=c++17", "--fmad=false", "--device-as-default-execution-space")


def launch(
    source: Path,
    kernel: str,
    arguments: ctypes.Structure,
    *,
    grid: int,
    block: int,
    shared_bytes: int,
    device: torch.device,
    cluster: int = 1,
    cooperative: bool = False,
) -> None:
    """Launch `kernel`, a C++ name with its template arguments, of `source`.

    Args:
        grid, block, cluster: blocks of the grid, threads of a block, blocks of a cluster.
        cooperative: all blocks must be resident at once.
    Raises: RuntimeError with the compiler's or the driver's message.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        function = load(source, kernel, device)
        if shared_bytes > _DYNAMIC:
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(function, most, shared_bytes))
        attributes = []
        if cluster > 1:
            size = driver.CUlaunchAttribute()
            size.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size.value.clusterDim.x = cluster
            size.value.clusterDim.y = size.value.clusterDim.z = 1
            attributes.append(size)
        if cooperative:
            together = driver.CUlaunchAttribute()
            together.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            together.value.cooperative = 1
            attributes.append(together)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = block, 1, 1
        config.sharedMemBytes = shared_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.numAttrs, config.attrs = len(attributes), attributes
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _checked(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0))


def load(source: Path, kernel: str, device: torch.device) -> Any:
    """The function on `device`, compiled at first use; a later launch of it cannot fail for that."""
    with torch.cuda.device(device):
        _use_context()
        return _load(source, kernel, torch.cuda.current_device())


def _use_context() -> None:
    """torch's context, also in a thread in which torch has done nothing yet."""
    from cuda.bindings import driver

    (context,) = _checked(driver.cuCtxGetCurrent())
    if int(context) == 0:
        (primary,) = _checked(driver.cuDevicePrimaryCtxRetain(torch.cuda.current_device()))
        _checked(driver.cuCtxSetCurrent(primary))


def compiled(source: Path, kernel: str, *, arch: str = "sm_90a") -> tuple[bytes, str]:
    """The device code of `kernel` for `arch`, and the name that it has there."""
    from cuda.bindings import nvrtc

    (program,) = _checked(
        nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    )
    where = (f"--gpu-architecture={arch}", f"--include-path={source.parent}")
    options = [option.encode() for option in (*where, *_OPTIONS)]
    _checked(nvrtc.nvrtcAddNameExpression(program, kernel.encode()))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = _checked(nvrtc.nvrtcGetProgramLogSize(program))
        log = b" " * size
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        _checked(nvrtc.nvrtcDestroyProgram(program))
        raise RuntimeError(f"{source.name}, {kernel}: {log.decode().strip()}")
    (name,) = _checked(nvrtc.nvrtcGetLoweredName(program, kernel.encode()))
    (size,) = _checked(nvrtc.nvrtcGetCUBINSize(program))
    code = b" " * size
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return code, name.decode()


@functools.cache
def _load(source: Path, kernel: str, device: int) -> Any:
    """The function on the current device; `device` is part of the key."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code, name = compiled(source, kernel, arch=f"sm_{major}{minor}{'a' if major == 9 else ''}")
    (module,) = _checked(driver.cuModuleLoadData(code))
    (function,) = _checked(driver.cuModuleGetFunction(module, name.encode()))
    return function


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call returns behind its status; RuntimeError if that is not success."""
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!r}")
    return tuple(values)
