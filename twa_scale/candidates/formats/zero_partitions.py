"""The positions of a parameter's elements in the flat partitions of ZeRO."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import NoReturn

from twa_scale.candidates.formats.stored_tensors import ConcatenatedTensor, Stored
from twa_scale.errors import CandidateError

Shapes = Mapping[str, tuple[int, ...]]
Ranges = Iterator[tuple[Stored, int, int]]
Partitions = Callable[[int], Sequence[Stored]]
"""A function that returns the flat partitions of a rank: one per parameter group (ZeRO-1, 2) or sub-group (ZeRO-3)."""


def split_groups(
    shapes: Sequence[Shapes], paddings: Sequence[Sequence[int]] | None, partitions: Partitions, world: int, label: str
) -> dict[str, ConcatenatedTensor]:
    """Return the parameters of ZeRO-1 and 2.

    The parameters of a group are concatenated into one vector, which is split into equal partitions, one per rank. The
    last partitions are saved without the padding at the end.

    Args:
        shapes: the shapes of the parameters of each group, in the order of the vector.
        paddings: the number of unused elements after each parameter, by group.
        partitions: returns the partitions of a rank.
        world: the number of ranks.
        label: the name of the checkpoint in error messages.

    Raises:
        CandidateError: the partitions are too small or too large for these shapes.
    """
    first = partitions(0)
    if len(first) != len(shapes):
        _refuse(label, f"{len(shapes)} parameter groups", f"{len(first)} partitions a rank")
    tensors: dict[str, ConcatenatedTensor] = {}
    for group, group_shapes in enumerate(shapes):
        size = first[group].numel
        padding = paddings[group] if paddings else [0] * len(group_shapes)
        if len(padding) != len(group_shapes):
            _refuse(label, f"{len(group_shapes)} parameters in group {group}", f"paddings of {len(padding)}")
        begin = 0
        for (name, shape), unused in zip(group_shapes.items(), padding, strict=True):
            locate = _locator(partitions, group, size, begin, label)
            tensors[name] = ConcatenatedTensor(tuple(shape), first[group].dtype, locate)
            begin += prod(shape) + unused
        # The vector is padded to a multiple of 2 * world, except if rank 0 holds all of it.
        if size != begin and not 0 <= world * size - begin < 2 * world:
            _refuse(label, f"{begin} elements in group {group}", f"{world} partitions of {size}")
    return tensors


def _locator(partitions: Partitions, group: int, size: int, begin: int, label: str) -> Callable[[int, int], Ranges]:
    def ranges(start: int, stop: int) -> Ranges:
        position = begin + start
        while position < begin + stop:
            rank, offset = divmod(position, size)
            stored = partitions(rank)[group]
            count = min(begin + stop - position, size - offset)
            if offset + count > stored.numel:
                _refuse(label, f"{offset + count} elements of group {group} on rank {rank}", f"{stored.numel}")
            yield stored, offset, count
            position += count

    return ranges


def split_parameters(shapes: Shapes, partitions: Partitions, world: int, label: str) -> dict[str, ConcatenatedTensor]:
    """Return the parameters of ZeRO-3. Each is split into equal parts; a rank holds its parts of all, concatenated.

    Raises:
        CandidateError: the partitions do not fit these shapes.
    """
    parts = [-(-prod(shape) // world) for shape in shapes.values()]
    begins = [0, *accumulate(parts)]
    vectors = _RankVectors(partitions, begins[-1], label)
    vectors.sub_groups(0)
    dtype = partitions(0)[0].dtype if shapes else None
    tensors = {}
    for (name, shape), part, begin in zip(shapes.items(), parts, begins, strict=False):
        assert dtype is not None
        tensors[name] = ConcatenatedTensor(tuple(shape), dtype, _cut(vectors.ranges, part, begin))
    return tensors


def split_fragments(
    shapes: Shapes, fragments: Callable[[int], Mapping[str, Stored]], world: int
) -> dict[str, ConcatenatedTensor]:
    """Return the frozen parameters of ZeRO-3. Each rank saves its parts of them by name."""
    local = fragments(0)

    def one(name: str, shape: tuple[int, ...]) -> ConcatenatedTensor:
        def ranges(rank: int, start: int, stop: int) -> Ranges:
            yield fragments(rank)[name], start, stop - start

        return ConcatenatedTensor(tuple(shape), local[name].dtype, _cut(ranges, -(-prod(shape) // world), 0))

    return {name: one(name, shape) for name, shape in shapes.items()}


def _cut(local: Callable[[int, int, int], Ranges], part: int, begin: int) -> Callable[[int, int], Ranges]:
    """Return a function that yields the ranges of a parameter.

    Args:
        local: yields the ranges of (rank, start, stop) in the vector of a rank.
        part: the number of elements of the parameter on each rank.
        begin: the position of the parameter in the vector of each rank.
    """

    def ranges(start: int, stop: int) -> Ranges:
        while start < stop:
            rank, offset = divmod(start, part)
            count = min(stop - start, part - offset)
            yield from local(rank, begin + offset, begin + offset + count)
            start += count

    return ranges


class _RankVectors:
    """For each rank, its sub-groups concatenated to one vector."""

    def __init__(self, partitions: Partitions, length: int, label: str) -> None:
        self._partitions, self._length, self._label = partitions, length, label

    def sub_groups(self, rank: int) -> tuple[Sequence[Stored], list[int]]:
        """Return the sub-groups of a rank and the position of each in the vector."""
        groups = self._partitions(rank)
        begins = [0, *accumulate(group.numel for group in groups)]
        if begins[-1] != self._length:
            _refuse(self._label, f"{self._length} elements on rank {rank}", f"{begins[-1]}")
        return groups, begins

    def ranges(self, rank: int, start: int, stop: int) -> Ranges:
        groups, begins = self.sub_groups(rank)
        while start < stop:
            i = bisect_right(begins, start) - 1
            count = min(stop, begins[i + 1]) - start
            yield groups[i], start - begins[i], count
            start += count


def _refuse(label: str, expected: str, actual: str) -> NoReturn:
    raise CandidateError(
        f"{label}: its parameter shapes need {expected}, but the optimizer files hold {actual}. All files must come "
        "from the same save with the same number of ranks: copy the checkpoint again, or leave it out."
    )
