"""What of qroam works on this machine, and why the rest does not."""

import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

# distribution -> the extra of qroam that brings it (None: a base dependency)
_PACKAGES = {
    "qroam": None,
    "torch": None,
    "numpy": None,
    "msgpack": None,
    "safetensors": None,
    "typer": None,
    "rich": None,
    "transformers": "models",
    "triton": "gpu",
    "nvshmem4py-cu13": "gpu",
    "flashinfer-python": "gpu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report; `detail` is a version or a device if ok, else the reason."""

    name: str
    ok: bool
    detail: str


def diagnose() -> list[Check]:
    """Inspect this machine without a CUDA context, NVSHMEM or a process group."""
    gpus = _gpu_names()
    packages = [_package(name, extra) for name, extra in _PACKAGES.items()]
    return [
        Check(name="python", ok=True, detail=platform.python_version()),
        *packages,
        Check(name="device cpu", ok=True, detail=f"{torch.get_num_threads()} threads"),
        _cuda(gpus),
        Check(name="transport loopback", ok=True, detail="one rank"),
        _gloo(),
        _on_gpus("transport nvshmem", "nvshmem4py-cu13", gpus, "between GPUs of a host"),
        Check(name="kernels torch", ok=True, detail="the definition of every verb"),
        _on_gpus("kernels triton", "triton", gpus, "RuntimeConfig(device='cuda')"),
        _on_gpus("kernels flashinfer", "flashinfer-python", gpus, "baseline of the benchmarks"),
    ]


def render(checks: Sequence[Check]) -> str:
    """One aligned line a check."""
    width = max(len(check.name) for check in checks)
    return "\n".join(
        f"{'ok' if check.ok else 'no':3} {check.name:{width}}  {check.detail}" for check in checks
    )


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _package(name: str, extra: str | None) -> Check:
    found = _version(name)
    if found is not None:
        return Check(name=name, ok=True, detail=found)
    remedy = f"pip install 'qroam[{extra}]'" if extra else "pip install qroam"
    return Check(name=name, ok=False, detail=f"not installed: {remedy}")


def _gpu_names() -> list[str]:
    """GPUs as the driver's own tool lists them: asking torch would initialise CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return answer.stdout.split("\n")[:-1] if answer.returncode == 0 else []


def _cuda(gpus: Sequence[str]) -> Check:
    if not gpus:
        return Check(name="device cuda", ok=False, detail="no NVIDIA GPU or driver found")
    names = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    if torch.version.cuda is None:
        return Check(name="device cuda", ok=False, detail=f"{names}, but torch is a CPU build")
    return Check(name="device cuda", ok=True, detail=f"{names}, CUDA {torch.version.cuda}")


def _gloo() -> Check:
    usable = dist.is_available() and dist.is_gloo_available()
    detail = "over TCP" if usable else "this build of torch has no gloo"
    return Check(name="transport torch (gloo)", ok=usable, detail=detail)


def _on_gpus(name: str, distribution: str, gpus: Sequence[str], use: str) -> Check:
    """What needs a package and a GPU, and what it is there for."""
    reasons = []
    if _version(distribution) is None:
        reasons.append(f"{distribution} is not installed")
    if not gpus:
        reasons.append("no GPU")
    return Check(name=name, ok=not reasons, detail="; ".join(reasons) or use)
