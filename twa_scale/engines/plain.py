"""A model that every rank holds whole: alone, or as one of several replicas that see different data."""

from collections.abc import Collection
from functools import partial

import torch
from torch import nn

from twa_scale.base.spans import Span, whole
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.parameters import (
    TWICE,
    flat,
    named_parameters,
    persistent_buffers,
    places,
    require_in_place,
    writes,
)
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


class PlainEngine(Engine):
    """An ordinary module. With several ranks each is a shard group of its own, and they exchange only coefficients."""

    def __init__(self, module: nn.Module, replica_group: Group) -> None:
        self.module = module
        self._parameters, self.parameters = named_parameters(module)
        self._places = places(module)
        self.device = next(iter(self._parameters.values())).device
        self.shard_group = Group.alone()
        self.replica_group = replica_group
        self._consume: Consume | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def spans(self) -> list[Span]:
        """Return every tensor, whole."""
        return [whole(name, info.shape) for name, info in self.parameters.items()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the parameter's own memory."""
        return flat(span.name, self._parameters[span.name])[span.start : span.stop]

    def publish(self, names: Collection[str]) -> None:
        """Do nothing: the memory that was written is the model's."""

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of each parameter's memory."""
        require_in_place(self._places)
        return {name: writes(self._parameters[name]) for name in names}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Consume each gradient as soon as autograd has accumulated it, so that few exist at a time."""
        self._consume = consume
        if self.keeps_gradients:
            return

        def take(parameter: torch.Tensor, span: Span) -> None:
            if parameter.grad is None:
                raise EngineError(TWICE)
            consume(span, parameter.grad.reshape(-1))
            parameter.grad = None

        for span in self.spans():
            if self.parameters[span.name].trainable:
                hook = partial(take, span=span)
                handle = self._parameters[span.name].register_post_accumulate_grad_hook(hook)
                self._hooks.append(handle)

    def drain(self) -> None:
        """Hand over gradients that were kept, or written by hand; the hooks have consumed all others."""
        assert self._consume is not None
        for span in self.spans():
            parameter = self._parameters[span.name]
            if parameter.grad is not None and parameter.requires_grad:
                self._consume(span, parameter.grad.reshape(-1))
                parameter.grad = None

    def forget(self) -> None:
        """Drop what was there before the hooks were."""
        self.module.zero_grad(set_to_none=True)

    def close(self) -> None:
        """Remove the hooks."""
        self._consume = None
        while self._hooks:
            self._hooks.pop().remove()
