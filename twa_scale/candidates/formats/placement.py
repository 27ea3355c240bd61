"""The positions of the elements of stored tensors in files, for outputs that write into files of these formats."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch

from twa_scale.candidates.formats.boxes import BoxTensor, scatter
from twa_scale.candidates.formats.stored_tensors import ConcatenatedTensor, Record, Stored
from twa_scale.errors import CandidateError

Placeable = Stored | BoxTensor | ConcatenatedTensor
"""A tensor in files whose elements have positions that can be written."""


class Placed(NamedTuple):
    """Consecutive elements in a file."""

    record: Record
    first: int
    """The index of the first element in the record."""
    values: torch.Tensor
    """The elements, 1-D and contiguous."""


def storages(tensor: Placeable, description: str) -> list[Stored]:
    """Return the tensors in files of which a tensor consists.

    Raises:
        CandidateError: elements share their place in a file, as those of expanded tensors do.
    """
    match tensor:
        case Stored():
            parts = [tensor]
        case ConcatenatedTensor():
            parts = [_vector(*part, description) for part in tensor.ranges(0, prod(tensor.shape))]
        case _:
            parts = [tensor.stored(box) for box in tensor.boxes()]
    for stored in parts:
        if not _apart(stored):
            raise CandidateError(
                f"{stored.record.file.path}: {description} of shape {stored.shape} is saved with the strides "
                f"{stored.stride}, so that elements share their place in the file, and cannot be written there. Choose "
                "another --format (format=), or save the tensor after clone()."
            )
    return parts


def _vector(part: Stored, first: int, count: int, description: str) -> Stored:
    if not part.row_major():
        raise CandidateError(
            f"{part.record.file.path}: {description} is in a partition with the strides {part.stride}, which is not a "
            "vector, and cannot be written there. Copy the checkpoint again, or choose another --format (format=)."
        )
    return part.vector(first, count)


def placed(tensor: Placeable, start: int, values: torch.Tensor) -> Iterator[Placed]:
    """Yield the positions in files of the elements of a range.

    Args:
        tensor: a tensor in files.
        start: the first element of the range in the row-major flattening.
        values: the elements of the range, 1-D and contiguous, of the dtype of the tensor.
    """
    if isinstance(tensor, Stored):
        yield from _in_stored(tensor, start, values)
        return
    if isinstance(tensor, ConcatenatedTensor):
        done = 0
        for stored, begin, size in tensor.ranges(start, start + len(values)):
            yield from _in_stored(stored, begin, values[done : done + size])
            done += size
        return
    for box, first, count in tensor.within(start, start + len(values)):
        part = values
        if count < len(values):
            is_inside = torch.zeros(len(values), dtype=torch.bool)
            scatter(torch.ones(count, dtype=torch.bool), tensor.shape, box.starts, box.sizes, start, is_inside)
            part = values[is_inside]
        yield from _in_stored(tensor.stored(box), first, part)


def _in_stored(stored: Stored, start: int, values: torch.Tensor) -> Iterator[Placed]:
    if stored.row_major():
        yield Placed(stored.record, stored.first + start, values)
        return
    indices = torch.arange(start, start + len(values))
    positions = torch.full_like(indices, stored.first)
    for size, step in zip(reversed(stored.shape), reversed(stored.stride), strict=True):
        positions += indices % size * step
        indices //= size
    positions, order = positions.sort()
    values = values[order]
    ends = [*((positions.diff() != 1).nonzero().flatten() + 1).tolist(), len(values)]
    begin = 0
    for end in ends:
        yield Placed(stored.record, int(positions[begin]), values[begin:end])
        begin = end


def _apart(stored: Stored) -> bool:
    """Return whether each element has its own position. Strides that interleave dimensions are not accepted."""
    reach = 0
    dims = zip(stored.shape, stored.stride, strict=True)
    for size, step in sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: dim[1]):
        if step <= reach:
            return False
        reach += (size - 1) * step
    return True
