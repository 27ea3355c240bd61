"""What holds the deltas of the local spans."""

from typing import Protocol

import torch

from twa_scale.base.spans import Span
from twa_scale.kernels import Kernels, RowMap, Target


class Store(Protocol):
    """The deltas and the center of this rank's spans, one after the other filled and then only read.

    Its rows are the deltas, or what `coding` says, which is known above it: it gives weights of rows for weights of
    deltas, once for all spans. Left out on purpose: groups, bases and ranks, which are small mathematics above it, too,
    and reading candidates.
    """

    device: torch.device
    """Where it holds the deltas and the center, which need not be that of gradients and weights."""
    kernels: Kernels
    """For data on `device`."""

    @property
    def coding(self) -> RowMap:
        """What its rows stand for."""

    @property
    def nbytes(self) -> int:
        """Bytes that the deltas and the center occupy."""

    def reserve(self, span: Span) -> Target:
        """Make room for a span, and return where `kernels` put its rows and its float32 center."""

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return <row_i, gradient> and, last, <center, gradient> (zero unless `with_center`): (n + 1,), float64."""

    def combine(self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write scale * center + sum_i weights_i row_i into `out`; all of `out`'s device."""

    def close(self) -> None:
        """Release the memory."""
