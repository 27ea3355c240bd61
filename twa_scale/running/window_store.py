"""The store of a window as the store of an average, also for parts of its spans."""

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from twa_scale.base.spans import Span
from twa_scale.engines.split_spans import SpanParts
from twa_scale.kernels import Kernels, RowMap, Segments, Target
from twa_scale.running.window import Window
from twa_scale.store.store import SegmentSums


class WindowStore:
    """The store of a window. It is only read, and remains when the average is closed.

    A part of a span, such as an expert of a stacked tensor, is read with the tiles of rows that it touches. If it
    begins or ends inside a tile, its gradient is padded with zeros, and its weights are copied from those of the tiles.

    Args:
        window: holds the snapshots.
        coding: the meaning of the rows.
        span_parts: the parts of spans that the average uses instead of the span.
    """

    def __init__(self, window: Window, coding: RowMap, span_parts: SpanParts | None = None) -> None:
        self._store = window.store
        self.device = window.store.device
        self.kernels: Kernels = window.store.kernels
        self.coding = coding
        self._margins: dict[Span, tuple[int, int]] = {}
        tiles: dict[Span, tuple[Span, int, int]] = {}
        for span, parts in (span_parts or {}).items():
            rows, _ = window.rows_and_base(span)
            for start, part in parts if len(span) else ():
                first, last = rows.tiles_of(start, start + len(part))
                low, part_rows = rows.part(first, last)
                tiles[part] = span, first, last
                self._margins[part] = start - low, low + part_rows.m - start - len(part)
        self._parts = window.store.with_parts(tiles)

    @property
    def nbytes(self) -> int:
        """The bytes of the snapshots."""
        return self._store.nbytes

    def reserve(self, span: Span) -> Target:
        """Raise an error, because the window has written the store."""
        raise AssertionError(f"{span} is in the window")

    def project(self, span: Span, gradient: torch.Tensor, with_center: bool) -> torch.Tensor:
        """Return the inner products of the rows and the base with the gradient of this span."""
        if span not in self._margins:
            return self._store.project(span, gradient, with_center)
        margins = self._margins[span]
        return self._parts.project(span, pad(gradient, margins) if any(margins) else gradient, with_center)

    def project_rows(
        self, span: Span, gradient: torch.Tensor, with_center: bool, segments: Segments
    ) -> Iterator[SegmentSums]:
        """Yield the inner products over each segment, for a piece of the span at a time."""
        assert span not in self._margins, "parts have no corrections of rows"
        return self._store.project_rows(span, gradient, with_center, segments)

    def combine(
        self, span: Span, weights: torch.Tensor, scale: float, out: torch.Tensor, segments: Segments | None = None
    ) -> None:
        """Write the weights of this span. Does nothing for an empty span, which the window does not hold."""
        if not len(span):
            return
        if span not in self._margins:
            self._store.combine(span, weights, scale, out, segments)
            return
        before, after = self._margins[span]
        tiles = out.new_empty(before + len(out) + after) if before or after else out
        self._parts.combine(span, weights, scale, tiles)
        if tiles is not out:
            out.copy_(tiles[before : before + len(out)])

    def close(self) -> None:
        """Do nothing, because the window remains in use."""
