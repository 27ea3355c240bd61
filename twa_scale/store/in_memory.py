"""Stores that hold the deltas in memory, as numbers or as codes of a few bits."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy

import torch

from twa_scale.base.spans import Span
from twa_scale.kernels import Allocate, Coding, Dense, Kernels, Packed, Segments, Target
from twa_scale.store.projection import pieces, products, segment_sums
from twa_scale.store.store import SegmentSums

# Bytes of sums over segments that are computed at a time: they stay in a CPU's cache; a GPU needs few, large launches.
_CPU_SUMS = 8 << 20
_GPU_SUMS = 64 << 20


class InMemoryStore:
    """Holds the rows of each span, and its center in float32.

    Deltas are rounded or quantized once, while candidates are read. The exact deltas are never in memory all at once.
    The blocks of packed rows are counted from the first element of a tensor, so codes do not depend on how the tensor
    is divided into spans. The exception is a block that a span boundary cuts: each part has its own scale.

    Args:
        make: allocates the rows of a span.
        device: the device of rows and center.
        kernels: the kernels for this device.
        coding: the meaning of the rows.
        allocate: allocates the center.
    """

    def __init__(
        self,
        make: Callable[[Span], Dense | Packed],
        device: torch.device,
        kernels: Kernels,
        coding: Coding,
        allocate: Allocate,
    ) -> None:
        self._make = make
        self.device = device
        self.kernels = kernels
        self.coding = coding
        self._allocate = allocate
        self._spans: dict[Span, tuple[Dense | Packed, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of the deltas and the center."""
        return sum(rows.nbytes + center.nbytes for rows, center in self._spans.values())

    def reserve(self, span: Span) -> Target:
        """Allocate a span. On a CPU, memory is committed when it is filled."""
        self._spans[span] = self._make(span), self._allocate(len(span), dtype=torch.float32, device=self.device)
        return Target(*self._spans[span], coding=self.coding)

    def rows_and_center(self, span: Span) -> tuple[Dense | Packed, torch.Tensor]:
        """Return the rows of a span and its center (m,)."""
        return self._spans[span]

    def with_parts(self, tiles: Mapping[Span, tuple[Span, int, int]]) -> "InMemoryStore":
        """Return a store of parts of the spans of this one, in the same memory.

        Args:
            tiles: for each part, the span that holds it, and the tiles [start, stop) of the span's rows.
        """
        parts = copy(self)
        parts._spans = {}
        for part, (span, start, stop) in tiles.items():
            rows, center = self._spans[span]
            first, held = rows.part(start, stop)
            parts._spans[part] = held, center[first : first + held.m]
        return parts

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span."""
        rows, center = self._spans[span]
        return products(self.kernels, rows, center if with_center else None, gradient)

    def project_rows(
        self, span: Span, gradient: torch.Tensor, with_center: bool, segments: Segments
    ) -> Iterator[SegmentSums]:
        """Yield the inner products over each segment, for a piece of the span at a time."""
        rows, center = self._spans[span]
        num_segments = (_CPU_SUMS if self.device.type == "cpu" else _GPU_SUMS) // (8 * (rows.n + 1))
        for columns, part, base in pieces(rows, center, num_segments * segments.length // rows.tile):
            yield segment_sums(self.kernels, part, base if with_center else None, gradient, segments, columns)

    def combine(
        self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor, segments: Segments | None = None
    ) -> None:
        """Write the weights of this span."""
        rows, center = self._spans[span]
        self.kernels.combine(rows, weights, center, scale, out, segments)

    def close(self) -> None:
        """Release the memory."""
        self._spans.clear()
