"""A store in host memory. Its rows are copied to the device of the model for each use, a piece at a time."""

from collections.abc import Callable, Iterator, Mapping
from copy import copy

import torch

from twa_scale.base.spans import Span
from twa_scale.kernels import Allocate, Dense, Kernels, Packed, Segments, Target
from twa_scale.store.host_memory import PinnedMemory
from twa_scale.store.in_memory import InMemoryStore
from twa_scale.store.projection import in_piece, pieces, products, segment_sums
from twa_scale.store.staging import Staging
from twa_scale.store.store import SegmentSums

BUFFER = 64 << 20
"""The bytes of a piece, and of each of the two buffers on the device. More if one run of tiles does not fit."""


class OffloadedStore:
    """A store that is filled on the CPU, and projects and combines on the device.

    `combine` gives the same bits as a store on the device. `project` adds the products of tiles in another order, so
    its last bits may differ.

    Args:
        make: creates the store that holds the rows, given a function that allocates host memory.
        device: the device of gradients and weights.
        kernels: the kernels for this device.
        buffer: the bytes of a piece.
    """

    def __init__(
        self, make: Callable[[Allocate], InMemoryStore], device: torch.device, kernels: Kernels, buffer: int = BUFFER
    ) -> None:
        self._pages = PinnedMemory(device)
        self._inner = make(self._pages.zeros)
        self._staging = Staging(device)
        self._compute = kernels
        self._buffer = buffer
        self.device = self._inner.device
        self.kernels = self._inner.kernels
        self.coding = self._inner.coding

    @property
    def nbytes(self) -> int:
        """The bytes of the deltas and the center in host memory."""
        return self._inner.nbytes

    def reserve(self, span: Span) -> Target:
        """Allocate a span."""
        target = self._inner.reserve(span)
        for _, rows, center in self._pieces(span):
            self._staging.reserve([*rows.tensors, center])
        return target

    def with_parts(self, tiles: Mapping[Span, tuple[Span, int, int]]) -> "OffloadedStore":
        """Return a store of parts of the spans of this one, in the same memory, like that of `InMemoryStore`.

        The buffers on the device are the same, too. Close only one of the two.
        """
        parts = copy(self)
        parts._inner = self._inner.with_parts(tiles)
        return parts

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products with the gradient of this span, on its device."""
        total = gradient.new_zeros(self._inner.rows_and_center(span)[0].n + 1, dtype=torch.float64)
        for columns, rows, center in self._on_device(span, with_center):
            total += products(self._compute, rows, center, gradient[columns])
        return total

    def project_rows(
        self, span: Span, gradient: torch.Tensor, with_center: bool, segments: Segments
    ) -> Iterator[SegmentSums]:
        """Yield the inner products over each segment, for a piece of the span at a time."""
        for columns, rows, center in self._on_device(span, with_center):
            yield segment_sums(self._compute, rows, center, gradient, segments, columns)

    def combine(
        self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor, segments: Segments | None = None
    ) -> None:
        """Write the weights of this span."""
        for columns, rows, center in self._pieces(span):
            with self._staging.lend([*rows.tensors, center]) as (*places, base):
                index, here = in_piece(segments, columns)
                self._compute.combine(rows.over(places), weights[index], base, scale, out[columns], here)

    def _pieces(self, span: Span) -> Iterator[tuple[slice, Dense | Packed, torch.Tensor]]:
        """Yield columns, rows and center of pieces that fit into a buffer."""
        rows, center = self._inner.rows_and_center(span)
        return pieces(rows, center, self._buffer // (rows.tile_bytes + rows.tile * center.itemsize))

    def _on_device(self, span: Span, with_center: bool) -> Iterator[tuple[slice, Dense | Packed, torch.Tensor | None]]:
        """Yield the same in the buffers on the device, whose memory is used again after the next piece."""
        for columns, rows, center in self._pieces(span):
            with self._staging.lend([*rows.tensors, *([center] if with_center else [])]) as copies:
                yield columns, rows.over(copies[: len(rows.tensors)]), copies[-1] if with_center else None

    def close(self) -> None:
        """Wait for the device, then release the memory of host and device."""
        self._staging.close()
        self._pages.close()
        self._inner.close()
