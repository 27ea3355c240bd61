"""The program: it runs the application, and says what went wrong once for all ranks."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from twa_scale.base.notices import TwaWarning
from twa_scale.cli.app import app
from twa_scale.errors import ConfigError, TwaError


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    sys.path.append(str(Path.cwd()))  # as `python -m twa_scale` has it: tasks of one's own are found there
    try:
        with _notices():
            app(standalone_mode=True)
    except TwaError as error:
        _explain(error)
        sys.exit(2)


@contextmanager
def _notices() -> Iterator[None]:
    """Print each notice as one line, without the place in the code that Python adds to a warning."""

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, TwaWarning):
            Console(stderr=True).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
        else:
            usual(message, category, *where, **more)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield


def _explain(error: TwaError) -> None:
    """Print an error once: one rank speaks for all where all know; what is wrong with one node, only that can say."""
    import torch.distributed as dist

    from twa_scale.ranks import World

    try:
        world = World.from_environment()
    except ConfigError:
        world = World(0, 1, 0)
    # Before ranks have met all find the same fault in a configuration: one on each node says so.
    alone = world.local_rank == 0 or not isinstance(error, ConfigError) or dist.is_initialized()
    if world.rank == 0 or (alone and not error.agreed):
        kind = "bad configuration" if isinstance(error, ConfigError) else type(error).__name__
        where = "" if world.rank == 0 else f" (rank {world.rank})"
        text = f"[bold red]{kind}{where}:[/] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
