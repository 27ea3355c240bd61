"""Stored tensors that stack those of all layers, as in Megatron-LM. Their names lack the number of the layer."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from math import prod
from typing import Any

from twa_scale.candidates.prefixes import Tensors
from twa_scale.errors import CandidateError

_MAX_NUMBERS = 4  # numbers in a name


def unstacked(tensors: Tensors, known: Collection[str], label: str) -> dict[str, Tensors]:
    """Return the tensors of the model that stored tensors stack, by the stored name.

    `layers.w` of shape (2, 3) holds `layers.0.w` and `layers.1.w`, of shape (3,), if the model has these two and no
    other. Tensors of the model that are stored themselves are left out.

    Args:
        tensors: the stored tensors by name.
        known: the names of the model's parameters and buffers.
        label: the candidate, for messages.

    Raises:
        CandidateError: two stored tensors contain the same tensor of the model.
    """
    grids: dict[str, dict[tuple[int, ...], str]] = defaultdict(dict)
    for name in known:
        if name not in tensors:
            for stacked, index in _without_numbers(name):
                if stacked in tensors:
                    grids[stacked][index] = name
    stacks: dict[str, Tensors] = {}
    for stacked, names in grids.items():
        tensor, dims = tensors[stacked], len(next(iter(names)))
        sizes = tuple(tensor.shape[:dims])
        is_complete = all(len(index) == dims and all(map(int.__lt__, index, sizes)) for index in names)
        if is_complete and len(sizes) == dims and len(names) == prod(sizes):
            stacks[stacked] = {name: _layer_of(tensor, index) for index, name in names.items()}
    _require_one_source(stacks, label)
    return stacks


def _require_one_source(stacks: Mapping[str, Collection[str]], label: str) -> None:
    sources: dict[str, str] = {}
    for stacked, names in stacks.items():
        for name in names:
            if (other := sources.setdefault(name, stacked)) != stacked:
                raise CandidateError(
                    f"{label}: {other!r} and {stacked!r} both hold {name!r} of the model, as stacked tensors. Name one "
                    "of them in `ignore`."
                )


def _without_numbers(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield a name without some of the numbers in it, and those numbers."""
    parts = name.split(".")
    positions = [i for i, part in enumerate(parts) if part.isascii() and part.isdecimal()][:_MAX_NUMBERS]
    for count in range(1, len(positions) + 1):
        for left_out in combinations(positions, count):
            rest = ".".join(part for i, part in enumerate(parts) if i not in left_out)
            yield rest, tuple(int(parts[i]) for i in left_out)


def _layer_of(tensor: Any, index: tuple[int, ...]) -> Any:
    for i in index:
        tensor = tensor.select(0, i)
    return tensor
