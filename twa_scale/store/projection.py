"""Inner products of a gradient with the rows and the center of a span, and the pieces of a span."""

from types import EllipsisType

import torch

from twa_scale.kernels import Dense, Kernels, Rows, Segments


def products(
    kernels: Kernels,
    rows: Rows,
    center: torch.Tensor | None,
    gradient: torch.Tensor,
    segments: Segments | None = None,
) -> torch.Tensor:
    """Return <row_i, gradient> and, last, <center, gradient> (zero without a center): float64.

    The shape is (n + 1,), or (n + 1, count) with segments.
    """
    found = kernels.project(rows, gradient, segments)
    # Kernels return the products of a segment next to each other. A copy in this order is several times faster.
    result = found.new_zeros(*found.shape[1:], len(found) + 1)
    result[..., :-1] = found.movedim(0, -1)
    if center is not None:
        result[..., -1] = kernels.project(Dense.one(center), gradient, segments)[0]
    return result.movedim(-1, 0)


def in_piece(segments: Segments | None, piece: slice) -> tuple[EllipsisType | tuple[slice, slice], Segments | None]:
    """Return the index of the sums or weights of some columns of a span, and the segments of these columns."""
    if segments is None:
        return ..., None
    first, part = segments.part(piece.start, piece.stop)
    return (slice(None), slice(first, first + part.count)), part
