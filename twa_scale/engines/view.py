"""The base class of engines that present another engine in another form."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine


class EngineView(Engine):
    """An engine that forwards every call to another one. Subclasses override some methods."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.module = engine.module
        self.device = engine.device
        self.shard_group = engine.shard_group
        self.replica_group = engine.replica_group
        self.loss_scale = engine.loss_scale
        self.parameters = engine.parameters
        self.complex_names = engine.complex_names

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
        """Return the spans of this rank."""
        return self._engine.spans()

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of a local span in the model."""
        return self._engine.live(span)

    def low_precision(self, span: Span) -> torch.Tensor | None:
        """Return the low-precision copy of a local span that forward passes use, if there is one."""
        return self._engine.low_precision(span)

    def publish(self, names: Collection[str]) -> None:
        """Make writes visible to the next forward pass."""
        self._engine.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return values that change when other code writes a parameter."""
        return self._engine.changed(names)

    def sharded(self, span: Span, values: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a local span as a DTensor, if its parameter is one."""
        return self._engine.sharded(span, values)

    def steps_taken(self) -> int | None:
        """Return the number of optimizer steps, or None if the sharding library does not count them."""
        return self._engine.steps_taken()

    def counters(self) -> Callable[[], None]:
        """Return a function that restores the sharding library's counters."""
        return self._engine.counters()

    def units(self) -> list[list[Span]]:
        """Return the spans that the model uses at once."""
        return self._engine.units()

    def before_use(self, prepare: Callable[[int], torch.cuda.Event | None]) -> None:
        """Register a callback that runs before a unit is used."""
        self._engine.before_use(prepare)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers."""
        return self._engine.buffers()

    def watch(self, consume: Consume) -> None:
        """Pass on gradients."""
        self._engine.watch(consume)

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


def underlying(engine: Engine) -> Engine:
    """Return the engine below all views, or `engine` if it is not a view."""
    while isinstance(engine, EngineView):
        engine = engine._engine
    return engine
