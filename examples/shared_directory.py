"""Directories that several processes need and one of them makes."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twa_scale.output.publish import publish

FINISHED = "finished.json"


def make_once(directory: Path, settings: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Make a directory, unless it was made with the same settings before.

    Of the processes that call this at the same time one writes, and the others wait. A kill leaves the earlier
    directory or none.

    Args:
        directory: is replaced if it was made with other settings.
        settings: what the content depends on.
        write: writes the content into a directory that does not exist yet.

    Raises:
        SystemExit: the directory has files that were not made here.
    """
    asked, finished = json.dumps(settings), directory / FINISHED
    writing = directory.with_name(f".{directory.name}.writing")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_name(f".{directory.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if finished.exists() and finished.read_text() == asked:
            return
        if directory.exists() and not finished.exists() and any(directory.iterdir()):
            raise SystemExit(f"{directory} has files but no {FINISHED}: remove it, so that it can be made again.")
        shutil.rmtree(writing, ignore_errors=True)  # of a process that was killed
        write(writing)
        (writing / FINISHED).write_text(asked)
        publish(writing, directory)
        shutil.rmtree(writing, ignore_errors=True)  # the earlier directory
