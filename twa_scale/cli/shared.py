"""Functions that commands share: joining other ranks, and printing tables."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console, RenderableType

if TYPE_CHECKING:
    from twa_scale.run.progress import Report


def rendered(table: RenderableType) -> str:
    """Return a table as text with the width of the console."""
    console = Console(emoji=False)
    with console.capture() as text:
        console.print(table)
    return text.get().rstrip()


@contextmanager
def joined(out: Path, timeout: float | None) -> "Iterator[tuple[Report, Callable[[str], None]]]":
    """Join the other ranks of the launcher, if there are any, for the duration of a `with` block.

    SIGINT, SIGTERM and SIGHUP end the block, and unfinished output is removed.

    Yields:
        The progress report and a print function. Only those of rank 0 print.
    """
    import torch

    from twa_scale.config import TIMEOUT
    from twa_scale.ranks import SignalExit, World, exit_on_signals
    from twa_scale.run.progress import Report

    world = World.from_environment()
    try:
        with exit_on_signals(), world.joined(torch.device("cpu"), out.parent, timeout or TIMEOUT):
            yield Report(active=world.rank == 0), typer.echo if world.rank == 0 else lambda _: None
    except SignalExit as ended:
        typer.echo(f"stopped by {ended.signal}: nothing was written", err=True)
        raise
