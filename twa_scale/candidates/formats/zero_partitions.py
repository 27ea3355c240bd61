"""Where ZeRO keeps the elements of a parameter: in which rank's flat partition, and at which place of it."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import NoReturn

from twa_scale.candidates.formats.stored_tensors import Joined, Stored
from twa_scale.errors import CandidateError

Shapes = Mapping[str, tuple[int, ...]]
Ranges = Iterator[tuple[Stored, int, int]]
Partitions = Callable[[int], Sequence[Stored]]
"""Given a rank, returns its flat partitions: one for each parameter group (ZeRO-1, 2) or sub-group (ZeRO-3)."""


def split_groups(
    shapes: Sequence[Shapes], paddings: Sequence[Sequence[int]] | None, partitions: Partitions, world: int, label: str
) -> dict[str, Joined]:
    """Return the parameters of ZeRO-1 and 2.

    The parameters of a group follow each other in one vector, which is cut into equal partitions, one a rank; the last
    ones lack what is only padding.

    Args:
        shapes: of the parameters of each group, in the order of the vector.
        paddings: unused elements after each parameter, by group.
        partitions: of a rank.
        world: number of ranks.
        label: what messages call the checkpoint.

    Raises:
        CandidateError: partitions that are too small or too large for these shapes.
    """
    first = partitions(0)
    if len(first) != len(shapes):
        _refuse(label, f"{len(shapes)} parameter groups", f"{len(first)} partitions a rank")
    tensors: dict[str, Joined] = {}
    for group, held in enumerate(shapes):
        size = first[group].numel
        padding = paddings[group] if paddings else [0] * len(held)
        if len(padding) != len(held):
            _refuse(label, f"{len(held)} parameters in group {group}", f"paddings of {len(padding)}")
        begin = 0
        for (name, shape), unused in zip(held.items(), padding, strict=True):
            locate = _locator(partitions, group, size, begin, label)
            tensors[name] = Joined(tuple(shape), first[group].dtype, locate)
            begin += prod(shape) + unused
        # The vector is padded to a multiple of 2 * world; a rank 0 that holds all of it saves it without.
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


def split_parameters(shapes: Shapes, partitions: Partitions, world: int, label: str) -> dict[str, Joined]:
    """Return the parameters of ZeRO-3: each is cut into equal parts, and a rank keeps its parts one after another.

    Raises:
        CandidateError: partitions that do not fit these shapes.
    """
    parts = [-(-prod(shape) // world) for shape in shapes.values()]
    begins = [0, *accumulate(parts)]
    rows = _Rows(partitions, begins[-1], label)
    rows.of(0)
    dtype = partitions(0)[0].dtype if shapes else None
    tensors = {}
    for (name, shape), part, begin in zip(shapes.items(), parts, begins, strict=False):
        assert dtype is not None
        tensors[name] = Joined(tuple(shape), dtype, _cut(rows.ranges, part, begin))
    return tensors


def split_fragments(shapes: Shapes, fragments: Callable[[int], Mapping[str, Stored]], world: int) -> dict[str, Joined]:
    """Return the frozen parameters of ZeRO-3, of which each rank saves its part by name."""
    held = fragments(0)

    def one(name: str, shape: tuple[int, ...]) -> Joined:
        def ranges(rank: int, start: int, stop: int) -> Ranges:
            yield fragments(rank)[name], start, stop - start

        return Joined(tuple(shape), held[name].dtype, _cut(ranges, -(-prod(shape) // world), 0))

    return {name: one(name, shape) for name, shape in shapes.items()}


def _cut(local: Callable[[int, int, int], Ranges], part: int, begin: int) -> Callable[[int, int], Ranges]:
    """Return the ranges of a parameter of which each rank keeps `part` elements, from its element `begin` on."""

    def ranges(start: int, stop: int) -> Ranges:
        while start < stop:
            rank, offset = divmod(start, part)
            count = min(stop - start, part - offset)
            yield from local(rank, begin + offset, begin + offset + count)
            start += count

    return ranges


class _Rows:
    """The sub-groups of every rank as one long vector a rank."""

    def __init__(self, partitions: Partitions, length: int, label: str) -> None:
        self._partitions, self._length, self._label = partitions, length, label

    def of(self, rank: int) -> tuple[Sequence[Stored], list[int]]:
        """Return the sub-groups of a rank and where each starts."""
        groups = self._partitions(rank)
        begins = [0, *accumulate(group.numel for group in groups)]
        if begins[-1] != self._length:
            _refuse(self._label, f"{self._length} elements on rank {rank}", f"{begins[-1]}")
        return groups, begins

    def ranges(self, rank: int, start: int, stop: int) -> Ranges:
        groups, begins = self.of(rank)
        while start < stop:
            i = bisect_right(begins, start) - 1
            count = min(stop, begins[i + 1]) - start
            yield groups[i], start - begins[i], count
            start += count


def _refuse(label: str, wanted: str, found: str) -> NoReturn:
    raise CandidateError(
        f"{label}: its parameter shapes ask for {wanted}, but the optimizer files hold {found}. All files must be of "
        "one saving, by one number of ranks: copy the checkpoint again, or leave it out."
    )
