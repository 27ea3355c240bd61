"""A store without deltas, which computes them from the candidates' files, mapped into memory."""

from collections.abc import Callable, Iterator, Sequence

import torch

from twa_scale.base.spans import Span
from twa_scale.kernels import Differences, Kernels, Segments, Target, of_deltas
from twa_scale.store.projection import in_piece, products, segment_sums
from twa_scale.store.store import SegmentSums

_PIECE = 1 << 20  # elements of a strided span that are copied into contiguous memory at a time

Mapped = Callable[[str], Sequence[torch.Tensor]]
"""Given the name of a trained tensor, returns the flattened tensor of every candidate as a view of its file."""


class MappedStore:
    """Computes w_i - c in float32 at each use, from the files and a float32 center.

    The only rounding error of the deltas is that of the center, half a unit in the last place of a weight. The ranks of
    a node share the pages of the files. Files must not change during training: deltas could be wrong, and if a file is
    truncated, the process is killed.
    """

    def __init__(self, n: int, mapped: Mapped, kernels: Kernels) -> None:
        self._n = n
        self._mapped = mapped
        self.device = torch.device("cpu")
        self.kernels = kernels
        self.coding = of_deltas(n)
        self._spans: dict[Span, tuple[Sequence[torch.Tensor], torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of the center."""
        return sum(center.nbytes for _, center in self._spans.values())

    def reserve(self, span: Span) -> Target:
        """Map the tensors of a span."""
        self._spans[span] = self._mapped(span.name), torch.empty(len(span), dtype=torch.float32)
        return Target(center=self._spans[span][1])

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span."""
        total = torch.zeros(self._n + 1, dtype=torch.float64)
        for columns, rows in self._pieces(span):
            total += products(self.kernels, rows, rows.center if with_center else None, gradient[columns])
        return total

    def project_rows(
        self, span: Span, gradient: torch.Tensor, with_center: bool, segments: Segments
    ) -> Iterator[SegmentSums]:
        """Yield the inner products over each segment, for a piece of the span at a time."""
        for columns, rows in self._pieces(span):
            yield segment_sums(self.kernels, rows, rows.center if with_center else None, gradient, segments, columns)

    def combine(
        self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor, segments: Segments | None = None
    ) -> None:
        """Write the weights of this span."""
        for columns, rows in self._pieces(span):
            index, here = in_piece(segments, columns)
            self.kernels.combine(rows, weights[index], rows.center, scale, out[columns], here)

    def _pieces(self, span: Span) -> Iterator[tuple[slice, Differences]]:
        """Yield a contiguous span at once, and a strided span in pieces."""
        tensors, center = self._spans[span]
        if not span.run:
            yield slice(0, len(span)), Differences([row[span.start : span.stop] for row in tensors], center)
            return
        for offset, piece in span.pieces(_PIECE):
            columns = slice(offset, offset + len(piece))
            yield columns, Differences([_gathered(row, piece) for row in tensors], center[columns])

    def close(self) -> None:
        """Release the files and the center."""
        self._spans.clear()


def _gathered(row: torch.Tensor, piece: Span) -> torch.Tensor:
    part = row[piece.start : piece.stop]
    if not piece.run:
        return part
    return part.as_strided((len(piece) // piece.run, piece.run), (piece.stride, 1)).reshape(-1)
