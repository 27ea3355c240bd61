"""Tensors that consist of segments of other tensors: renamed, concatenated, stacked, split or transposed ones."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product
from math import prod
from typing import NamedTuple

import torch

from twa_scale.base.spans import Span


class Position(NamedTuple):
    """The positions of the elements of a segment in the row-major flattening of one tensor."""

    name: str
    first: int
    strides: tuple[int, ...]
    """The distance of neighboring elements in each dimension of the segment, in elements."""


@dataclass(frozen=True)
class Segment:
    """A box of elements that two tensors share. `target` and `source` are its positions in them."""

    sizes: tuple[int, ...]
    target: Position
    source: Position

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.sizes)

    @property
    def stop(self) -> int:
        """The position in the target after the last element."""
        return self.target.first + reach(self.sizes, self.target.strides)

    def reversed(self) -> "Segment":
        """Return the segment with both tensors exchanged."""
        return Segment(self.sizes, self.source, self.target)

    def within(self, start: int, stop: int) -> Iterator["Segment"]:
        """Yield disjoint parts whose elements are in [start, stop) of the target."""
        by_stride = sorted(range(len(self.sizes)), key=lambda dim: -self.target.strides[dim])
        yield from self._ordered(by_stride)._within(start, stop, 0)

    def _within(self, start: int, stop: int, dim: int) -> Iterator["Segment"]:
        """Divide dimension `dim`, and later ones if needed. The strides of the target never increase."""
        first = self.target.first
        if start <= first and self.stop <= stop:
            yield self
            return
        if dim == len(self.sizes) or stop <= first or self.stop <= start:
            return
        step, inner = self.target.strides[dim], reach(self.sizes[dim + 1 :], self.target.strides[dim + 1 :])
        # The indices that are completely inside, and one on each side that may be partly inside.
        low = min(max(-(-(start - first) // step), 0), self.sizes[dim])
        high = max(min((stop - inner - first) // step + 1, self.sizes[dim]), low)
        if low > 0:
            yield from self._part(dim, low - 1, 1)._within(start, stop, dim + 1)
        if low < high:
            yield self._part(dim, low, high - low)
        if high < self.sizes[dim]:
            yield from self._part(dim, high, 1)._within(start, stop, dim + 1)

    def _part(self, dim: int, index: int, size: int) -> "Segment":
        def moved(position: Position) -> Position:
            return position._replace(first=position.first + index * position.strides[dim])

        sizes = (*self.sizes[:dim], size, *self.sizes[dim + 1 :])
        return Segment(sizes, moved(self.target), moved(self.source))

    def _ordered(self, dims: Sequence[int]) -> "Segment":
        def ordered(position: Position) -> Position:
            return position._replace(strides=tuple(position.strides[dim] for dim in dims))

        return Segment(tuple(self.sizes[dim] for dim in dims), ordered(self.target), ordered(self.source))

    def in_source_order(self) -> "Segment":
        """Return the segment with the dimensions in the order of the source, without those of size 1."""
        dims = [dim for dim, size in enumerate(self.sizes) if size != 1]
        return self._ordered(sorted(dims, key=lambda dim: -self.source.strides[dim]))

    def of(self, values: torch.Tensor, start: int) -> torch.Tensor:
        """Return the view of its elements in `values`, which contain the elements of the target from `start` on."""
        return values.as_strided(self.sizes, self.target.strides, values.storage_offset() + self.target.first - start)

    def spans(self) -> Iterator[Span]:
        """Yield its spans in the source, in the order of its elements. The segment must be in the order of the source.

        All spans have the same length.
        """
        dims, run = len(self.sizes), 1
        while dims and self.source.strides[dims - 1] == run:
            dims -= 1
            run *= self.sizes[dims]
        evenly, stride = (self.sizes[dims - 1], self.source.strides[dims - 1]) if dims else (1, 0)
        outer = max(dims - 1, 0)
        for index in product(*(range(size) for size in self.sizes[:outer])):
            first = self.source.first + sum(
                i * step for i, step in zip(index, self.source.strides[:outer], strict=True)
            )
            if evenly == 1:
                yield Span(self.source.name, first, first + run)
            else:
                yield Span(self.source.name, first, first + (evenly - 1) * stride + run, run, stride)


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Return the number of positions from the first to the last element of a box."""
    return 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))


class Segments:
    """All segments of one tensor, found by position.

    Args:
        segments: segments with disjoint elements. Empty ones are left out.
    """

    def __init__(self, segments: Iterable[Segment]) -> None:
        self._segments = sorted(
            (segment for segment in segments if segment.numel), key=lambda segment: segment.target.first
        )
        self._starts = [segment.target.first for segment in self._segments]
        self._stops = list(accumulate((segment.stop for segment in self._segments), max))

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def within(self, start: int, stop: int) -> Iterator[Segment]:
        """Yield the parts of segments whose elements are in [start, stop)."""
        first, last = bisect_right(self._stops, start), bisect_left(self._starts, stop)
        for segment in self._segments[first:last]:
            yield from segment.within(start, stop)

    def spans(self, span: Span, values: torch.Tensor) -> Iterator[tuple[Span, torch.Tensor]]:
        """Yield the spans of other tensors that a span of this tensor consists of, with their values.

        Args:
            span: a span of this tensor.
            values: the elements of the span, 1-D.
        """
        done = 0
        for start, stop in span.runs():
            run = values[done : done + stop - start]
            for part in self.within(start, stop):
                part = part.in_source_order()
                flat = part.of(run, start).reshape(-1)
                at = 0
                for other in part.spans():
                    yield other, flat[at : at + len(other)]
                    at += len(other)
            done += stop - start


def renamed(segment: Segment, name: str) -> Segment:
    """Return a segment with another name of the target."""
    return replace(segment, target=segment.target._replace(name=name))
