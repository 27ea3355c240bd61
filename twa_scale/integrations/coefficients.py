"""The coefficients of an average in the checkpoints of trainers, with the rows of `groups: tensor+row` in files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.state.plain_file import plain_data, read_regular
from twa_scale.average.state.rows_file import remove_rows
from twa_scale.errors import StateError
from twa_scale.output.publish import replacing

STATE = "coefficients.pt"
"""The file of the state, in the directory of a checkpoint."""
_KIND = "the state of an average"
_FIX = "Resume from another checkpoint."


def save_coefficients(twa: TrainableAverage, directory: Path) -> None:
    """Write the state of an average and, in a directory next to it, the rows of each rank. Collective.

    Args:
        twa: the average.
        directory: the directory of the checkpoint, on a file system that all ranks share.

    Raises:
        OutputError: on every rank; an older state in this directory, and its rows, are unchanged.
    """
    state = twa.state_dict(directory)
    with twa.pods.agree():
        if twa.pods.rank == 0:
            with replacing(directory / STATE) as temporary:
                torch.save(state, temporary)
            remove_rows(directory, lambda: named_rows(state))


def load_coefficients(twa: TrainableAverage, directory: Path) -> bool:
    """Load the files of `save_coefficients`, and return whether there were any. Collective.

    Raises:
        StateError: on every rank; a file cannot be read, only some ranks see it, or the state is of another average.
    """
    path, state = directory / STATE, None
    with twa.pods.agree():
        state = read_state(path)
    has_state = twa.pods.gather(state is not None)
    if not any(has_state):
        return False
    with twa.pods.agree():
        if state is None:
            raise StateError(
                f"{path}: rank {twa.pods.rank} does not see it, but rank {has_state.index(True)} does. All ranks must "
                "see the same checkpoint: put it on a file system that they share."
            )
    assert state is not None
    twa.load_state_dict(state, directory)
    return True


def read_state(path: Path) -> Any:
    """Return the content of a file, or None if there is no file. The content is not checked.

    Raises:
        StateError: the file cannot be read.
    """
    content = read_regular(path, kind=_KIND, fix=_FIX)
    return None if content is None else plain_data(path, content, kind=_KIND, fix=_FIX)


def named_rows(*states: Any) -> set[str]:
    """Return the directories of rows that states of averages name."""
    names = set()
    for state in states:
        rows = state.get("rows") if isinstance(state, Mapping) else None
        stored = rows.get("stored") if isinstance(rows, Mapping) else None
        name = stored.get("directory") if isinstance(stored, Mapping) else None
        if isinstance(name, str):
            names.add(name)
    return names
