"""Segments: the columns of a span that belong to one output row of a matrix, or to one channel of a convolution.

Kernels return sums and take weights for each segment, in the same pass over the rows. The term "row" stands for a
candidate in this package, so an output row is called a segment.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Segments:
    """The division of columns [0, m) of a span into segments of equal length.

    Column j belongs to segment (lead + j) // length. The first and the last segment may be incomplete, because a span
    may start and stop inside one.
    """

    length: int
    """The number of columns of a complete segment, at least 1."""
    lead: int
    """The position of column 0 in its segment, less than `length`."""
    m: int
    """The number of columns."""

    def __post_init__(self) -> None:
        assert 0 <= self.lead < self.length and self.m >= 0, self

    @property
    def count(self) -> int:
        """The number of segments, complete or not."""
        return -(-(self.lead + self.m) // self.length) if self.m else 0

    def part(self, start: int, stop: int) -> tuple[int, "Segments"]:
        """Return the index of the segment of column `start`, and the segments of columns [start, stop)."""
        first, lead = divmod(self.lead + start, self.length)
        return first, Segments(self.length, lead, stop - start)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums over each segment, (n, count), float64, of values (n, m)."""
        whole = min(-self.lead % self.length, self.m)  # the first column of the first complete segment
        rest = whole + (self.m - whole) // self.length * self.length
        middle = values[:, whole:rest].unflatten(1, ((rest - whole) // self.length, self.length))
        ends = (values[:, cut].sum(1, keepdim=True, dtype=torch.float64) for cut in (slice(whole), slice(rest, None)))
        first, last = (end[:, : bool(size)] for end, size in zip(ends, (whole, self.m - rest), strict=True))
        return torch.cat([first, middle.sum(2, dtype=torch.float64), last], 1)

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weight of each column, (n, m), for weights of the segments, (n, count)."""
        columns = torch.arange(self.lead, self.lead + self.m, device=weights.device)
        return weights[:, columns // self.length]
