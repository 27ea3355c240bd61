"""A few of the weights are compared at each step, because writes through `.data` do not count as versions."""

from collections.abc import Collection

import torch

from twa_scale.base.spans import Span
from twa_scale.engines import Engine

_SPANS, _ELEMENTS = 16, 8  # about the number of spans, and of elements of each


class WeightSamples:
    """Copies of some elements of some spans, on the device of the weights.

    Args:
        engine: holds the model.
        spans: the spans that the average writes.
    """

    def __init__(self, engine: Engine, spans: Collection[Span]) -> None:
        self._engine = engine
        filled = [span for span in spans if len(span)]
        chosen = filled[:: max(1, len(filled) // _SPANS)]
        devices = [engine.live(span).device for span in chosen]
        self._spans = [span for span, device in zip(chosen, devices, strict=True) if device == devices[0]]
        self._before: torch.Tensor | None = None
        self._differs: torch.Tensor | None = None

    def record(self) -> None:
        """Copy the elements, after a write of the average."""
        self._before = self._read() if self._spans else None

    def clear(self) -> None:
        """Drop the copies, so that nothing is compared before the next `record`."""
        self._before = None

    def compare(self, *, wait: bool) -> None:
        """Compare the elements with the copies.

        Args:
            wait: whether the host waits for a GPU. If not, it has to do so before `changed`.
        """
        self._differs = None
        if self._before is None:
            return
        now = self._read()
        if now.device == self._before.device:
            self._differs = (now != self._before).to("cpu", non_blocking=not wait)

    def changed(self) -> str | None:
        """Return the name of a parameter that differed in the last `compare`, or None."""
        if self._differs is None or not self._differs.any():
            return None
        parts = self._differs.split([len(self._elements(span)) for span in self._spans])
        return next(span.name for span, differs in zip(self._spans, parts, strict=True) if differs.any())

    @torch.no_grad()
    def _read(self) -> torch.Tensor:
        elements = (self._elements(span) for span in self._spans)
        # torch has no common type of an 8-bit one and others.
        return torch.cat([part.float() if part.itemsize == 1 else part for part in elements])

    def _elements(self, span: Span) -> torch.Tensor:
        return self._engine.live(span)[:: max(1, len(span) // _ELEMENTS)]
