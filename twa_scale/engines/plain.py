"""An unwrapped model: one process, or several replicas that see different data."""

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

from twa_scale.base.spans import Span, whole_tensor
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.parameters import (
    GRADIENT_TAKEN,
    flat_gradient,
    flat_view,
    memory_version,
    named_parameters,
    parameter_locations,
    persistent_buffers,
    require_same_parameters,
    require_separate,
    require_shape,
)
from twa_scale.engines.projected_gradients import ProjectedGradients
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


class PlainEngine(Engine):
    """An engine for an unwrapped module. With several ranks, each is its own shard group, and all are replicas."""

    def __init__(self, module: nn.Module, replica_group: Group) -> None:
        self.module = module
        self._parameters, self.parameters = named_parameters(module)
        require_separate(self._parameters)
        self._locations = parameter_locations(module)
        self.device = next(iter(self._parameters.values())).device
        self.shard_group = Group.alone()
        self.replica_group = replica_group
        self._consume: Consume | None = None
        self._projected = ProjectedGradients(warns=replica_group.rank == 0)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def spans(self) -> list[Span]:
        """Return every tensor as one span."""
        return [whole_tensor(name, info.shape) for name, info in self.parameters.items()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of the parameter."""
        parameter, shape = self._parameters[span.name], self.parameters[span.name].shape
        return flat_view(span.name, parameter, shape)[span.start : span.stop]

    def publish(self, names: Collection[str]) -> None:
        """Do nothing, because `live` is the memory that the model uses."""

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of each parameter's memory.

        Raises:
            EngineError: a parameter, or its memory, was replaced by another one.
        """
        require_same_parameters(self._locations)
        for name in names:
            require_shape(name, self._parameters[name], self.parameters[name].shape)
        return {name: memory_version(self._parameters[name]) for name in names}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Pass on each gradient as soon as autograd has accumulated it, so that few exist at a time."""
        self._consume = consume
        if self.keeps_gradients:
            return

        def take(_: object, parameter: torch.Tensor, span: Span) -> None:
            if parameter.grad is None or self._projected.is_mark(parameter.grad):
                raise EngineError(GRADIENT_TAKEN)
            consume(span, flat_gradient(parameter.grad))
            self._projected.add(span.name, parameter)

        take = torch.compiler.disable(take)  # a compiled function that calls backward() would compile hooks, too
        for span in self.spans():
            if self.parameters[span.name].trainable:
                parameter = self._parameters[span.name]
                # Not the argument of the hook: torch replaces it by the value of a user's hook, before it refuses that.
                hook = partial(take, parameter=parameter, span=span)
                self._hooks += [
                    self._projected.register(span.name, parameter),
                    parameter.register_post_accumulate_grad_hook(hook),
                ]

    def drain(self) -> None:
        """Pass on gradients that were kept, or that the script wrote. The hooks have passed on all others."""
        assert self._consume is not None
        self._projected.finish()
        for span in self.spans():
            parameter = self._parameters[span.name]
            if parameter.grad is not None and parameter.requires_grad:
                self._consume(span, flat_gradient(parameter.grad))
                parameter.grad = None

    def forget(self) -> None:
        """Drop the gradients that existed before the hooks."""
        self._projected.remove()
        self.module.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Remove the hooks and the marks."""
        self._consume = None
        self._projected.remove()
        while self._hooks:
            self._hooks.pop().remove()
