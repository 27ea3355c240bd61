"""Deltas as they are, in float32 or bfloat16."""

import torch

from twa_scale import kernels
from twa_scale.spans import Span


class DenseStore:
    """One (n, len(span)) matrix of deltas for each span, and its center in float32."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self._n = n
        self._dtype = dtype
        self._device = device
        self._spans: dict[Span, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the deltas and the center occupy."""
        return sum(deltas.nbytes + center.nbytes for deltas, center in self._spans.values())

    def reserve(self, span: Span) -> None:
        """Allocate a span; the memory is touched when it is filled."""
        deltas = torch.empty(self._n, len(span), dtype=self._dtype, device=self._device)
        self._spans[span] = deltas, torch.empty(len(span), dtype=torch.float32, device=self._device)

    def fill(self, span: Span, start: int, deltas: torch.Tensor, center: torch.Tensor) -> None:
        """Copy a part of a span in, rounding to the type of the store."""
        rows, base = self._spans[span]
        rows[:, start : start + len(center)] = deltas
        base[start : start + len(center)] = center

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span."""
        deltas, center = self._spans[span]
        result = torch.zeros(self._n + 1, dtype=torch.float64, device=self._device)
        result[:-1] = kernels.project(deltas, gradient)
        if with_center:
            result[-1:] = kernels.project(center[None], gradient)
        return result

    def combine(self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write the weights of this span."""
        deltas, center = self._spans[span]
        kernels.combine(deltas, weights, center, scale, out)

    def close(self) -> None:
        """Release the memory."""
        self._spans.clear()
