"""Spans that do not cross the equal parts of a tensor, such as the experts that are stacked in it."""

from collections.abc import Mapping
from math import prod

import torch

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.stacked_experts import StackedExperts
from twa_scale.engines.view import EngineView

SpanParts = Mapping[Span, list[tuple[int, Span]]]
"""The parts of spans, each with its offset in the span."""


class SplitEngine(EngineView):
    """An engine that divides the spans of another at the parts of a tensor, so that each part can have a group.

    Memory and gradients are slices of those of the whole span, and nothing is copied.

    Args:
        engine: the engine whose spans are divided.
        stacked: the tensors whose spans are divided into equal parts along the first dimension.
    """

    def __init__(self, engine: Engine, stacked: Mapping[str, StackedExperts]) -> None:
        super().__init__(engine)
        sizes = {name: prod(self.parameters[name].shape) // experts.number for name, experts in stacked.items()}
        self.parts: SpanParts = {
            span: list(span.split(sizes[span.name])) if span.name in sizes else [(0, span)] for span in engine.spans()
        }
        self._parents = {part: (span, start) for span, parts in self.parts.items() for start, part in parts}

    def spans(self) -> list[Span]:
        """Return the spans of this rank, each of them inside one part."""
        return list(self._parents)

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of a local span in the model."""
        parent, start = self._parents[span]
        return self._engine.live(parent)[start : start + len(span)]

    def low_precision(self, span: Span) -> torch.Tensor | None:
        """Return the low-precision copy of a local span that forward passes use, if there is one."""
        parent, start = self._parents[span]
        low = self._engine.low_precision(parent)
        return None if low is None else low[start : start + len(span)]

    def units(self) -> list[list[Span]]:
        """Return the spans that the model uses at once."""
        return [[part for span in unit for _, part in self.parts[span]] for unit in self._engine.units()]

    def watch(self, consume: Consume) -> None:
        """Pass on gradients; those of a divided span as slices."""

        def consume_parts(span: Span, gradient: torch.Tensor) -> None:
            for start, part in self.parts[span]:
                consume(part, gradient[start : start + len(part)])

        self._engine.watch(consume_parts)
