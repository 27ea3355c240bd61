"""Complex tensors as real tensors with a last dimension of size 2, as in `torch.view_as_real`."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine, ParameterInfo


def real_parameter_infos(parameters: Mapping[str, ParameterInfo]) -> dict[str, ParameterInfo]:
    """Return the metadata of the real views: a complex parameter gets the shape (..., 2) and a real dtype."""
    return {
        name: replace(info, shape=(*info.shape, 2), dtype=info.dtype.to_real()) if info.dtype.is_complex else info
        for name, info in parameters.items()
    }


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the real view, of shape (..., 2), of a complex tensor; a real tensor is returned unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def complex_tensor_names(engine: Engine) -> frozenset[str]:
    """Return the names of the complex parameters and buffers of the model."""
    return engine.complex_names if isinstance(engine, ViewAsRealEngine) else frozenset()


def with_real_views(engine: Engine) -> Engine:
    """Return an engine that presents complex tensors as their real views, or `engine` if it has none."""
    dtypes = {info.dtype for info in engine.parameters.values()} | {b.dtype for b in engine.buffers().values()}
    return ViewAsRealEngine(engine) if any(dtype.is_complex for dtype in dtypes) else engine


class ViewAsRealEngine(Engine):
    """An engine that wraps another and presents its complex tensors as their real views.

    Autograd's gradient of a real loss with respect to a complex parameter has the derivatives with respect to the
    real and the imaginary part as its two components, so its real view is the gradient of the real view.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.module = engine.module
        self.device = engine.device
        self.shard_group = engine.shard_group
        self.replica_group = engine.replica_group
        self.loss_scale = engine.loss_scale
        self.parameters = real_parameter_infos(engine.parameters)
        parameters = {name for name, info in engine.parameters.items() if info.dtype.is_complex}
        self.complex_names = frozenset(parameters | {n for n, b in engine.buffers().items() if b.is_complex()})

    @property
    def averages_replicas(self) -> bool:  # type: ignore[override]
        """Whether gradients are already means over the replica group."""
        return self._engine.averages_replicas

    @property
    def keeps_gradients(self) -> bool:
        """Whether `drain` passes on all gradients."""
        return self._engine.keeps_gradients

    @keeps_gradients.setter
    def keeps_gradients(self, value: bool) -> None:
        self._engine.keeps_gradients = value

    @property
    def keeps_optimizer(self) -> bool:
        """Whether training continues with the model's own optimizer."""
        return self._engine.keeps_optimizer

    @keeps_optimizer.setter
    def keeps_optimizer(self, value: bool) -> None:
        self._engine.keeps_optimizer = value

    def settings(self) -> Mapping[str, Any]:
        """Return the settings that came with the model."""
        return self._engine.settings()

    def check(self) -> None:
        """Raise EngineError if no average can be trained."""
        self._engine.check()

    def boundary(self) -> bool:
        """Return whether the gradients are complete."""
        return self._engine.boundary()

    def spans(self) -> list[Span]:
        """Return the spans of this rank, counted in real numbers."""
        return [self._doubled(span) for span in self._engine.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of a local span in the model."""
        return real_view(self._engine.live(self._halved(span))).view(-1)

    def publish(self, names: Collection[str]) -> None:
        """Make writes visible to the next forward pass."""
        self._engine.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return values that change when other code writes a parameter."""
        return self._engine.changed(names)

    def steps_taken(self) -> int | None:
        """Return the number of optimizer steps, or None if the sharding library does not count them."""
        return self._engine.steps_taken()

    def counters(self) -> Callable[[], None]:
        """Return a function that restores the sharding library's counters."""
        return self._engine.counters()

    def units(self) -> list[list[Span]]:
        """Return the spans that the model uses at once."""
        return [[self._doubled(span) for span in unit] for unit in self._engine.units()]

    def before_use(self, prepare: Callable[[int], torch.cuda.Event | None]) -> None:
        """Register a callback that runs before a unit is used."""
        self._engine.before_use(prepare)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the real views of the buffers."""
        return {name: real_view(buffer) for name, buffer in self._engine.buffers().items()}

    def watch(self, consume: Consume) -> None:
        """Pass on gradients, those of complex parameters as their real views."""
        self._engine.watch(lambda span, gradient: consume(self._doubled(span), real_view(gradient).reshape(-1)))

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that computes a gradient of a parameter."""
        return self._engine.on_gradient(call)

    def drain(self) -> None:
        """Pass on the remaining gradients."""
        self._engine.drain()

    def forget(self) -> None:
        """Drop the pending gradients."""
        self._engine.forget()

    def close(self) -> None:
        """Stop passing on gradients."""
        self._engine.close()

    def _doubled(self, span: Span) -> Span:
        if span.name not in self.complex_names:
            return span
        return Span(span.name, 2 * span.start, 2 * span.stop, 2 * span.run, 2 * span.stride)

    def _halved(self, span: Span) -> Span:
        if span.name not in self.complex_names:
            return span
        return Span(span.name, span.start // 2, span.stop // 2, span.run // 2, span.stride // 2)
