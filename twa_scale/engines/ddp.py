"""DistributedDataParallel: every rank has the whole model, the basis is split over the ranks by rows."""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twa_scale.base.spans import Span
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.module_names import unwrapping
from twa_scale.engines.parameters import (
    claim,
    named_parameters,
    persistent_buffers,
    places,
    release,
    require_in_place,
    writes,
)
from twa_scale.engines.private_attributes import require
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_MODEL = ("parameters_to_ignore", "process_group", "require_forward_param_sync", "require_backward_grad_sync")


class DDPEngine(Engine):
    """Gradients are taken at the step: they are averaged by buckets only when backward has ended."""

    def __init__(self, model: DistributedDataParallel, replica_group: Group) -> None:
        require("torch", model, _MODEL)
        # The inner module: DDP's own forward would overwrite buffers with those of rank 0.
        self.module: nn.Module = model.module
        self._model = model
        parameters, self.parameters = named_parameters(model)
        self._whole, self._places = parameters, places(model)
        self.device = next(iter(parameters.values())).device
        self.shard_group = Group(model.process_group)
        self.replica_group = replica_group
        ignored = set(map(unwrapping(model.module), model.parameters_to_ignore))
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
        """All-gather what each rank wrote."""
        self._averaged.publish(names)
        self._ignored.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return address and version of each parameter's memory."""
        require_in_place(self._places)
        return {name: writes(self._whole[name]) for name in names}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Remember who consumes the gradients, and note of each backward pass whether it was one of `no_sync()`."""
        claim(self._model)
        self._consume = consume

        def note(_: torch.Tensor) -> None:
            # The first is how the last forward pass was made, which counts, but False after one without gradients too.
            self._unreduced = not (self._model.require_forward_param_sync or self._model.require_backward_grad_sync)

        for parameter in self._left_to_ddp.values():
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(note))

    def drain(self) -> None:
        """Hand over this rank's part of the gradients: DDP has averaged all but those that it was told to ignore.

        Raises:
            EngineError: gradients of a backward pass in `no_sync()`, which are not averaged yet.
        """
        assert self._consume is not None
        self._ignored.consume(self._consume, averaged=False)  # collective: before what may fail on one rank
        if self._unreduced:
            raise EngineError(
                "DistributedDataParallel keeps gradients that it has not averaged: leave no_sync() before a step's "
                "last backward pass."
            )
        self._averaged.consume(self._consume, averaged=True)

    def forget(self) -> None:
        """Drop the gradients that wait for the step."""
        self._unreduced = False
        self._averaged.forget()
        self._ignored.forget()

    def close(self) -> None:
        """Forget the consumer, and remove the hooks."""
        if self._consume is not None:
            release(self._model)
        self._consume = None
        while self._hooks:
            self._hooks.pop().remove()
