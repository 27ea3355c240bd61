"""DistributedDataParallel: every rank has the whole model, the basis is split over the ranks by rows."""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twa_scale.comm import Group
from twa_scale.engines.describe import named_parameters, persistent_buffers
from twa_scale.engines.protocol import Consume, Engine
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.names import normalize
from twa_scale.spans import Span


class DDPEngine(Engine):
    """Gradients are taken at the step: they are averaged by buckets only when backward has ended."""

    def __init__(self, model: DistributedDataParallel, replica_group: Group) -> None:
        # The inner module: DDP's own forward would overwrite buffers with those of rank 0.
        self.module: nn.Module = model.module
        parameters, self.parameters = named_parameters(model)
        self.device = next(iter(parameters.values())).device
        self.shard_group = Group(model.process_group)
        self.replica_group = replica_group
        ignored = {normalize(name) for name in model.parameters_to_ignore}
        self._averaged = ReplicatedParameters(
            {name: p for name, p in parameters.items() if name not in ignored}, self.shard_group
        )
        self._ignored = ReplicatedParameters(
            {name: p for name, p in parameters.items() if name in ignored}, self.shard_group
        )
        self._consume: Consume | None = None

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

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Remember who consumes the gradients."""
        self._consume = consume

    def drain(self) -> None:
        """Hand over this rank's part of the gradients: DDP has averaged all but those that it was told to ignore."""
        assert self._consume is not None
        self._averaged.consume(self._consume, averaged=True)
        self._ignored.consume(self._consume, averaged=False)

    def forget(self) -> None:
        """Drop the gradients that wait for the step."""
        self._averaged.forget()
        self._ignored.forget()

    def close(self) -> None:
        """Forget the consumer."""
        self._consume = None
