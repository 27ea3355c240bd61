"""Spans that do not cross the equal parts of a tensor, such as the experts that are stacked in it."""

from collections.abc import Mapping
from math import prod

import torch

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.stacked_experts import StackedExperts
from twa_scale.engines.view import EngineView

Cuts = Mapping[Span, list[tuple[int, Span]]]
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
        sizes = {name: prod(self.parameters[name].shape) // one.number for name, one in stacked.items()}
        self.cuts: Cuts = {
            span: list(span.cuts(sizes[span.name])) if span.name in sizes else [(0, span)] for span in engine.spans()
        }
        self._inside = {cut: (span, start) for span, cuts in self.cuts.items() for start, cut in cuts}

    def spans(self) -> list[Span]:
        """Return the spans of this rank, each of them inside one part."""
        return list(self._inside)

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of a local span in the model."""
        whole, start = self._inside[span]
        return self._engine.live(whole)[start : start + len(span)]

    def units(self) -> list[list[Span]]:
        """Return the spans that the model uses at once."""
        return [[cut for span in unit for _, cut in self.cuts[span]] for unit in self._engine.units()]

    def watch(self, consume: Consume) -> None:
        """Pass on gradients; those of a divided span as slices."""

        def consume_cuts(span: Span, gradient: torch.Tensor) -> None:
            for start, cut in self.cuts[span]:
                consume(cut, gradient[start : start + len(cut)])

        self._engine.watch(consume_cuts)
