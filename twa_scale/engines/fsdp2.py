"""FSDP2 (`fully_shard`): each rank holds rows of every parameter and, after the reduce-scatter, of its gradient."""

from collections.abc import Collection
from functools import partial
from typing import cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from twa_scale.comm import Group
from twa_scale.engines.describe import TWICE, flat, named_parameters, persistent_buffers
from twa_scale.engines.protocol import Consume, Engine
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.errors import EngineError
from twa_scale.spans import Span


class FSDP2Engine(Engine):
    """Gradients are taken in post-accumulate hooks, which FSDP2 calls when the local rows are reduced.

    Parameters that FSDP2 was told to ignore are whole on every rank and nobody averages their gradients: their rows
    of the basis are split over the ranks, and their gradients averaged at the step.
    """

    def __init__(self, module: nn.Module, replica_group: Group) -> None:
        self.module = module
        self._reshard()  # after a forward pass the root may hold whole parameters in place of its shards
        parameters, self.parameters = named_parameters(module)
        self._sharded = {name: p for name, p in parameters.items() if isinstance(p, DTensor)}
        self.shard_group = self._one_group()
        self.replica_group = replica_group
        self._local = {name: flat(name, p.to_local()) for name, p in self._sharded.items()}
        self._spans = self._place()
        whole = {name: p for name, p in parameters.items() if name not in self._sharded}
        self._replicated = ReplicatedParameters(whole, self.shard_group)
        self.device = next(iter(self._local.values())).device
        self._consume: Consume | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def _one_group(self) -> Group:
        meshes = {name: parameter.device_mesh for name, parameter in self._sharded.items()}
        first = next(iter(meshes.values()))
        for name, parameter in self._sharded.items():
            if meshes[name].ndim != 1 or parameter.placements != (Shard(0),):
                raise EngineError(
                    f"parameter {name!r} is placed as {parameter.placements} on a {meshes[name].ndim}-D mesh; FSDP2 "
                    "models are supported when sharded on dim 0 over a 1-D mesh. Leave shard_placement_fn and tensor "
                    "parallelism out."
                )
            if meshes[name] != first:
                raise EngineError(
                    f"parameter {name!r} is sharded over another mesh than the first; use one mesh for all."
                )
        return Group(first.get_group())

    def _place(self) -> dict[str, Span]:
        """Learn where the local rows start from how many the ranks before hold: any uneven split will do."""
        counts = self.shard_group.gather([len(local) for local in self._local.values()])
        before = counts[: self.shard_group.rank]
        spans = {}
        for i, (name, local) in enumerate(self._local.items()):
            start = sum(count[i] for count in before)
            spans[name] = Span(name, start, start + len(local))
        return spans

    def _reshard(self) -> None:
        for child in self.module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def spans(self) -> list[Span]:
        """Return the local rows of every parameter, some of them empty."""
        return [*self._spans.values(), *self._replicated.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of the local shard."""
        if span.name not in self._local:
            return self._replicated.live(span)
        offset = self._spans[span.name].start
        return self._local[span.name][span.start - offset : span.stop - offset]

    def publish(self, names: Collection[str]) -> None:
        """Drop whole parameters that a forward pass left behind, so that the next one gathers the new shards."""
        self._reshard()
        self._replicated.publish(names)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers, which FSDP2 does not shard."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Consume the local rows of each gradient right after their reduce-scatter."""
        self._consume = consume
        for name, parameter in self._sharded.items():
            if self.parameters[name].trainable:
                hook = partial(self._take, span=self._spans[name])
                handle = cast(torch.Tensor, parameter).register_post_accumulate_grad_hook(hook)
                self._hooks.append(handle)

    def _take(self, parameter: torch.Tensor, span: Span) -> None:
        if parameter.grad is None:
            raise EngineError(TWICE)
        assert self._consume is not None
        self._consume(span, cast(DTensor, parameter.grad).to_local().reshape(-1))
        parameter.grad = None

    def drain(self) -> None:
        """Average and hand over the gradients of ignored parameters; the hooks have consumed all others."""
        assert self._consume is not None
        self._replicated.consume(self._consume, averaged=False)

    def forget(self) -> None:
        """Drop the gradients; what FSDP2 keeps unreduced after a backward pass without sync is out of reach."""
        self._replicated.forget()
        for parameter in self._sharded.values():
            parameter.grad = None

    def close(self) -> None:
        """Remove the hooks."""
        self._consume = None
        while self._hooks:
            self._hooks.pop().remove()
