"""Complex tensors as real tensors with a last dimension of size 2, as in `torch.view_as_real`."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine, ParameterInfo
from twa_scale.engines.view import EngineView


def real_parameter_infos(parameters: Mapping[str, ParameterInfo]) -> dict[str, ParameterInfo]:
    """Return the metadata of the real views: a complex parameter gets the shape (..., 2) and a real dtype."""
    return {
        name: replace(info, shape=(*info.shape, 2), dtype=info.dtype.to_real()) if info.dtype.is_complex else info
        for name, info in parameters.items()
    }


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the real view, of shape (..., 2), of a complex tensor; a real tensor is returned unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def with_real_views(engine: Engine) -> Engine:
    """Return an engine that presents complex tensors as their real views, or `engine` if it has none."""
    dtypes = {info.dtype for info in engine.parameters.values()} | {b.dtype for b in engine.buffers().values()}
    return ViewAsRealEngine(engine) if any(dtype.is_complex for dtype in dtypes) else engine


class ViewAsRealEngine(EngineView):
    """An engine that presents the complex tensors of another as their real views.

    Autograd's gradient of a real loss with respect to a complex parameter has the derivatives with respect to the
    real and the imaginary part as its two components, so its real view is the gradient of the real view.
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.parameters = real_parameter_infos(engine.parameters)
        parameters = {name for name, info in engine.parameters.items() if info.dtype.is_complex}
        self.complex_names = frozenset(parameters | {n for n, b in engine.buffers().items() if b.is_complex()})

    def spans(self) -> list[Span]:
        """Return the spans of this rank, counted in real numbers."""
        return [self._doubled(span) for span in self._engine.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of a local span in the model."""
        return real_view(self._engine.live(self._halved(span))).view(-1)

    def low_precision(self, span: Span) -> torch.Tensor | None:
        """Return the low-precision copy of a local span that forward passes use, if there is one."""
        low = self._engine.low_precision(self._halved(span))
        return None if low is None else real_view(low).view(-1)

    def sharded(self, span: Span, values: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a local span as a DTensor, if its parameter is one and not complex."""
        return None if span.name in self.complex_names else super().sharded(span, values)

    def units(self) -> list[list[Span]]:
        """Return the spans that the model uses at once."""
        return [[self._doubled(span) for span in unit] for unit in self._engine.units()]

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the real views of the buffers."""
        return {name: real_view(buffer) for name, buffer in self._engine.buffers().items()}

    def watch(self, consume: Consume) -> None:
        """Pass on gradients, those of complex parameters as their real views."""
        self._engine.watch(lambda span, gradient: consume(self._doubled(span), real_view(gradient).reshape(-1)))

    def _doubled(self, span: Span) -> Span:
        if span.name not in self.complex_names:
            return span
        return Span(span.name, 2 * span.start, 2 * span.stop, 2 * span.run, 2 * span.stride)

    def _halved(self, span: Span) -> Span:
        if span.name not in self.complex_names:
            return span
        return Span(span.name, span.start // 2, span.stop // 2, span.run // 2, span.stride // 2)
