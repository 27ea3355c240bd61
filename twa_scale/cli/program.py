"""The entry point: it runs the application, and prints notices and errors once for all ranks."""

import os
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
    """Run the command line. Invalid input ends with one message and exit code 2."""
    try:
        sys.path.append(_current_directory())  # as for `python -m twa_scale`, so that custom tasks can be imported
        with _notices():
            app(standalone_mode=True)
    except TwaError as error:
        _print_error(error)
        sys.exit(2)
    except OSError as error:
        if error.filename is not None or _can_print():
            raise
        _print_error(TwaError(f"the standard output cannot be written: {error.strerror}. Send it elsewhere."))
        sys.exit(2)


def _current_directory() -> str:
    try:
        return str(Path.cwd())
    except OSError as error:
        raise TwaError(f"the current directory cannot be read: {error.strerror}. Change to another one.") from error


def _can_print() -> bool:
    """Return whether the standard output can be written, unlike that to a full disk."""
    try:
        print(flush=True)
    except OSError:
        # Python would write the rest at the end of the process, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


@contextmanager
def _notices() -> Iterator[None]:
    """Print each notice as one line, without the source line that Python adds to a warning."""

    def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, TwaWarning):
            Console(stderr=True, emoji=False).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)
        else:
            default(message, category, *args, **kwargs)

    with warnings.catch_warnings():
        default, warnings.showwarning = warnings.showwarning, show
        yield


def _print_error(error: TwaError) -> None:
    """Print an error on rank 0 if all ranks raise it; otherwise on the ranks that raise it."""
    import torch.distributed as dist

    from twa_scale.ranks import World

    try:
        world = World.from_environment()
    except ConfigError:
        world = World(0, 1, 0)
    # Before the rendezvous, all ranks find the same fault in a configuration, so one rank of each node prints it.
    speaks = world.local_rank == 0 or not isinstance(error, ConfigError) or dist.is_initialized()
    if world.rank == 0 or (speaks and not error.agreed):
        kind = "bad configuration" if isinstance(error, ConfigError) else type(error).__name__
        suffix = "" if world.rank == 0 else f" (rank {world.rank})"
        text = f"[bold red]{kind}{suffix}:[/] {escape(str(error))}"
        Console(stderr=True, emoji=False).print(text, highlight=False, soft_wrap=True)
