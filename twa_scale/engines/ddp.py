"""DistributedDataParallel: every rank has the whole model, the basis is split over the ranks by rows."""

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twa_scale.comm import Group
from twa_scale.engines.describe import named_parameters, persistent_buffers
from twa_scale.engines.protocol import Consume
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.spans import Span


class DDPEngine:
    """Gradients are taken at the step: they are averaged by buckets only when backward has ended."""

    def __init__(self, model: DistributedDataParallel) -> None:
        # The inner module: DDP's own forward would overwrite buffers with those of rank 0.
        self.module: nn.Module = model.module
        parameters, self.parameters = named_parameters(model)
        self.device = next(iter(parameters.values())).device
        self.shard_group = Group(model.process_group)
        self.replica_group = Group.alone()
        self._replicated = ReplicatedParameters(parameters, self.shard_group)
        self._consume: Consume | None = None

    def spans(self) -> list[Span]:
        """Return this rank's part of every parameter."""
        return self._replicated.spans()

    def live(self, span: Span) -> torch.Tensor:
        """Return the local memory of a span."""
        return self._replicated.live(span)

    def publish(self, names: Collection[str]) -> None:
        """All-gather what each rank wrote."""
        self._replicated.publish(names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Remember who consumes the gradients."""
        self._consume = consume

    def drain(self) -> None:
        """Hand over this rank's part of the gradients that DDP has averaged."""
        assert self._consume is not None
        self._replicated.consume(self._consume, averaged=True)

    def forget(self) -> None:
        """Drop the gradients that wait for the step."""
        self._replicated.forget()

    def close(self) -> None:
        """Forget the consumer."""
        self._consume = None
