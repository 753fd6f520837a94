"""Worlds that are killed: each life restores what the last one saved, checks it, serves and goes on.

A life is a world of processes over gloo. Document n has contents that follow from n alone. It is
prefilled in two halves, with snapshots in between that are written beside decode steps, and whatever
a returned snapshot covers is noted in the file `acknowledged` (a line per rank and document). Every
output is compared with dense attention; one that differs is noted in the file `wrong`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from ranks import _connect
from torch import Tensor

from qroam.partition.placement import Placement, PlacementPolicy
from qroam.partition.presets import mla, uniform_model
from qroam.runtime import PeerError, Runtime, RuntimeConfig
from qroam.runtime.transport.base import Transport

B, LAYERS, DOCUMENTS = 4, 2, 12
DEADLINE_S = 4.0
PEER_LOST, NO_WORLD = 3, 4  # exit codes of ranks that outlive another


class Life(NamedTuple):
    """Facts of one life. `first_pause_s` is not part of it: the killer keeps the time."""

    world: int
    policy: PlacementPolicy
    copies: int


def config(life: Life) -> RuntimeConfig:
    layout = mla(
        name="small", heads=2, latent=30, rope=2, nope=3, value=4, softmax_scale=0.5,
        codec="fp64", index=None, index_codec="fp32",
    )  # fmt: skip
    return RuntimeConfig(
        model=uniform_model(replace(layout, projection=None), LAYERS),
        max_blocks=DOCUMENTS * 16,
        corpus_slots=DOCUMENTS * 16,
        block_tokens=B,
        placement=Placement(policy=life.policy, copies=life.copies),
        dtype=torch.float64,
        deadline_s=DEADLINE_S,
    )


def tokens_of(number: int) -> int:
    return 20 + (number * 7) % 40


def contents(number: int, layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * number + layer)
    return torch.randn(tokens_of(number), 32, generator=generator, dtype=torch.float64)


def acknowledged(folder: Path) -> dict[int, int]:
    """Tokens of each document that some rank was told are saved."""
    path = folder / "acknowledged"
    found: dict[int, int] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        number, tokens = map(int, line.split())
        found[number] = max(found.get(number, 0), tokens)
    return found


def note(folder: Path, name: str, text: str) -> None:
    """Append whole lines at once: a kill leaves all of them or none."""
    fd = os.open(folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, text.encode())
    os.close(fd)


def attend_all(runtime: Runtime, number: int, tokens: int) -> None:
    """A query over the first tokens of a document, in every layer. Raises: AssertionError."""
    document = runtime._world.directory.document(f"d{number}")
    ids = document.ids(0, tokens)[None]
    generator = torch.Generator().manual_seed(number)
    query = torch.randn(1, 2, 32, generator=generator, dtype=torch.float64)
    for layer in range(LAYERS):
        scope = runtime.scope(documents=[document.name], queries=1)
        out = runtime.attend(layer, query, runtime.selection(ids, scope))
        entries = contents(number, layer)[:tokens]
        expected = torch.softmax(query @ entries.T * 0.5, dim=-1) @ entries[:, :30]
        error = float((out - expected).abs().max())
        assert error <= 1e-12, f"rank {runtime.rank}: document {number} differs by {error}"


def restore_and_check(runtime: Runtime, folder: Path) -> dict[int, int]:
    """Tokens of each document that came back. Raises: AssertionError if one is lost or differs."""
    told = acknowledged(folder)
    found: dict[int, int] = {}
    if (folder / "s" / "manifest").exists():
        report = runtime.restore(folder / "s")
        found = {int(name[1:]): tokens for name, tokens in report.documents.items()}
    lost = {n: (tokens, found.get(n, 0)) for n, tokens in told.items() if found.get(n, 0) < tokens}
    assert not lost, f"lost (acknowledged, restored): {lost}"
    assert all(check.is_sound for check in runtime.verify())
    for number, tokens in found.items():
        attend_all(runtime, number, tokens)
    return found


def live(runtime: Runtime, folder: Path) -> None:
    """Go on where the last life was stopped, until all documents are written."""
    found = restore_and_check(runtime, folder)
    for number in range(DOCUMENTS):
        tokens, start = tokens_of(number), found.get(number, 0)
        if number not in found:
            runtime.add_document(f"d{number}", tokens=tokens)
        for end in (tokens // 2, tokens):
            if start < end:
                _write(runtime, number, start, end)
                start = end
                runtime.begin_snapshot(folder / "s")
                for _ in range(2):
                    attend_all(runtime, number, start)
                runtime.finish_snapshot()
                found[number] = start if start == tokens else start // B * B
                lines = (f"{n} {saved}\n" for n, saved in found.items())
                note(folder, "acknowledged", "".join(lines))


def _write(runtime: Runtime, number: int, start: int, end: int) -> None:
    """Prefill: the writer changes, and its entries travel with the step that follows."""
    if number % runtime.world_size != runtime.rank:
        return
    request = runtime.request(into=f"d{number}", start=start)
    ids = runtime.append(request, end - start)
    for layer in range(LAYERS):
        runtime.write(layer, ids, contents(number, layer)[start:end])
    runtime.release(request)


def rank_main(rank: int, life: Life, folder: Path, store: Path) -> None:
    """One rank's life; ends at once when another rank is lost, as the process of an engine would."""
    torch.set_num_threads(1)
    try:
        end: Transport = _connect(rank, life.world, store, DEADLINE_S)
    except RuntimeError:
        os._exit(NO_WORLD)
    try:
        with Runtime.open(config(life), end) as runtime:
            live(runtime, folder)
    except PeerError:
        os._exit(PEER_LOST)
    except BaseException as error:
        note(folder, "wrong", f"rank {rank}: {type(error).__name__}: {error}\n")
        os._exit(1)
    os._exit(0)
