"""ShardedDataParallel of fairscale: every rank holds the whole model; OSS assigns each tensor to one rank."""

import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from twa_scale.base.spans import Span, whole_tensor
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.parameters import (
    flat_view,
    mark_attached,
    named_parameters,
    parameter_locations,
    persistent_buffers,
    require_same_parameters,
    unmark_attached,
)
from twa_scale.engines.private_attributes import require
from twa_scale.engines.replicated import ReplicatedParameters, buckets
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_MODEL = ("_process_group", "_sharded_optimizers", "_bucket_list", "_trainable_params", "_grad_to_be_reduced")
_OSS = ("_param_to_rank",)
_BUCKET = ("sent", "_params")


def is_sharded_ddp(model: nn.Module) -> bool:
    """Return whether `model` is a ShardedDataParallel of fairscale. fairscale is not imported here."""
    fairscale: Any = sys.modules.get("fairscale.nn.data_parallel")
    return fairscale is not None and isinstance(model, fairscale.ShardedDataParallel)


class ShardedDDPEngine(Engine):
    """An engine for fairscale's ShardedDataParallel. The spans of a rank are the whole tensors that it owns.

    Gradients are reduced to the owner of a tensor. They are read at the step or before the next forward pass, because
    fairscale would divide them once more. Gradients that are views of a bucket are set to zero instead of freed.
    Parameters that OSS does not hold are split over the ranks by rows, and their gradients are averaged at the step.
    """

    def __init__(self, model: Any, replica_group: Group | None = None) -> None:
        require("fairscale", model, _MODEL)
        for oss in model._sharded_optimizers:
            require("fairscale", oss, _OSS)
        for bucket in model._bucket_list:
            require("fairscale", bucket, _BUCKET)
        self._model = model
        # The inner module, because fairscale's own forward overwrites buffers with those of rank 0.
        self.module: nn.Module = model.module
        self._parameters, self.parameters = named_parameters(model)
        self._locations = parameter_locations(model)
        self.device = next(iter(self._parameters.values())).device
        self.shard_group = Group(model._process_group)
        self.replica_group = replica_group or Group.alone()
        owners = {p: rank for oss in model._sharded_optimizers for p, rank in oss._param_to_rank.items()}
        self._owner = {name: owners[p] for name, p in self._parameters.items() if p in owners}
        self._rest = ReplicatedParameters(
            {name: p for name, p in self._parameters.items() if p not in owners}, self.shard_group
        )
        self._consume: Consume | None = None
        self._ran = False
        """Whether a forward pass with gradients has run since gradients were last read."""
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def _owned_names(self) -> Iterator[str]:
        return (name for name, rank in self._owner.items() if rank == self.shard_group.rank)

    def spans(self) -> list[Span]:
        """Return every tensor that this rank owns, and its part of the tensors that have no owner."""
        return [*(whole_tensor(name, self.parameters[name].shape) for name in self._owned_names()), *self._rest.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of the parameter."""
        return self._flat(span.name)[span.start : span.stop]

    def _flat(self, name: str) -> torch.Tensor:
        return flat_view(name, self._parameters[name], self.parameters[name].shape)

    def publish(self, names: Collection[str]) -> None:
        """Broadcast the tensors from their owners, in buckets."""
        for rank in range(self.shard_group.size):
            owned = {n: self._parameters[n] for n, owner in self._owner.items() if owner == rank and n in names}
            for bucket in buckets(owned):
                tensors = [self._flat(name) for name in bucket]
                packed = torch.cat(tensors)
                self.shard_group.copy_from(rank, packed)
                for tensor, values in zip(tensors, packed.split([len(t) for t in tensors]), strict=True):
                    tensor.copy_(values)
        self._rest.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Check that no parameter was replaced. Writes are not compared, because fairscale itself writes parameters."""
        require_same_parameters(self._locations)
        return {}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Pass on reduced gradients before each forward pass, so that accumulation needs no `no_sync`."""
        mark_attached(self._model)
        self._consume = consume
        self._hook = self._model.register_forward_pre_hook(lambda *_: self._before_forward())

    def _before_forward(self) -> None:
        self._take()
        self._ran |= torch.is_grad_enabled()

    def _take(self) -> None:
        """Pass on the gradients that fairscale has reduced, on their owners, and clear them on all ranks."""
        assert self._consume is not None
        if not self._ran:  # the gradients that are marked as reduced were already passed on
            return
        self._ran = False
        reduced = self._reduced()
        for name, p in self._parameters.items():
            if p in reduced:
                if self._owner[name] == self.shard_group.rank and p.grad is not None:
                    self._consume(whole_tensor(name, self.parameters[name].shape), p.grad.reshape(-1))
                _clear(p, bucketed=reduced[p])

    def _reduced(self) -> dict[torch.Tensor, bool]:
        """Return the parameters whose gradient the last backward pass has reduced, and whether it is in a bucket."""
        model = self._model
        bucketed = {p: bucket.sent for bucket in model._bucket_list for p in bucket._params}
        waiting = zip(model._trainable_params, model._grad_to_be_reduced, strict=False)
        unbucketed = {p for p, waits in waiting if not waits and p not in bucketed}
        return {p: True for p, sent in bucketed.items() if sent} | dict.fromkeys(unbucketed, False)

    def drain(self) -> None:
        """Pass on reduced gradients; average and pass on the gradients of parameters that OSS does not hold.

        Raises:
            EngineError: gradients of a backward pass under `no_sync()` are not reduced yet.
        """
        assert self._consume is not None
        self._take()
        reduced = self._reduced()
        pending = [p for p in self._model._trainable_params if p not in reduced]
        if pending:  # the same on every rank; parameters that the loss does not reach are pending without a gradient
            with self.shard_group.agree():
                if any(p.grad is not None and bool(p.grad.any()) for p in pending):
                    raise EngineError(
                        "ShardedDataParallel holds gradients that it has not reduced; leave no_sync() before the last "
                        "backward pass of a step."
                    )
        self._rest.consume(self._consume, [self.shard_group])

    def forget(self) -> None:
        """Drop the gradients, reduced or not."""
        bucketed = {p for bucket in self._model._bucket_list for p in bucket._params}
        for p in self._parameters.values():
            _clear(p, bucketed=p in bucketed)

    def close(self) -> None:
        """Remove the hook."""
        if self._consume is not None:
            unmark_attached(self._model)
        self._consume = None
        if self._hook is not None:
            self._hook.remove()


def _clear(parameter: torch.Tensor, *, bucketed: bool) -> None:
    """Free a gradient. A view of a bucket is set to zero instead, because fairscale sends the bucket."""
    if not bucketed:
        parameter.grad = None
    elif parameter.grad is not None:
        parameter.grad.zero_()
