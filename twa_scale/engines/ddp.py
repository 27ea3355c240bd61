"""DistributedDataParallel: every rank holds the whole model; the basis is split over the ranks by rows."""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.module_names import name_unwrapper
from twa_scale.engines.parameters import (
    mark_attached,
    named_parameters,
    parameter_locations,
    persistent_buffers,
    require_same_parameters,
    require_separate,
    unmark_attached,
)
from twa_scale.engines.private_attributes import require
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_MODEL = ("parameters_to_ignore", "process_group", "require_forward_param_sync", "require_backward_grad_sync")


class DDPEngine(Engine):
    """An engine for DistributedDataParallel. DDP averages gradients in buckets, so they are read at the step."""

    def __init__(self, model: DistributedDataParallel, replica_group: Group) -> None:
        require("torch", model, _MODEL)
        # The inner module, because DDP's own forward overwrites buffers with those of rank 0.
        self.module: nn.Module = model.module
        self._model = model
        parameters, self.parameters = named_parameters(model)
        require_separate(parameters)
        self._locations = parameter_locations(model)
        self.device = next(iter(parameters.values())).device
        self.shard_group = Group(model.process_group)
        self.replica_group = replica_group
        ignored = set(map(name_unwrapper(model.module), model.parameters_to_ignore))
        self._left_to_ddp = {name: p for name, p in parameters.items() if name not in ignored}
        self._averaged = ReplicatedParameters(self._left_to_ddp, self.shard_group)
        self._ignored = ReplicatedParameters(
            {name: p for name, p in parameters.items() if name in ignored}, self.shard_group
        )
        self._consume: Consume | None = None
        self._unreduced = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter."""
        return [*self._averaged.spans(), *self._ignored.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the local memory of a span."""
        return (self._averaged if span.name in self._averaged else self._ignored).live(span)

    def publish(self, names: Collection[str]) -> None:
        """All-gather the parts that the ranks wrote."""
        self._averaged.publish(names)
        self._ignored.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of each parameter's memory."""
        require_same_parameters(self._locations)
        return self._averaged.changed(names) | self._ignored.changed(names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Store the callback, and record for each backward pass whether it runs under `no_sync()`."""
        mark_attached(self._model)
        self._consume = consume

        def note(_: torch.Tensor) -> None:
            # require_forward_param_sync records whether the last forward pass ran with synchronization. It is False
            # after a forward pass without gradients too.
            self._unreduced = not (self._model.require_forward_param_sync or self._model.require_backward_grad_sync)

        for parameter in self._left_to_ddp.values():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(note))

    def drain(self) -> None:
        """Pass on this rank's part of the gradients. DDP has averaged all except those of ignored parameters.

        Raises:
            EngineError: gradients of a backward pass under `no_sync()` are not averaged yet.
        """
        assert self._consume is not None
        self._ignored.consume(self._consume, [self.shard_group])  # collective, so before code that can fail on one rank
        if self._unreduced:
            raise EngineError(
                "DistributedDataParallel keeps gradients that it has not averaged: leave no_sync() before a step's "
                "last backward pass."
            )
        self._averaged.consume(self._consume, [])

    def forget(self) -> None:
        """Drop the pending gradients."""
        self._unreduced = False
        self._averaged.forget()
        self._ignored.forget()

    def close(self) -> None:
        """Remove the hooks."""
        if self._consume is not None:
            unmark_attached(self._model)
        self._consume = None
        while self._hooks:
            self._hooks.pop().remove()
