"""A tensor that is made of segments of other tensors: renamed, concatenated, stacked, split, or transposed."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

import torch

from twa_scale.base.spans import Span


class Place(NamedTuple):
    """Where the elements of a segment are in the row-major flattening of one tensor."""

    name: str
    first: int
    strides: tuple[int, ...]
    """Distance of neighbours in each dimension of the segment, in elements."""


@dataclass(frozen=True)
class Segment:
    """Elements that two tensors have in common, as a box of `sizes`."""

    sizes: tuple[int, ...]
    here: Place
    there: Place

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.sizes)

    @property
    def stop(self) -> int:
        """The position here that follows the last element."""
        return self.here.first + reach(self.sizes, self.here.strides)

    def reversed(self) -> "Segment":
        """Return the segment seen from the other tensor."""
        return Segment(self.sizes, self.there, self.here)

    def within(self, start: int, stop: int) -> Iterator["Segment"]:
        """Yield the parts whose elements are in [start, stop) here; they are disjoint."""
        by_stride = sorted(range(len(self.sizes)), key=lambda dim: -self.here.strides[dim])
        yield from self._ordered(by_stride)._within(start, stop, 0)

    def _within(self, start: int, stop: int, dim: int) -> Iterator["Segment"]:
        """Cut dimension `dim`, and those after it where they are reached; strides here never increase."""
        first = self.here.first
        if start <= first and self.stop <= stop:
            yield self
            return
        if dim == len(self.sizes) or stop <= first or self.stop <= start:
            return
        step, inner = self.here.strides[dim], reach(self.sizes[dim + 1 :], self.here.strides[dim + 1 :])
        # Indices of which everything is inside, and one on each side of which a part may be.
        low = min(max(-(-(start - first) // step), 0), self.sizes[dim])
        high = max(min((stop - inner - first) // step + 1, self.sizes[dim]), low)
        if low > 0:
            yield from self._part(dim, low - 1, 1)._within(start, stop, dim + 1)
        if low < high:
            yield self._part(dim, low, high - low)
        if high < self.sizes[dim]:
            yield from self._part(dim, high, 1)._within(start, stop, dim + 1)

    def _part(self, dim: int, index: int, size: int) -> "Segment":
        def moved(place: Place) -> Place:
            return place._replace(first=place.first + index * place.strides[dim])

        sizes = (*self.sizes[:dim], size, *self.sizes[dim + 1 :])
        return Segment(sizes, moved(self.here), moved(self.there))

    def _ordered(self, dims: Sequence[int]) -> "Segment":
        def ordered(place: Place) -> Place:
            return place._replace(strides=tuple(place.strides[dim] for dim in dims))

        return Segment(tuple(self.sizes[dim] for dim in dims), ordered(self.here), ordered(self.there))

    def in_order_there(self) -> "Segment":
        """Return the segment with dimensions in the order of the other tensor, those of one element left out."""
        dims = [dim for dim, size in enumerate(self.sizes) if size != 1]
        return self._ordered(sorted(dims, key=lambda dim: -self.there.strides[dim]))

    def of(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Return the view of its elements in `values`, which are those from `start` on here."""
        return values.as_strided(self.sizes, self.here.strides, values.storage_offset() + self.here.first - start)

    def spans(self) -> Iterator[Span]:
        """Yield what it is there, as spans, in the order of its elements; for a segment that is in order there.

        All are of the same length.
        """
        dims, run = len(self.sizes), 1
        while dims and self.there.strides[dims - 1] == run:
            dims -= 1
            run *= self.sizes[dims]
        evenly, stride = (self.sizes[dims - 1], self.there.strides[dims - 1]) if dims else (1, 0)
        outer = max(dims - 1, 0)
        for index in product(*(range(size) for size in self.sizes[:outer])):
            first = self.there.first + sum(i * step for i, step in zip(index, self.there.strides[:outer], strict=True))
            if evenly == 1:
                yield Span(self.there.name, first, first + run)
            else:
                yield Span(self.there.name, first, first + (evenly - 1) * stride + run, run, stride)


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of positions from the first element of a box to its last."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))


class Segments:
    """All segments of one tensor, found by position.

    Args:
        segments: whose elements here are disjoint; empty ones are left out.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._segments = sorted((one for one in segments if one.numel), key=lambda one: one.here.first)
        self._starts = [one.here.first for one in self._segments]
        self._stops = list(accumulate((one.stop for one in self._segments), max))

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def within(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield the parts of segments whose elements are in [start, stop)."""
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        for segment in self._segments[first:last]:
            yield from segment.within(start, stop)

    def spans(self, span: Span, values: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
        """Yield what a span of this tensor is in the other tensors, and the values of each.

        Args:
            span: of this tensor.
            values: 1-D, its elements.
        """
        done = 0
        for start, stop in span.runs():
            run = values[done : done + stop - start]
            for part in self.within(start, stop):
                part = part.in_order_there()
                held = part.of(run, start).reshape(-1)
                at = 0
                for other in part.spans():
                    yield other, held[at : at + len(other)]
                    at += len(other)
            done += stop - start


def renamed(segment: Segment, name: str) -> Segment:
    """Return a segment of which the tensor here has another name."""
    return replace(segment, here=segment.here._replace(name=name))
