"""Averaging coefficients of a run, by candidate, depth and kind of tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from twa_scale.average.measures import effective_candidates, mean_coefficients
from twa_scale.base.names import without_common_folders
from twa_scale.candidates.steps import step_of

OUTSIDE = "outside of blocks"


@dataclass(frozen=True)
class Tensor:
    """A tensor that is averaged."""

    name: str
    group: int
    elements: int


@dataclass(frozen=True)
class Position:
    """The place of a tensor in the model: its block, and its kind, which is the same in all blocks."""

    block: str
    kind: str


@dataclass(frozen=True)
class Coefficients:
    """The averaging coefficients of n candidates in G groups."""

    labels: Sequence[str]
    """The labels of the n candidates."""
    groups: Sequence[str]
    values: torch.Tensor
    """a: (n, G), float64."""
    tensors: Sequence[Tensor]

    @cached_property
    def elements(self) -> list[int]:
        """The number of elements of each group; 1 if it is unknown."""
        counts = [0] * len(self.groups)
        for tensor in self.tensors:
            counts[tensor.group] += tensor.elements
        return counts if any(counts) else [1] * len(self.groups)

    @cached_property
    def names(self) -> list[str]:
        """The names of the candidates without their common folders."""
        return without_common_folders(self.labels)

    @cached_property
    def steps(self) -> list[int | None]:
        """The step in the name of each candidate."""
        return [step_of(Path(label)) for label in self.labels]

    @cached_property
    def means(self) -> list[float]:
        """The mean coefficient of each candidate over the elements."""
        return [float(mean) for mean in mean_coefficients(self.values, self.elements)]

    @cached_property
    def effective(self) -> float:
        """The effective number of candidates."""
        return effective_candidates(self.values, self.elements)

    def effective_of(self, group: int) -> float:
        """Return the effective number of candidates of one group."""
        return effective_candidates(self.values[:, group : group + 1], [1])

    @cached_property
    def negative(self) -> list[tuple[float, int, int]]:
        """The negative coefficients: value, candidate and group, the smallest first."""
        indices = (self.values < 0).nonzero().tolist()
        return sorted((float(self.values[i, g]), i, g) for i, g in indices)

    @cached_property
    def positions(self) -> dict[str, Position]:
        """The place of each tensor, by name."""
        return positions([tensor.name for tensor in self.tensors])

    def by(self, key: Callable[[Position], str]) -> dict[str, list[float]]:
        """Return the mean coefficients over the elements of tensors with the same `key`, in the order of the model."""
        members: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            members.setdefault(key(self.positions[tensor.name]), []).append(tensor)
        return {name: self._mean(tensors) for name, tensors in members.items()}

    def _mean(self, tensors: Sequence[Tensor]) -> list[float]:
        columns = self.values[:, [tensor.group for tensor in tensors]]
        return [float(mean) for mean in mean_coefficients(columns, [tensor.elements for tensor in tensors])]


def positions(names: Sequence[str]) -> dict[str, Position]:
    """Return the place of each tensor from its name. The first number in it is that of the block.

    `encoder.layers.3.experts.7.weight` is in block `encoder.layers.3`, and of the kind `experts.*.weight`. If there is
    one stack of blocks only, the block is named by its number.
    """
    split = {name: _split(name) for name in names}
    stacks = {stack for stack, number, _ in split.values() if number is not None}
    result = {}
    for name, (stack, number, kind) in split.items():
        block = OUTSIDE if number is None else number if len(stacks) == 1 else f"{stack}.{number}"
        result[name] = Position(block, kind)
    return result


def _split(name: str) -> tuple[str, str | None, str]:
    """Return the path of the stack, the number of the block and the kind of a tensor."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at + 1 == len(parts):
        return "", None, name
    return ".".join(parts[:at]), parts[at], ".".join("*" if part.isdigit() else part for part in parts[at + 1 :])


def merged(columns: Mapping[str, list[float]], limit: int) -> dict[str, list[float]]:
    """Return at most `limit` columns. Neighbors are merged into their mean, named after the first and the last."""
    size = -(-len(columns) // limit) if limit else 1
    if size <= 1:
        return dict(columns)
    names, result = list(columns), {}
    for start in range(0, len(names), size):
        group = names[start : start + size]
        label = group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}"
        result[label] = [sum(at) / len(group) for at in zip(*(columns[name] for name in group), strict=True)]
    return result
