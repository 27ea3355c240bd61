"""Deltas as they are, in float32 or bfloat16."""

import torch

from twa_scale.kernels import Allocate, Dense, Kernels, Target
from twa_scale.spans import Span
from twa_scale.store.products import products


class DenseStore:
    """The rows of deltas of each span, and its center in float32."""

    def __init__(
        self, n: int, dtype: torch.dtype, device: torch.device, kernels: Kernels, allocate: Allocate = torch.empty
    ) -> None:
        self._n = n
        self._dtype = dtype
        self.device = device
        self.kernels = kernels
        self._allocate = allocate
        self._spans: dict[Span, tuple[Dense, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the deltas and the center occupy."""
        return sum(deltas.nbytes + center.nbytes for deltas, center in self._spans.values())

    def reserve(self, span: Span) -> Target:
        """Allocate a span; the memory is touched when it is filled."""
        deltas = Dense.empty(self._n, len(span), self._dtype, self.device, self._allocate)
        self._spans[span] = deltas, self._allocate(len(span), dtype=torch.float32, device=self.device)
        return Target(*self._spans[span])

    def held(self, span: Span) -> tuple[Dense, torch.Tensor]:
        """Return the rows of a span and its center."""
        return self._spans[span]

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span."""
        deltas, center = self._spans[span]
        return products(self.kernels, deltas, center if with_center else None, gradient)

    def combine(self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write the weights of this span."""
        deltas, center = self._spans[span]
        self.kernels.combine(deltas, weights, center, scale, out)

    def close(self) -> None:
        """Release the memory."""
        self._spans.clear()
