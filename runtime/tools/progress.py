"""Progress of a long command, on stderr: bars on a terminal, plain lines in a log."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import typer
from rich.console import Console
from rich.progress import Progress, TaskID

Report: TypeAlias = Callable[[str, int, int], None]  # phase, steps done, steps in all


@contextmanager
def progress() -> Iterator[Report]:
    """Yield the function that a command calls with its progress; a phase begins with its first call."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log
        return
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


def _log(phase: str, done: int, total: int) -> None:
    """Log the start and the end of a phase only, so that a log stays short."""
    if done in (0, total):
        typer.echo(f"{phase}: {done}/{total}", err=True)
