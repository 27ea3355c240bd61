"""The state of running averages in files: one for each rank."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from twa_scale.errors import StateError
from twa_scale.output.publish import replacing
from twa_scale.running.checkpoint import State, local


def write_file(state: State, directory: Path, rank: int, size: int) -> None:
    """Write the state of a rank to a separate file. An incomplete file is never left behind.

    Raises:
        OutputError: the disk is full or fails.
    """
    with replacing(directory / _file_name(rank, size)) as temporary, temporary.open("wb") as file:
        try:
            torch.save(plain(state), file)
        except RuntimeError as error:  # from torch's writer, if the file could not be written
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError(str(error)) from error


def read_file(directory: Path, rank: int, size: int) -> State | None:
    """Return the state of a rank, or None where the directory holds none of any rank.

    Raises:
        StateError: the states are of another number of ranks, or a file cannot be read.
    """
    path = directory / _file_name(rank, size)
    if not path.exists():
        others = sorted(directory.glob("averages-*-of-*.pt"))
        if not others:
            return None
        raise StateError(
            f"{directory}: holds {others[0].name}, but no {path.name}: each rank saves a separate file. Resume with "
            "the same number of ranks, or delete these files to start new averages."
        )
    try:
        state: State = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise StateError(f"{path}: cannot be read ({error}). Resume from another checkpoint.") from error
    return state


def _file_name(rank: int, size: int) -> str:
    return f"averages-{rank:05d}-of-{size:05d}.pt"


def plain(tree: Any) -> Any:
    """Return a state in which DTensors are replaced by their parts on this rank."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return local(tree)
