"""The coefficients of an average in the checkpoints of trainers, with the rows of `groups: tensor+row` in files."""

import re
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.state.rows_file import DIRECTORY
from twa_scale.errors import StateError
from twa_scale.output.publish import replacing

STATE = "coefficients.pt"
"""The file of the state, in the directory of a checkpoint."""


def save_coefficients(twa: TrainableAverage, directory: Path) -> None:
    """Write the state of an average, and its rows in a directory beside it: each rank its own rows. Collective.

    Args:
        twa: the average.
        directory: of the checkpoint; the same file system on every rank.

    Raises:
        OutputError: on every rank; an older state in this directory, and its rows, are unchanged.
    """
    state = twa.state_dict(directory)
    with twa.pods.agree():
        if twa.pods.rank == 0:
            with replacing(directory / STATE) as temporary:
                torch.save(state, temporary)
            remove_rows(directory, state)


def load_coefficients(twa: TrainableAverage, directory: Path) -> bool:
    """Continue from `save_coefficients`, and return whether there was anything. Collective.

    Raises:
        StateError: on every rank; a file that cannot be read, or the state of another average.
    """
    path, state = directory / STATE, None
    with twa.pods.agree():
        if path.exists():
            state = read_state(path)
    if not all(twa.pods.gather(state is not None)):
        return False
    assert state is not None
    twa.load_state_dict(state, directory)
    return True


def read_state(path: Path) -> dict[str, Any]:
    """Return the state in a file.

    Raises:
        StateError: it cannot be read.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise StateError(f"{path}: cannot be read ({error}). Resume from another checkpoint.") from error
    return state


def remove_rows(directory: Path, *states: dict[str, Any]) -> None:
    """Remove the files of rows in a directory which none of these states names. On one rank."""
    used = {(state.get("rows") or {}).get("stored", {}).get("directory") for state in states}
    for path in directory.glob("state.rows-*"):
        if re.fullmatch(DIRECTORY, path.name) and path.name not in used:
            shutil.rmtree(path, ignore_errors=True)
