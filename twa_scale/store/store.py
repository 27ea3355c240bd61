"""The interface of a store."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from twa_scale.base.spans import Span
from twa_scale.kernels import Kernels, RowMap, Segments, Target


class SegmentSums(NamedTuple):
    """Products of a gradient with the rows and the center, over some consecutive segments of a span."""

    segments: slice
    """The segments. The first and the last one may continue in other pieces; their products are the sums over all
    pieces."""
    products: torch.Tensor
    """(num_rows + 1, number of segments), float64."""


class Store(Protocol):
    """Holds the deltas and the center of the spans of this rank. They are filled once and then only read.

    The rows of a store are the deltas, or those that `coding` defines. What is called the center here is the base of
    `coding`: the center, or for `Trajectory` the first candidate. The caller converts weights of deltas into
    weights of rows, once for all spans. A store does not depend on groups, bases and ranks, and does not read
    candidates.
    """

    device: torch.device
    """The device of the deltas and the center. Gradients and weights may be on another device."""
    kernels: Kernels
    """The kernels for data on `device`."""

    @property
    def coding(self) -> RowMap:
        """The meaning of the rows of the store."""

    @property
    def nbytes(self) -> int:
        """The bytes of the deltas and the center."""

    def reserve(self, span: Span) -> Target:
        """Allocate a span. Return the memory into which `kernels` write its rows and its float32 center."""

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return <row_i, gradient> and, last, <center, gradient>, float64.

        Args:
            span: a reserved span.
            gradient: the gradient of its elements, (m,).
            with_center: whether the last product is needed. It is zero otherwise.

        Returns:
            (num_rows + 1,).
        """

    def project_rows(
        self, span: Span, gradient: torch.Tensor, with_center: bool, segments: Segments
    ) -> Iterator[SegmentSums]:
        """Yield the same products over each segment, for a piece of the span at a time.

        The sums of all segments may need more memory than the rows. Those of a piece stay in a CPU's cache until the
        caller has used them. Take all pieces before the store is used again: a store may use one buffer for several.

        Args:
            span: a reserved span.
            gradient: the gradient of its elements, (m,).
            with_center: whether the last product is needed. It is zero otherwise.
            segments: the segments of the elements of the span, in the order of the gradient.
        """

    def combine(
        self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor, segments: Segments | None = None
    ) -> None:
        """Write scale * center + sum_i weights_i row_i into `out`. All tensors are on the device of `out`.

        Args:
            span: a reserved span.
            weights: (num_rows,), or (num_rows, segments.count) with segments.
            scale: the weight of the center.
            out: (m,), of any floating point type.
            segments: the segments of the elements of the span, in the order of `out`.
        """

    def close(self) -> None:
        """Release the memory."""
