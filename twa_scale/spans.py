"""Spans: contiguous ranges of a tensor's row-major flattening, the unit in which every rank owns weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, order=True)
class Span:
    """Elements [start, stop) of the row-major flattening of tensor `name`."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def pieces(self, size: int) -> Iterator["Span"]:
        """Cut into consecutive spans of at most `size` elements."""
        for start in range(self.start, self.stop, size):
            yield Span(self.name, start, min(start + size, self.stop))


def share(numel: int, rank: int, size: int) -> tuple[int, int]:
    """Return (start, stop) of rank's part when `numel` elements are cut into `size` equal parts, the last ones short.

    Every part but the tail has ceil(numel / size) elements, which is what an all-gather of equal pieces needs.
    """
    part = -(-numel // size)
    return min(rank * part, numel), min((rank + 1) * part, numel)


def whole(name: str, shape: tuple[int, ...]) -> Span:
    """Return the span of a whole tensor; a scalar has one element."""
    return Span(name, 0, prod(shape))
