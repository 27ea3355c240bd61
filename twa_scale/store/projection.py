"""Inner products of a gradient with the rows and the center of a span, and the pieces of a span."""

from collections.abc import Iterator
from types import EllipsisType

import torch

from twa_scale.kernels import Dense, Kernels, Packed, Rows, Segments, new_sums
from twa_scale.store.store import SegmentSums


def products(
    kernels: Kernels,
    rows: Rows,
    center: torch.Tensor | None,
    gradient: torch.Tensor,
    segments: Segments | None = None,
) -> torch.Tensor:
    """Return <row_i, gradient> and, last, <center, gradient> (zero without a center), float64.

    The shape is (n + 1,), or (n + 1, count) with segments.
    """
    out = new_sums(rows.n + 1, segments, gradient.device)
    kernels.project(rows, gradient, segments, out[:-1])
    if center is None:
        out[-1:].zero_()
    else:
        kernels.project(Dense.one(center), gradient, segments, out[-1:])
    return out


def segment_sums(
    kernels: Kernels,
    rows: Rows,
    center: torch.Tensor | None,
    gradient: torch.Tensor,
    segments: Segments,
    columns: slice,
) -> SegmentSums:
    """Return the products over the segments of some columns of a span.

    Args:
        kernels: the kernels for the device of the rows.
        rows: the rows of these columns.
        center: the center of these columns, or None.
        gradient: the gradient of the whole span.
        segments: the segments of the whole span.
        columns: a range of columns of the span.
    """
    first, part = segments.part(columns.start, columns.stop)
    return SegmentSums(slice(first, first + part.count), products(kernels, rows, center, gradient[columns], part))


def pieces(
    rows: Dense | Packed, center: torch.Tensor, tiles: int
) -> Iterator[tuple[slice, Dense | Packed, torch.Tensor]]:
    """Yield columns, rows and center of pieces of about this number of tiles, at least one run of tiles."""
    step = rows.run * max(1, tiles // rows.run)
    for tile in range(0, rows.count, step):
        first, part = rows.part(tile, tile + step)
        columns = slice(first, first + part.m)
        yield columns, part, center[columns]


def in_piece(segments: Segments | None, columns: slice) -> tuple[EllipsisType | tuple[slice, slice], Segments | None]:
    """Return the index of the weights of some columns of a span, and the segments of these columns."""
    if segments is None:
        return ..., None
    first, part = segments.part(columns.start, columns.stop)
    return (slice(None), slice(first, first + part.count)), part
