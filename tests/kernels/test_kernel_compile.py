"""Kernels, as their launchers ship them for Hopper, compile for sm_90, fit and do not spill.

A child process stands in for the device: launchers get tensors that claim to be on a GPU of 132
SMs, and what they launch is compiled with the types, constants and options of that launch. ptxas
tells of stack and spills. Nothing runs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from hopper import BF16, F32, GPU, U8, StandIn, fetch, fetched, on_gpu, pretend_hopper

from qroam.kernels import nvrtc
from qroam.kernels import plan as plan_module
from qroam.kernels.decide import SOURCE, PlanMode, PriceTable
from qroam.kernels.nvrtc import compiled
from qroam.kernels.plan import BlockTable

_USED = re.compile(
    r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_FAILED = "did not compile:"
_SHARED = 232448  # bytes of shared memory that a block can have


def attend(
    *,
    heads: int,
    unit_tokens: int = 1,
    fp8: bool = False,
    tables: bool = False,
    dtype: torch.dtype = BF16,
    combined: bool = True,
) -> None:
    from qroam.kernels.attend import AttendWorkspace, Tables, attend, parts_of

    rows = 64
    entries = on_gpu(262144, 656, dtype=U8) if fp8 else on_gpu(262144, 576, dtype=dtype)
    attend(
        on_gpu(rows, heads, 576, dtype=dtype),
        entries,
        on_gpu(rows, 2048 // unit_tokens),
        value_dim=512,
        scale=0.1,
        unit_tokens=unit_tokens,
        workspace=AttendWorkspace.make(
            rows=rows,
            heads=heads,
            value_dim=512,
            device=GPU,
            parts=parts_of(heads, GPU),
            dtype=dtype,
        ),
        lengths=on_gpu(rows),
        num_rows=on_gpu(1),
        query_of=on_gpu(rows),
        tables=Tables(on_gpu(4096), on_gpu(4096), on_gpu(4096), 64) if tables else None,
        rotation=on_gpu(rows, 64, dtype=F32) if tables else None,
        combined=combined,
    )


def merge(*, listed: bool) -> None:
    from qroam.kernels.library.merge import merge

    shape = (256,) if listed else (4, 64)
    merge(
        on_gpu(*shape, 128, 512, dtype=BF16),
        on_gpu(*shape, 128, dtype=F32),
        offsets=on_gpu(65) if listed else None,
        sink=on_gpu(128, dtype=F32),
        covered=on_gpu(*shape, 2),
        expected=on_gpu(*shape, 2),
        fault=on_gpu(64),
    )


def gather(*, rows: int, row_bytes: int) -> None:
    from qroam.kernels.gather import gather

    gather(on_gpu(262144, row_bytes, dtype=U8), on_gpu(rows), count=on_gpu(1))


def codec(*, verb: str) -> None:
    from qroam.kernels import codec

    listed, count = on_gpu(8192), on_gpu(1)
    match verb:
        case "encode_latent":
            out = on_gpu(262144, 656, dtype=U8)
            entries = on_gpu(8192, 576, dtype=BF16)
            codec.encode_latent(entries, rope_dim=64, index=listed, count=count, out=out)
        case "decode_latent":
            rows = on_gpu(262144, 656, dtype=U8)
            codec.decode_latent(rows, rope_dim=64, index=listed, count=count)
        case "encode_index":
            out = on_gpu(4096, 64 * 132, dtype=U8)
            keys = on_gpu(8192, 128, dtype=BF16)
            codec.encode_index(keys, block_tokens=64, index=listed, count=count, out=out)
        case "decode_index":
            blocks = on_gpu(4096, 64 * 132, dtype=U8)
            codec.decode_index(blocks, block_tokens=64, index=listed, count=count)


def rope(*, layers: int) -> None:
    from qroam.kernels.rope import rotate

    rows = on_gpu(layers, 8192, 576, dtype=BF16)
    rotate(
        rows[..., 512:],
        on_gpu(2048),
        on_gpu(2048),
        on_gpu(32, dtype=F32),
        pairing="interleaved",
        count=on_gpu(1),
    )


def exchange(
    *, rows: int, few: bool = False, columns: int = 576, answered: int = 512, in_parts: bool = True
) -> None:
    """All roles at once; or, on a few SMs beside an attention, those that go beside one, and the
    others after it, which merge parts or take what is merged."""
    from qroam.kernels.attend import AttendWorkspace
    from qroam.kernels.exchange.launch import exchange
    from qroam.kernels.exchange.layout import Wire
    from qroam.kernels.exchange.types import Accepted, Ends, Merge, Partials, Routes

    wire = Wire(
        world_size=2, rows=rows, heads=128, query_words=64 * columns, answer_words=64 * answered,
        units=2048,
    )  # fmt: skip
    i64 = torch.int64
    ends = Ends(
        wire, 0, 1, on_gpu(wire.words), on_gpu(2, dtype=i64), on_gpu(1, dtype=i64),
        on_gpu(4 * wire.chunks + 1), on_gpu(1), on_gpu(1, dtype=i64), on_gpu(64, 5, dtype=i64),
        10**9, None,
    )  # fmt: skip
    routes = Routes(
        on_gpu(2 * rows), on_gpu(2 * rows), on_gpu(rows * 2048), on_gpu(2), on_gpu(rows, 2, 2)
    )
    out, lse = on_gpu(rows, 128, answered, dtype=BF16), on_gpu(rows, 128, dtype=F32)
    parts = None
    if in_parts:
        parts = AttendWorkspace.make(rows=rows, heads=128, value_dim=answered, parts=66, device=GPU)
    query, accepted = on_gpu(rows, 128, columns, dtype=BF16), Accepted.make(wire, GPU)
    answer = Partials(out, lse, on_gpu(rows, 2))
    merge = Merge(out[None], lse[None], out, lse, on_gpu(rows))
    if few:
        exchange(ends, routes, send=query, accept=accepted, ctas=16)
        exchange(ends, routes, answer=answer._replace(parts=parts), ctas=16)
        merge = merge._replace(lacking=on_gpu(rows), parts=parts)
        exchange(ends, routes, answer=answer._replace(parts=parts), receive=merge)
    else:
        exchange(ends, routes, send=query, accept=accepted, answer=answer, receive=merge)


def compose(*, world: int, counted: bool = False) -> None:
    from qroam.kernels.fetch import compose

    pool, plan, came = fetched(entry_bytes=1152, world=world)
    units, lengths, fault = torch.empty_like(plan.place), on_gpu(64), on_gpu(64)
    uses = on_gpu(256) if counted else None
    compose(pool, 60, plan, came, rank=0, units=units, lengths=lengths, fault=fault, uses=uses)


@dataclass(frozen=True)
class Launch:
    run: Callable[..., None]
    options: dict[str, Any]
    kernels: frozenset[str]  # what it must have compiled
    spilled: int  # bytes at most


def launch(run: Callable[..., None], *kernels: str, spilled: int = 0, **options: Any) -> Launch:
    return Launch(run, options, frozenset(kernels), spilled)


LAUNCHES = {
    "attend 128 heads": launch(attend, "_attend", "_combine", heads=128),
    "attend 128 heads, in parts": launch(attend, "_attend", heads=128, combined=False),
    "attend 16 heads": launch(attend, "_attend", "_combine", heads=16),
    "attend 128 heads of a pool, rotated": launch(attend, "_attend", heads=128, tables=True),
    "attend units of 64": launch(attend, "_attend", heads=128, unit_tokens=64),
    # Four registers, moved once a tile; a producer with more would take them from the accumulators.
    "attend fp8": launch(attend, "_attend", heads=128, fp8=True, spilled=16),
    "attend fp16, the portable kernel": launch(attend, "_attend", heads=128, dtype=torch.float16),
    "attend fp32, the portable kernel": launch(attend, "_attend", heads=128, dtype=F32, spilled=64),
    "merge": launch(merge, "_merge_kernel", listed=False),
    "merge lists": launch(merge, "_merge_kernel", listed=True),
    "gather fp8 entries": launch(gather, "_gather_kernel", rows=2048, row_bytes=656),
    "gather queries of form B": launch(gather, "_gather_kernel", rows=512, row_bytes=128 * 384),
    "gather blocks": launch(gather, "_gather_kernel", rows=1024, row_bytes=64 * 1152),
    **{
        f"codec {verb}": launch(codec, f"_{verb}_kernel", verb=verb)
        for verb in ("encode_latent", "decode_latent", "encode_index", "decode_index")
    },
    "rope": launch(rope, "_rotate_kernel", layers=61),
    **{
        f"fetch {size} bytes": launch(fetch, "_fetch_kernel", entry_bytes=size)
        for size in (656, 1152, 2304, 16384)
    },
    **{
        f"fetch {size} bytes, counted": launch(
            fetch, "_fetch_kernel", entry_bytes=size, counted=True
        )
        for size in (656, 1152, 16384)
    },
    "compose of 8 ranks": launch(compose, "_compose_kernel", world=8),
    "compose of 64 ranks": launch(compose, "_compose_kernel", world=64),
    "compose of 8 ranks, counted": launch(compose, "_compose_kernel", world=8, counted=True),
    "exchange 64": launch(exchange, "_exchange_kernel", rows=64),
    # A dozen registers at most: parts of a row are read together, as many as there is room for.
    "exchange 1 beside an attention": launch(
        exchange, "_exchange_kernel", rows=1, few=True, spilled=16
    ),
    "exchange 64 beside an attention": launch(
        exchange, "_exchange_kernel", rows=64, few=True, spilled=64
    ),
    **{
        f"exchange {rows} of form B beside an attention": launch(
            exchange,
            "_exchange_kernel",
            rows=rows,
            few=True,
            columns=192,
            answered=128,
            in_parts=False,
        )
        for rows in (1, 64)
    },
}


def compile_all(names: list[str]) -> None:
    """In the child: run launchers, print the name of each before what ptxas says."""

    def tell(made: Any) -> None:
        sys.stdout.write(f"shared memory: {made.metadata.shared}\n")

    pretend_hopper(tell)
    for name in names:
        sys.stdout.write(f"== {name}\n")
        sys.stdout.flush()
        try:
            with StandIn():
                LAUNCHES[name].run(**LAUNCHES[name].options)
        except Exception:  # whatever it is belongs to this launch; the others still compile
            sys.stdout.write(f"{_FAILED}\n{traceback.format_exc()}\n")


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What ptxas said about each launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
        "TRITON_DUMP_PTXAS_LOG": "1",
    }
    halves = [list(LAUNCHES)[part::2] for part in range(2)]
    children = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__)), *names],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in halves
    ]
    found: dict[str, str] = {}
    for child in children:
        printed, errors = child.communicate(timeout=300)
        parts = re.split(r"^== (.*)$", printed, flags=re.MULTILINE)[1:]
        found |= dict(zip(parts[::2], parts[1::2], strict=True))
        assert child.returncode == 0, errors
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiles_for_hopper(name: str, reports: dict[str, str]) -> None:
    assert _FAILED not in reports[name], reports[name]
    shared = [int(size) for size in re.findall(r"shared memory: (\d+)", reports[name])]
    assert max(shared) <= _SHARED
    kernels = {kernel: tuple(map(int, used)) for kernel, *used in _USED.findall(reports[name])}
    assert LAUNCHES[name].kernels <= set(kernels), sorted(kernels)
    for kernel, (_, stores, loads, _) in kernels.items():
        most = LAUNCHES[name].spilled
        assert max(stores, loads) <= most, f"{kernel}: {stores} and {loads} bytes spilled"


# (items, units of an item, ranks, forms, mode)
PLANS: dict[str, tuple[int, int, int, int, PlanMode]] = {
    "plan of 1 item": (1, 2048, 8, 2, "auto"),
    "plan of 8 items": (8, 2048, 8, 1, "auto"),
    "plan of 24 items": (24, 2048, 8, 1, "always-fetch"),
    "plan of 64 items": (64, 2048, 8, 1, "auto"),
    "plan of 128 items": (128, 2048, 8, 2, "always-route"),
    "plan of 256 items": (256, 2048, 8, 1, "auto"),
    "plan of 256 items of 4096": (256, 4096, 8, 2, "auto"),
    "plan of many ranks, in stages": (256, 4096, 256, 2, "given"),
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def planned(
    items: int,
    listed: int,
    world: int,
    forms: int,
    mode: PlanMode,
    monkeypatch: pytest.MonkeyPatch,
    *,
    clusters: bool = True,
) -> list[tuple[str, int]]:
    """Kernels, and threads of an SM, that a call of `plan` launches on 132 SMs."""
    launched: list[tuple[str, int]] = []

    def launch(source: Path, kernel: str, arguments: object, **options: Any) -> None:
        per_sm = 2 if options["grid"] > 132 and options["cooperative"] else 1
        launched.append((kernel, options["block"] * per_sm))

    monkeypatch.setattr(nvrtc, "launch", launch)
    monkeypatch.setattr(nvrtc, "load", lambda *arguments: None)
    monkeypatch.setattr(plan_module, "num_sms", lambda device: 132)
    monkeypatch.setattr(plan_module, "shared_of_sm", lambda device: 228 << 10)
    monkeypatch.setattr(plan_module, "has_clusters", lambda device: clusters)
    with StandIn():
        prices = PriceTable(on_gpu(world, 16, dtype=torch.float64), forms, 2)
        directory = BlockTable(on_gpu(4096, 4), block_tokens=64, num_branches=1)
        workspace = plan_module.PlanWorkspace.make(
            num_items=256, num_branches=1, num_units=262144, world_size=world, device=GPU
        )
        out = plan_module.Plan.make(
            num_items=items, num_listed=listed, world_size=world, num_forms=forms, device=GPU
        )
        units = on_gpu(items, listed)
        plan_module.plan(units, directory, prices, workspace, rank=0, mode=mode, out=out)
    return launched


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
def test_cuda_compiles_for_hopper(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `plan` launches, with the template arguments of that launch."""
    items, listed, world, forms, mode = PLANS[name]
    launched = planned(items, listed, world, forms, mode, monkeypatch)
    assert len(launched) == (5 if "in stages" in name else 1)
    for kernel, threads in launched:
        code, symbol = compiled(SOURCE, kernel)
        (tmp_path / "plan.cubin").write_bytes(code)
        command = [str(_CUOBJDUMP), "-res-usage", "-sass", str(tmp_path / "plan.cubin")]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used = re.search(rf"Function {symbol}:\s+REG:(\d+) STACK:(\d+)", told)
        assert used, told
        registers, stack = map(int, used.groups())
        assert registers * threads <= 65536
        most = 96 if listed > 2048 else 16  # eight units a thread, 64 registers
        assert stack <= most, "more spills than a few registers, or the arguments are copied"
        # Without contraction, as the definition on the host computes.
        assert "DFMA" not in told
        assert "DMUL" in told or mode == "given"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100"])
def test_the_plan_compiles_for(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = arch != "sm_80"
    ((kernel, _),) = planned(8, 2048, 2, 1, "auto", monkeypatch, clusters=clusters)
    code, _ = compiled(SOURCE, kernel, arch=arch)
    assert code


if __name__ == "__main__":
    compile_all(sys.argv[1:])
