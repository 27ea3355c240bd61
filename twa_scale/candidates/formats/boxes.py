"""Tensors that are stored as boxes: blocks of rows or columns, or the shards of a mesh of ranks."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from twa_scale.candidates.formats.stored_tensors import Stored
from twa_scale.errors import CandidateError

Shape = tuple[int, ...]
_MAX_SPLIT = 8  # dimensions that boxes may split; meshes of ranks have fewer


class Box(NamedTuple):
    """The elements [start, start + size) of every dimension, stored in row-major order."""

    starts: Shape
    sizes: Shape
    storage_index: tuple[int, ...]
    """Integers that identify the stored tensor, for example file number and offset."""


class BoxTensor:
    """A tensor that is stored as disjoint boxes.

    Args:
        shape: the shape of the whole tensor.
        dtype: the dtype of all boxes.
        boxes: the boxes, in any order.
        find: returns the stored tensor of a box; called when the box is first read.
        description: the name of the tensor in error messages.

    Raises:
        CandidateError: the boxes do not cover each element exactly once.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, boxes: Sequence[Box], find: Callable[[Box], Stored], description: str
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._find = lru_cache(maxsize=None)(find)
        boxes = [box for box in boxes if prod(box.sizes)]
        are_inside = all(
            len(box.starts) == len(box.sizes) == len(shape)
            and all(0 <= a <= a + n <= size for a, n, size in zip(box.starts, box.sizes, shape, strict=True))
            for box in boxes
        )
        if min(shape, default=0) < 0 or not are_inside or not _covers_once(boxes, shape):
            num_stored = sum(prod(box.sizes) for box in boxes)
            raise CandidateError(
                f"{description}: its parts hold {num_stored} elements at {[box.starts for box in boxes[:4]]} and do "
                f"not tile its shape {shape}. Save the checkpoint again from all ranks, or leave this candidate out."
            )
        # One flat array, because a checkpoint of many ranks has hundreds of thousands of boxes, and an object for each
        # would take a kilobyte.
        self._numbers = array("q", [i for box in boxes for i in (*box.starts, *box.sizes, *box.storage_index)])
        self._width = len(self._numbers) // max(1, len(boxes))

    def read(self, start: int, out: torch.Tensor, description: str) -> None:
        """Fill `out` with the elements from `start` on, in row-major order."""
        total = 0
        for box, first, count in self.within(start, start + len(out)):
            stored = self.stored(box)
            if count == len(out):
                stored.read(first, out, description)
            elif box.sizes[1:] == self.shape[1:]:  # whole rows stay together
                begin = max(0, box.starts[0] * prod(self.shape[1:]) - start)
                stored.read(first, out[begin : begin + count], description)
            else:
                values = torch.empty(count, dtype=self.dtype)
                stored.read(first, values, description)
                scatter(values, self.shape, box.starts, box.sizes, start, out)
            total += count
        assert total == len(out)

    def within(self, start: int, stop: int) -> Iterator[tuple[Box, int, int]]:
        """Yield each box that has elements of a range: the first of them in the box, and their number.

        Both box and tensor are in row-major order, so a range of the tensor is one range of each box.
        """
        for box in self.boxes():
            first = count_before(self.shape, box.starts, box.sizes, start)
            if count := count_before(self.shape, box.starts, box.sizes, stop) - first:
                yield box, first, count

    def boxes(self) -> Iterator[Box]:
        """Yield the boxes that are not empty."""
        dims = len(self.shape)
        for i in range(0, len(self._numbers), max(1, self._width)):
            row = tuple(self._numbers[i : i + self._width])
            yield Box(row[:dims], row[dims : 2 * dims], row[2 * dims :])

    def stored(self, box: Box) -> Stored:
        """Return the stored tensor of a box.

        Raises:
            CandidateError: it has another shape or dtype.
        """
        stored = self._find(box)
        if (stored.shape, stored.dtype) != (box.sizes, self.dtype):
            raise CandidateError(
                f"{stored.record.file.path}: holds {stored.dtype} of shape {stored.shape}, but the metadata of the "
                f"checkpoint has {self.dtype} of shape {box.sizes}. All files must come from the same save: copy it "
                "again."
            )
        return stored


def _covers_once(boxes: Sequence[Box], shape: Shape) -> bool:
    """Return whether boxes inside a tensor cover each element exactly once.

    The number of boxes that cover an element is a function on the index grid, and its mixed differences determine it.
    The mixed differences of one box are +1 and -1 at its corners. So the boxes cover each element once if and only if
    the signed corners of all boxes sum to those of the tensor. Dimensions that no box splits are ignored.
    """
    split = [dim for dim, size in enumerate(shape) if any(box.sizes[dim] != size for box in boxes)]
    if len(split) > _MAX_SPLIT:
        return False
    sums: Counter[Shape] = Counter()
    _add_corners(sums, [0] * len(split), [shape[dim] for dim in split], -1 if prod(shape) else 0)
    for box in boxes:
        _add_corners(sums, [box.starts[dim] for dim in split], [box.sizes[dim] for dim in split], 1)
    return not any(sums.values())


def _add_corners(sums: Counter[Shape], starts: Sequence[int], sizes: Sequence[int], times: int) -> None:
    ends = [((start, 1), (start + size, -1)) for start, size in zip(starts, sizes, strict=True)]
    for corner in product(*ends):
        sums[tuple(index for index, _ in corner)] += times * prod(sign for _, sign in corner)


def count_before(shape: Shape, starts: Shape, sizes: Shape, position: int) -> int:
    """Return how many elements of a box come before `position` in the row-major flattening of the tensor."""
    count, row, box_row = 0, prod(shape), prod(sizes)
    if position >= row:
        return box_row
    for size, start, box_size in zip(shape, starts, sizes, strict=True):
        row, box_row = row // size, box_row // box_size
        index, position = divmod(position, row)
        count += min(max(index - start, 0), box_size) * box_row
        if not start <= index < start + box_size:
            return count
    return count


def scatter(values: torch.Tensor, shape: Shape, starts: Shape, sizes: Shape, start: int, out: torch.Tensor) -> int:
    """Copy elements of a box to their positions in `out`, and return their number.

    The range is split recursively into a partial row, whole rows and a partial row.

    Args:
        values: 1-D; the elements of the box that are in the range of `out`, in row-major order; more may follow.
        shape: the shape of the whole tensor.
        starts: the first index of the box in every dimension.
        sizes: the size of the box in every dimension.
        start: the first element of `out` in the row-major flattening of the tensor.
        out: 1-D; elements [start, start + len(out)) of the flattening.
    """
    if not shape:
        out.copy_(values[:1])
        return 1
    row, taken = prod(shape[1:]), 0

    def part(index: int, offset: int, begin: int, stop: int) -> int:
        if begin == stop or not starts[0] <= index < starts[0] + sizes[0]:
            return 0
        return scatter(values[taken:], shape[1:], starts[1:], sizes[1:], offset, out[begin:stop])

    first, offset = divmod(start, row)
    head = min(-offset % row, len(out))
    if head:
        taken += part(first, offset, 0, head)
        first += 1
    rows = (len(out) - head) // row
    low, high = max(first, starts[0]), min(first + rows, starts[0] + sizes[0])
    if low < high:
        view = out[head : head + rows * row].view(rows, *shape[1:])[low - first : high - first]
        for dim, (begin, size) in enumerate(zip(starts[1:], sizes[1:], strict=True), 1):
            view = view.narrow(dim, begin, size)
        view.copy_(values[taken : taken + view.numel()].view(view.shape))
        taken += view.numel()
    return taken + part(first + rows, 0, head + rows * row, len(out))
