"""Universal checkpoints of DeepSpeed: ds_to_universal.py writes a file for each parameter, zero/NAME/fp32.pt."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import brief
from twa_scale.candidates.conversion import Shape, row_major
from twa_scale.candidates.formats.stored_tensors import ConcatenatedTensor, Stored
from twa_scale.errors import CandidateError

FOLDER = "zero"
LATEST = "latest_universal"
"""The file with the name of the last universal folder, next to the folders."""
_FILE = "fp32.pt"
_COMPARED = 1024  # values of each parameter that are compared with the file of the model, a read of 4 KiB
_DIFFERENT = 1 / 16  # the fraction of different values from which parameters are considered different
_FIX = "Convert the checkpoint again with ds_to_universal.py, or copy its whole folder again."


def is_universal(folder: Path) -> bool:
    """Return whether the folder of a step holds a universal checkpoint."""
    return (folder / FOLDER).is_dir()


def is_run_of_universal(folder: Path) -> bool:
    """Return whether a folder holds universal checkpoints, in folders of steps."""
    return (folder / LATEST).is_file()


def universal_weights(folder: Path, shapes: Mapping[str, Shape], content: Callable[[str], Any]) -> dict[str, Stored]:
    """Return the trained parameters of a universal checkpoint, in float32.

    Args:
        folder: the folder of the step.
        shapes: the shapes of all trained parameters, by name. With ZeRO-3, stored tensors are flat, and get these
            shapes.
        content: returns the content of a file below `folder`, by its path relative to it.

    Raises:
        CandidateError: a file is missing or damaged, or holds a tensor of another size.
    """
    return {name: _weight(folder, name, shape, content) for name, shape in shapes.items()}


def _weight(folder: Path, name: str, shape: Shape, content: Callable[[str], Any]) -> Stored:
    path = folder / FOLDER / name / _FILE
    if Path(name).name != name or not path.is_file():
        raise CandidateError(f"{folder}: has no {FOLDER}/{brief(name)}/{_FILE}, the weights of a parameter. {_FIX}")
    state = content(f"{FOLDER}/{name}/{_FILE}")
    stored = state.get("param") if isinstance(state, dict) else state
    if not isinstance(stored, Stored):
        raise CandidateError(f"{path}: holds no tensor 'param', as files of a universal checkpoint do. {_FIX}")
    if len(stored.shape) == 1 and stored.numel == prod(shape) and stored.row_major():
        return replace(stored, shape=shape, stride=row_major(shape))
    # Padding of a vocabulary is not in the file, so that it has fewer rows than the parameter in training.
    rows = isinstance(state, dict) and bool(state.get("vocab_tensor")) and stored.shape[1:] == shape[1:]
    if stored.shape != shape and not rows:
        raise CandidateError(f"{path}: holds a tensor of shape {stored.shape}, where the model has {shape}. {_FIX}")
    return stored


def require_same(
    folder: Path, trained: Mapping[str, Stored | ConcatenatedTensor], in_model: Mapping[str, Stored]
) -> None:
    """Check the weights against the file of the model, by the first values of each.

    The converter of DeepSpeed exchanges parameters of one group if the run had `round_robin_gradients`. In the type of
    the model, the values agree up to one unit in the last place, because optimizers round differently.

    Raises:
        CandidateError: names the parameter.
    """
    for name, stored in trained.items():
        other = in_model.get(name)
        if other is None or other.shape != stored.shape or not other.dtype.is_floating_point:
            continue
        subject, count = f"tensor {name!r}", min(prod(stored.shape), _COMPARED)
        first, second = torch.empty(count, dtype=stored.dtype), torch.empty(count, dtype=other.dtype)
        stored.read(0, first, subject)
        other.read(0, second, subject)
        if int(_differ(first.to(other.dtype), second).sum()) > count * _DIFFERENT:
            raise CandidateError(
                f"{folder / FOLDER / name / _FILE}: holds other numbers than the file of the model has for {name!r}: "
                "ds_to_universal.py exchanges parameters if the run had `round_robin_gradients`. Give the checkpoint "
                "from which it was converted."
            )


def _differ(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return which values of one type differ by more than one unit in the last place. NaN equals NaN."""
    limits = torch.finfo(first.dtype)
    smaller = torch.minimum(first.abs(), second.abs()).double().clamp_min(limits.tiny)
    unit = torch.ldexp(torch.full_like(smaller, limits.eps), torch.frexp(smaller).exponent - 1)
    same = (first == second) | (first.isnan() & second.isnan())
    return ~(same | ((first.double() - second.double()).abs() <= unit))
