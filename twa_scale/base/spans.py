"""Spans: the ranges of a tensor's row-major flattening that a rank holds."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Span:
    """A set of elements of the row-major flattening of tensor `name`, contiguous in the memory of one rank.

    With `run` 0 it is the range [start, stop). Otherwise it consists of runs of `run` elements that start at `start`
    and every `stride` elements after it, up to `stop`, as for a matrix that is sharded by columns.
    """

    name: str
    start: int
    stop: int
    run: int = 0
    stride: int = 0

    def __len__(self) -> int:
        return self.stop - self.start if not self.run else self._count() * self.run

    def _count(self) -> int:
        return -(-(self.stop - self.start) // self.stride)

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the contiguous ranges of the flattening that elements [start, stop) of this span occupy, in order."""
        stop = len(self) if stop is None else stop
        if not self.run:
            yield self.start + start, self.start + stop
            return
        while start < stop:
            count = min(self.run - start % self.run, stop - start)
            first = self.element(start)
            yield first, first + count
            start += count

    def element(self, i: int) -> int:
        """Return the position of the i-th element of this span in the flattening."""
        return self.start + i if not self.run else self.start + i // self.run * self.stride + i % self.run

    def pieces(self, size: int) -> Iterator[tuple[int, "Span"]]:
        """Yield consecutive spans of at most `size` elements that tile this one, with their offsets in it."""
        if not self.run:
            for start in range(self.start, self.stop, size):
                yield start - self.start, Span(self.name, start, min(start + size, self.stop))
        elif self.run > size:
            for i, (start, stop) in enumerate(self.runs()):
                for offset, piece in Span(self.name, start, stop).pieces(size):
                    yield i * self.run + offset, piece
        else:
            many = size // self.run * self.run
            for i in range(0, len(self), many):
                yield i, self.part(i, min(i + many, len(self)))

    def part(self, start: int, stop: int) -> "Span":
        """Return elements [start, stop) of this span. In a strided span both have to be multiples of `run`."""
        if not self.run:
            return Span(self.name, self.start + start, self.start + stop)
        if start == stop:
            return Span(self.name, 0, 0)
        first, last = (self.start + i // self.run * self.stride for i in (start, stop - self.run))
        return Span(self.name, first, last + self.run, self.run, self.stride)

    def split(self, size: int) -> Iterator[tuple[int, "Span"]]:
        """Yield the part of this span in each part of `size` elements of the tensor, with its offset in this span.

        Parts without elements are left out. For an empty span, the span itself is yielded. Runs of a strided span must
        not cross a multiple of `size`.
        """
        if not len(self):
            yield 0, self
            return
        for part in range(self.start // size, -(-self.stop // size)):
            start, stop = (self._before(bound) for bound in (part * size, (part + 1) * size))
            if start < stop:
                yield start, self.part(start, stop)

    def _before(self, position: int) -> int:
        """Return the number of elements of this span before a position in the flattening that is in no run."""
        if not self.run:
            return min(max(position, self.start), self.stop) - self.start
        return min(max(-(-(position - self.start) // self.stride), 0), self._count()) * self.run


def block(name: str, shape: tuple[int, ...], starts: tuple[int, ...], sizes: tuple[int, ...]) -> Span:
    """Return the span of a box of a tensor.

    Args:
        name: the name of the tensor.
        shape: its shape.
        starts: the first index of the box in each dimension.
        sizes: the size of the box in each dimension.

    Raises:
        ValueError: the box does not consist of evenly spaced runs, for example if it is a part of dimensions 1 and 2.
    """
    if 0 in sizes:
        return Span(name, 0, 0)
    divided = [d for d, size in enumerate(shape) if size != sizes[d]]
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    start = sum(i * stride for i, stride in zip(starts, strides, strict=True))
    inner = max(divided, default=0)
    if not divided or all(sizes[d] == 1 for d in range(inner)):
        return Span(name, start, start + prod(sizes))
    outer = next(d for d in range(inner) if sizes[d] != 1)
    if any(sizes[d] != shape[d] for d in range(outer + 1, inner)):
        raise ValueError(f"{name}: {sizes} elements from {starts} of {shape} are not evenly spaced runs")
    run, stride = prod(sizes[inner:]), prod(shape[inner:])
    count = prod(sizes[:inner])
    return Span(name, start, start + (count - 1) * stride + run, run, stride)


def share(numel: int, rank: int, size: int) -> tuple[int, int]:
    """Return (start, stop) of the part of rank `rank` when `numel` elements are split into `size` parts.

    Parts have ceil(numel / size) elements, as an all-gather requires; the last ones may be shorter or empty.
    """
    part = -(-numel // size)
    return min(rank * part, numel), min((rank + 1) * part, numel)


def whole_tensor(name: str, shape: tuple[int, ...]) -> Span:
    """Return the span of a whole tensor. A scalar has one element."""
    return Span(name, 0, prod(shape))
