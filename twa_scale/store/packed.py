"""Deltas as codes of few bits, with one scale a block."""

from dataclasses import dataclass

import torch

from twa_scale.kernels import Allocate, Kernels, Packed
from twa_scale.spans import Span
from twa_scale.store.products import products


@dataclass
class _Part:
    """A span: its rows and center, how many columns are packed, and those that wait for the rest of their block."""

    rows: Packed
    center: torch.Tensor
    waiting: torch.Tensor
    packed: int = 0


class PackedStore:
    """Deltas are quantized once, while they are streamed in; the exact ones are never all in memory.

    The blocks of a tensor are counted from its first element, so that another split of it gives the same codes; but for
    a block that the border of a span cuts: each of its parts gets a scale of its own.
    """

    def __init__(
        self, n: int, bits: int, device: torch.device, kernels: Kernels, allocate: Allocate = torch.empty
    ) -> None:
        self._n = n
        self._bits = bits
        self.device = device
        self.kernels = kernels
        self._allocate = allocate
        self._spans: dict[Span, _Part] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that the deltas and the center occupy."""
        return sum(part.rows.nbytes + part.center.nbytes for part in self._spans.values())

    def reserve(self, span: Span) -> None:
        """Allocate a span."""
        rows = Packed.empty(self._n, len(span), span.start, self._bits, self.device, self._allocate)
        center = self._allocate(len(span), dtype=torch.float32, device=self.device)
        self._spans[span] = _Part(rows, center, center.new_empty(self._n, 0))

    def fill(self, span: Span, start: int, deltas: torch.Tensor, center: torch.Tensor) -> None:
        """Quantize the blocks that are now complete; the chunks of a span come in order, cut anywhere."""
        part = self._spans[span]
        assert start == part.packed + part.waiting.shape[1], "the chunks of a span are filled in order"
        part.center[start : start + len(center)] = center
        deltas = deltas.to(torch.float32)
        missing = -(part.rows.lead + start) % part.rows.block if part.waiting.shape[1] else 0
        waiting = self._pack(part, torch.cat([part.waiting, deltas[:, :missing]], dim=1))
        if not waiting.shape[1]:
            waiting = self._pack(part, deltas[:, missing:])
        part.waiting = waiting.clone()  # the caller uses the memory of `deltas` again

    def _pack(self, part: _Part, values: torch.Tensor) -> torch.Tensor:
        """Pack what makes whole blocks, or ends the span; return the rest."""
        rows, stop = part.rows, part.packed + values.shape[1]
        whole = stop if stop == rows.m else (rows.lead + stop) // rows.block * rows.block - rows.lead
        ready = max(0, whole - part.packed)
        if ready:
            self.kernels.pack(rows, (rows.lead + part.packed) // rows.block, values[:, :ready])
            part.packed += ready
        return values[:, ready:]

    def held(self, span: Span) -> tuple[Packed, torch.Tensor]:
        """Return the rows of a span and its center."""
        part = self._spans[span]
        return part.rows, part.center

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span."""
        part = self._spans[span]
        return products(self.kernels, part.rows, part.center if with_center else None, gradient)

    def combine(self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """Write the weights of this span."""
        part = self._spans[span]
        self.kernels.combine(part.rows, weights, part.center, scale, out)

    def close(self) -> None:
        """Release the memory."""
        self._spans.clear()
