"""The interface of kernels, and the types of their arguments and results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from twa_scale.kernels.coding import Coding
from twa_scale.kernels.packed_rows import Packed
from twa_scale.kernels.rows import Dense
from twa_scale.kernels.segments import Segments


@dataclass(frozen=True)
class Differences:
    """n rows w_i - c that are not stored, but computed in float32 in each kernel."""

    rows: Sequence[torch.Tensor]
    """The candidates w_i, n tensors (m,) of any floating point types."""
    center: torch.Tensor
    """The center c, (m,), float32."""

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.rows)


Rows = Dense | Packed | Differences
Sources = torch.Tensor | Sequence[torch.Tensor]
"""Elements of the candidates on the CPU: one tensor (n, m) with contiguous rows, or n contiguous tensors (m,)."""


@dataclass(frozen=True)
class Target:
    """The outputs of `Kernels.make_deltas` for a span of m elements. An output that is None is not computed."""

    rows: Dense | Packed | None = None
    """The n deltas w_i - c, or packed rows with another `coding`. Packed rows have all bits zero before."""
    center: torch.Tensor | None = None
    """The center c, (m,). With rows it is float32. Without rows it has any floating point type; it may be live model
    memory, and is written only if it is finite."""
    products: torch.Tensor | None = None
    """The sum to which inner products of the deltas and, last, the center are added, float64: (n + 1, n + 1), or
    (n + 1,) for squared norms only."""
    coding: Coding | None = None
    """The coding of packed rows; None for deltas."""
    errors: torch.Tensor | None = None
    """The sum to which the squared norms of the rounding errors of packed candidates are added, (n,), float64."""

    @property
    def device(self) -> torch.device:
        """The device of the outputs."""
        outputs = (*(self.rows.tensors if self.rows else ()), self.products, self.center)
        return next(output.device for output in outputs if output is not None)


def new_sums(n: int, segments: Segments | None, device: torch.device) -> torch.Tensor:
    """Return memory for inner products of n rows, (n,), or (n, segments.count) in the layout of `Kernels.project`."""
    if segments is None:
        return torch.empty(n, dtype=torch.float64, device=device)
    return torch.empty(segments.count, n, dtype=torch.float64, device=device).T


class SourceChecks(NamedTuple):
    """Checksums and finiteness of the sources."""

    checksums: torch.Tensor
    """The checksum of each source, (n,), int64."""
    finite: bool
    """Whether the center is finite. It is not if a source holds NaN or infinity, or if a difference overflows."""


class Kernels(Protocol):
    """The operations on data of the size of the model. Each one reads the rows once.

    Products are added in float32 within a tile, and in float64 over tiles. Groups, spans and ranks are handled by the
    callers.
    """

    name: str

    def project(
        self,
        rows: Rows,
        gradient: torch.Tensor,
        segments: Segments | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Write the inner products <row_i, gradient> to `out`, and return it.

        Args:
            rows: n rows of m elements.
            gradient: (m,), of any floating point type, on the device of the rows.
            segments: if given, the inner products are those over each segment.
            out: (n,), or (n, segments.count) with the products of a segment next to each other in memory, float64.
                Default: `new_sums`.
        """

    def combine(
        self,
        rows: Rows,
        weights: torch.Tensor,
        base: torch.Tensor,
        scale: float,
        out: torch.Tensor,
        segments: Segments | None = None,
    ) -> None:
        """Write scale * base + sum_i weights_i row_i into `out`, rounded once from float32.

        Args:
            rows: n rows of m elements.
            weights: (n,), of any floating point type. With `segments`, the weights of each segment, (n, count).
            base: the center, (m,), float32.
            scale: the weight of the center.
            out: (m,), of any floating point type; it may be live model memory.
            segments: the segments of the columns, or None if all columns have the same weights.
        """

    def checksums(self, sources: Sources) -> torch.Tensor:
        """Return the checksum of each source, (n,), int64, on the CPU."""

    def make_deltas(self, sources: Sources, weights: Sequence[float], target: Target, start: int) -> SourceChecks:
        """Compute the deltas w_i - c and the center c = sum_i b_i w_i of some elements of a span.

        Both are computed relative to the source with the largest weight. Where all sources agree, the deltas are
        therefore exactly zero, and the center is bitwise equal to the sources. The arithmetic is float32, or float64 if
        a source is float64.

        Args:
            sources: k elements of each candidate.
            weights: the weights b of the candidates in the center.
            target: the outputs for the whole span.
            start: the position of the elements in the span. The elements must not split a block of packed rows, except
                for the first and last block of the span.
        """
