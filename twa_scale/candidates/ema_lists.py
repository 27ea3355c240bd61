"""Lists of tensors without names, as EMA classes save them. Names come from the order of the model's parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from twa_scale.candidates.buffers import is_statistic

T = TypeVar("T")
Shape = tuple[int, ...]
_ITEM = re.compile(r"\[(\d+)\]")


def item_name(index: int) -> str:
    """Return the name for an item of a list, which has no name in the file."""
    return f"[{index}]"


def items_of(tensors: Mapping[str, T]) -> list[T] | None:
    """Return the items of a list in order, or None if `tensors` has names."""
    numbers = {int(match[1]): value for name, value in tensors.items() if (match := _ITEM.fullmatch(name))}
    return [numbers[i] for i in sorted(numbers)] if len(numbers) == len(tensors) else None


def parameters_of(names: Sequence[str]) -> list[str]:
    """Return the names of the parameters in a state dict, in its order: all names except buffers of norms."""
    return [name for name in names if not is_statistic(name) and name.rpartition(".")[2] != "num_batches_tracked"]


def mismatch(items: Sequence[T], named: Mapping[str, Shape], shape_of: Callable[[T], Shape]) -> str | None:
    """Return the reason why the items of a list cannot be the parameters `named` in order, or None if they can."""
    if len(items) != len(named):
        return f"it has {len(items)} tensors, and there are {len(named)} parameters"
    for i, (value, (name, shape)) in enumerate(zip(items, named.items(), strict=True)):
        if shape_of(value) != shape:
            return f"its tensor {i} has shape {shape_of(value)}, and {name!r} has {shape}"
    return None
