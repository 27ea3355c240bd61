"""Universal checkpoints of DeepSpeed: ds_to_universal.py writes a file for each parameter, zero/NAME/fp32.pt."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from twa_scale.base.inputs import brief
from twa_scale.candidates.conversion import Shape, row_major
from twa_scale.candidates.formats.stored_tensors import Stored
from twa_scale.errors import CandidateError

FOLDER = "zero"
LATEST = "latest_universal"
"""The file beside the folders that names the last universal one."""
_FILE = "fp32.pt"
_COMPARED = 16  # numbers of each parameter that are compared with the file of the model
_ROUNDING = 2**-6  # relative; twice that of bfloat16
_FIX = "Convert the checkpoint again with ds_to_universal.py, or copy its whole folder again."


def is_universal(folder: Path) -> bool:
    """Return whether the folder of a step holds a universal checkpoint."""
    return (folder / FOLDER).is_dir()


def universal_weights(folder: Path, shapes: Mapping[str, Shape], content: Callable[[str], Any]) -> dict[str, Stored]:
    """Return the trained parameters of a universal checkpoint, in float32.

    Args:
        folder: the folder of the step.
        shapes: of all trained parameters, by name. ZeRO-3 leaves flat tensors, which get their shape from here.
        content: returns what a file below `folder` holds, by its path there.

    Raises:
        CandidateError: a file is missing or damaged, or holds a tensor of another size.
    """
    return {name: _weight(folder, name, shape, content) for name, shape in shapes.items()}


def _weight(folder: Path, name: str, shape: Shape, content: Callable[[str], Any]) -> Stored:
    path = folder / FOLDER / name / _FILE
    if Path(name).name != name or not path.is_file():
        raise CandidateError(f"{folder}: has no {FOLDER}/{brief(name)}/{_FILE}, the weights of a parameter. {_FIX}")
    held = content(f"{FOLDER}/{name}/{_FILE}")
    stored = held.get("param") if isinstance(held, dict) else held
    if not isinstance(stored, Stored):
        raise CandidateError(f"{path}: holds no tensor 'param', as files of a universal checkpoint do. {_FIX}")
    if len(stored.shape) == 1 and stored.numel == _numel(shape) and stored.row_major():
        return replace(stored, shape=shape, stride=row_major(shape))
    # Padding of a vocabulary is not in the file, so that it has fewer rows than the parameter in training.
    rows = isinstance(held, dict) and bool(held.get("vocab_tensor")) and stored.shape[1:] == shape[1:]
    if stored.shape != shape and not rows:
        raise CandidateError(f"{path}: holds a tensor of shape {stored.shape}, where the model has {shape}. {_FIX}")
    return stored


def require_same(folder: Path, trained: Mapping[str, Stored], in_model: Mapping[str, Stored]) -> None:
    """Refuse weights that are not those in the file of the model, judged by the first numbers of each.

    The converter of DeepSpeed exchanges parameters of one group if the run had `round_robin_gradients`.

    Raises:
        CandidateError: names the parameter.
    """
    for name, stored in trained.items():
        other = in_model.get(name)
        if other is None or other.shape != stored.shape or not other.dtype.is_floating_point:
            continue
        what, count = f"tensor {name!r}", min(stored.numel, _COMPARED)
        mine, theirs = torch.empty(count, dtype=stored.dtype), torch.empty(count, dtype=other.dtype)
        stored.read(0, mine, what)
        other.read(0, theirs, what)
        differ = ~torch.isclose(mine.double(), theirs.double(), rtol=_ROUNDING, atol=1e-6)
        if 2 * int(differ.sum()) > count:
            raise CandidateError(
                f"{folder / FOLDER / name / _FILE}: holds other numbers than the file of the model has for {name!r}: "
                "ds_to_universal.py exchanges parameters if the run had `round_robin_gradients`. Give the checkpoint "
                "of which it was made."
            )


def _numel(shape: Shape) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
