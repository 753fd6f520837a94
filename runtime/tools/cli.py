"""The command `qroam`. Exit codes: 0 done, 1 outputs differ or a snapshot is damaged, 2 an error."""

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from ..cost.predicate import Mode
from ..gpu.limits import Device
from . import doctor as _doctor
from .demo.sabotage import Sabotage
from .progress import progress

_FILES = 16  # of the demo's corpus

Forms: TypeAlias = Literal["A", "A,B"]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Count: TypeAlias = Annotated[int, typer.Option(min=1)]

app = typer.Typer(
    help="Sparse attention over a KV corpus sharded across inference instances.",
    epilog="Errors are printed as one line; --debug prints the traceback.",
    add_completion=False,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` stands in for the process's arguments."""
    given = list(sys.argv[1:] if argv is None else argv)
    args = [arg for arg in given if arg != "--debug"]
    try:
        return int(app(args, prog_name="qroam", standalone_mode=False) or 0)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        if len(args) < len(given):
            traceback.print_exc()
        else:
            text = error.format_message() if isinstance(error, typer.TyperException) else str(error)
            lines = text.strip().splitlines() or [type(error).__name__]
            typer.echo(f"error: {lines[-1]}", err=True)
        return 2


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"qroam {version('qroam')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None: ...


@app.command()
def demo(
    corpus: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Sources to load; by default Python's own library."
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=_FILES, help=f"Bytes of corpus, a multiple of {_FILES} (the files).")
    ] = _FILES * 1024,
    instances: Annotated[
        int | None, typer.Option(min=1, help="By default 4; on GPUs one per GPU, at most 2.")
    ] = None,
    agents: Annotated[int, typer.Option(min=1, help="Sub-agents of each instance.")] = 2,
    decode: Annotated[int, typer.Option(min=1, help="Tokens each sub-agent decodes.")] = 32,
    layers: Count = 2,
    seed: int = 0,
    mode: Mode = "auto",
    sabotage: Annotated[
        Sabotage | None, typer.Option(help="Break one answer; the demo must then exit with 1.")
    ] = None,
    device: Annotated[
        Device, typer.Option(help="Device of the cache and of the attention over it.")
    ] = "cpu",
    log_decisions: Annotated[
        bool,
        typer.Option("--log-decisions", help="Write decisions to stderr, a JSON line per group."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Decode over a codebase sharded across instances and compare with the unsharded model."""
    if find_spec("transformers") is None:
        raise ValueError("qroam demo needs the extra 'models': pip install 'qroam[models]'")
    if tokens % _FILES:
        raise ValueError(f"--tokens must be a multiple of {_FILES}, got {tokens}")
    from .demo.run import DemoConfig, default_instances, run_demo

    config = DemoConfig(
        corpus=corpus,
        files=_FILES,
        bytes_per_file=tokens // _FILES,
        instances=instances or default_instances(device),
        agents=agents,
        decode_tokens=decode,
        layers=layers,
        seed=seed,
        mode=mode,
        sabotage=sabotage,
        log_decisions=log_decisions,
        device=device,
    )
    with progress() as report:
        result = run_demo(config, report)
    typer.echo(result.to_json() if as_json else result.render())
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def explain(
    layout: str = "mla-v3.2",
    queries: Count = 8,
    units: Annotated[int, typer.Option(min=1, help="Units selected by each query.")] = 2048,
    holders: Count = 4,
    fabric: Annotated[str, typer.Option(help="A shipped profile or a TOML file.")] = "ibgda-ndr200",
    reuse: Annotated[float, typer.Option(help="Expected uses of a fetched unit.")] = 1.0,
    shared: Annotated[
        bool, typer.Option("--shared", help="All queries select the same units.")
    ] = False,
    forms: Annotated[
        Forms,
        typer.Option(
            help="Payload forms that can be routed; B needs W_UK and W_UV at the holders."
        ),
    ] = "A",
    unit_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a unit.")] = 1,
    shifted: Annotated[
        bool,
        typer.Option("--shifted", help="The units' documents are attached at other positions."),
    ] = False,
    lines: Annotated[
        bool, typer.Option("--lines", help="Print one line per query and holder.")
    ] = False,
    lanes: Annotated[
        int, typer.Option(min=1, help="Ranks of an instance that share the heads.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Show the decisions of a hypothetical step, and why."""
    from ...partition.codec import make_codec
    from ...partition.head_split import lane_layout
    from ...partition.presets import named_layout
    from ..cost.profile import load_profile
    from .explain import explain_step
    from .explain_text import render, render_lines

    if lines and as_json:
        raise ValueError("--lines and --json exclude each other")
    chosen = named_layout(layout)
    if chosen.heads % lanes:
        raise ValueError(f"--lanes must divide the {chosen.heads} heads of {layout}, got {lanes}")
    chosen = lane_layout(chosen, 0, chosen.heads // lanes)
    codec = make_codec(chosen.codec, dim=chosen.entry_dim, rope_dim=chosen.rope_dim)
    records = explain_step(
        layout=chosen,
        queries=queries,
        units=units,
        holders=holders,
        profile=load_profile(fabric),
        reuse=reuse,
        entry_bytes=codec.entry_bytes,
        forms=("A", "B") if forms == "A,B" else ("A",),
        unit_tokens=unit_tokens,
        overlap=1.0 if shared else 0.0,
        shifted=shifted,
    )
    if lines:
        for line in render_lines(records):
            typer.echo(line)
    else:
        typer.echo(json.dumps(records) if as_json else render(records))


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="The folder of a snapshot.")], as_json: Json = False
) -> None:
    """Read a snapshot and compare every block with its hash; name the blocks that are lost."""
    from ...partition.snapshot.verify import verify as verify_snapshot
    from .verify import render_verified

    result = verify_snapshot(path)
    typer.echo(json.dumps(asdict(result)) if as_json else render_verified(result))
    raise typer.Exit(1 if result.damage else 0)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, and which transports and kernels work here."""
    checks = _doctor.diagnose()
    typer.echo(json.dumps([asdict(c) for c in checks]) if as_json else _doctor.render(checks))
