"""Deltas in memory: as they are, or as codes of few bits."""

from collections.abc import Callable

import torch

from twa_scale.base.spans import Span
from twa_scale.kernels import Allocate, Coding, Dense, Kernels, Packed, Target
from twa_scale.store.projection import products


class HeldStore:
    """The rows of deltas of each span, and its center in float32.

    Deltas are rounded or quantized once, while they are streamed in; the exact ones are never all in memory. Blocks of
    packed ones are counted from a tensor's first element, so that another split of it gives the same codes; but for a
    block that the border of a span cuts: each of its parts gets a scale of its own.

    Args:
        make: returns rows for a span, yet to be written.
        device: where they lie.
        kernels: that compute there.
        coding: what the rows stand for.
        allocate: gives memory for the center.
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
        """Bytes that the deltas and the center occupy."""
        return sum(rows.nbytes + center.nbytes for rows, center in self._spans.values())

    def reserve(self, span: Span) -> Target:
        """Allocate a span; on a CPU the memory is touched when it is filled."""
        self._spans[span] = self._make(span), self._allocate(len(span), dtype=torch.float32, device=self.device)
        return Target(*self._spans[span], coding=self.coding)

    def held(self, span: Span) -> tuple[Dense | Packed, torch.Tensor]:
        """Return the rows of a span and its center (m,), as they lie in memory."""
        return self._spans[span]

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span."""
        rows, center = self._spans[span]
        return products(self.kernels, rows, center if with_center else None, gradient)

    def combine(self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write the weights of this span."""
        rows, center = self._spans[span]
        self.kernels.combine(rows, weights, center, scale, out)

    def close(self) -> None:
        """Release the memory."""
        self._spans.clear()
