"""ShardedDataParallel of fairscale: every rank has the whole model, and OSS says which rank owns which tensor."""

import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from twa_scale.base.spans import Span, whole
from twa_scale.engines.engine import Consume, Engine
from twa_scale.engines.parameters import (
    claim,
    flat,
    named_parameters,
    persistent_buffers,
    places,
    release,
    require_in_place,
)
from twa_scale.engines.private_attributes import require
from twa_scale.engines.replicated import ReplicatedParameters, buckets
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_MODEL = ("_process_group", "_sharded_optimizers", "_bucket_list", "_trainable_params", "_grad_to_be_reduced")
_OSS = ("_param_to_rank",)
_BUCKET = ("sent", "_params")


def is_sharded_ddp(model: nn.Module) -> bool:
    """Whether fairscale has wrapped `model`. Who has such a model has imported fairscale: we need not."""
    fairscale: Any = sys.modules.get("fairscale.nn.data_parallel")
    return fairscale is not None and isinstance(model, fairscale.ShardedDataParallel)


class ShardedDDPEngine(Engine):
    """The spans of a rank are the tensors that it owns, whole: only there are gradients reduced to.

    They are taken at the step, or before the next forward pass: fairscale would divide what is there once more. Where
    it keeps gradients in buckets these stay, and are set to zero. Parameters that OSS was not given are split over the
    ranks by rows, and their gradients averaged at the step.
    """

    def __init__(self, model: Any, replica_group: Group | None = None) -> None:
        require("fairscale", model, _MODEL)
        for oss in model._sharded_optimizers:
            require("fairscale", oss, _OSS)
        for bucket in model._bucket_list:
            require("fairscale", bucket, _BUCKET)
        self._model = model
        # The inner module: fairscale's own forward would overwrite buffers with those of rank 0.
        self.module: nn.Module = model.module
        self._parameters, self.parameters = named_parameters(model)
        self._places = places(model)
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
        """Whether a forward pass that can be followed by backward was made since gradients were taken."""
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def _mine(self) -> Iterator[str]:
        return (name for name, rank in self._owner.items() if rank == self.shard_group.rank)

    def spans(self) -> list[Span]:
        """Return every tensor that this rank owns, and its part of those that nobody does."""
        return [*(whole(name, self.parameters[name].shape) for name in self._mine()), *self._rest.spans()]

    def live(self, span: Span) -> torch.Tensor:
        """Return the parameter's own memory."""
        return flat(span.name, self._parameters[span.name])[span.start : span.stop]

    def publish(self, names: Collection[str]) -> None:
        """Broadcast what each owner wrote, in buckets."""
        for rank in range(self.shard_group.size):
            owned = {n: self._parameters[n] for n, owner in self._owner.items() if owner == rank and n in names}
            for bucket in buckets(owned):
                tensors = [flat(name, owned[name]) for name in bucket]
                packed = torch.cat(tensors)
                self.shard_group.copy_from(rank, packed)
                for tensor, values in zip(tensors, packed.split([len(t) for t in tensors]), strict=True):
                    tensor.copy_(values)
        self._rest.publish(names)

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return nothing but for parameters that were replaced: fairscale itself writes parameters."""
        require_in_place(self._places)
        return {}

    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the module's buffers."""
        return persistent_buffers(self.module)

    def watch(self, consume: Consume) -> None:
        """Consume what has been reduced before each forward pass, so that accumulation needs no `no_sync`."""
        claim(self._model)
        self._consume = consume
        self._hook = self._model.register_forward_pre_hook(lambda *_: self._before_forward())

    def _before_forward(self) -> None:
        self._take()
        self._ran |= torch.is_grad_enabled()

    def _take(self) -> None:
        """Hand over the gradients that fairscale has reduced, on the ranks that own them, and clear them on all."""
        assert self._consume is not None
        if not self._ran:  # what looks reduced was taken before
            return
        self._ran = False
        reduced = self._reduced()
        for name, p in self._parameters.items():
            if p in reduced:
                if self._owner[name] == self.shard_group.rank and p.grad is not None:
                    self._consume(whole(name, self.parameters[name].shape), p.grad.reshape(-1))
                _clear(p, bucketed=reduced[p])

    def _reduced(self) -> dict[torch.Tensor, bool]:
        """Return the parameters whose gradient the last backward pass has reduced, and which lie in a bucket."""
        model = self._model
        bucketed = {p: bucket.sent for bucket in model._bucket_list for p in bucket._params}
        waiting = zip(model._trainable_params, model._grad_to_be_reduced, strict=False)
        single = {p for p, waits in waiting if not waits and p not in bucketed}
        return {p: True for p, sent in bucketed.items() if sent} | dict.fromkeys(single, False)

    def drain(self) -> None:
        """Hand over what is reduced; average and hand over the gradients of parameters that OSS was not given.

        Raises:
            EngineError: gradients of a backward pass in `no_sync()`, which are not reduced yet.
        """
        assert self._consume is not None
        self._take()
        reduced = self._reduced()
        pending = [p for p in self._model._trainable_params if p not in reduced]
        if pending:  # on every rank alike; also where the loss does not reach them, and then they have no gradient
            with self.shard_group.agree():
                if any(p.grad is not None and bool(p.grad.any()) for p in pending):
                    raise EngineError(
                        "ShardedDataParallel keeps gradients that it has not reduced: leave no_sync() before a step's "
                        "last backward pass."
                    )
        self._rest.consume(self._consume, averaged=False)

    def forget(self) -> None:
        """Drop the gradients, reduced or not."""
        bucketed = {p for bucket in self._model._bucket_list for p in bucket._params}
        for p in self._parameters.values():
            _clear(p, bucketed=p in bucketed)

    def close(self) -> None:
        """Remove the hook."""
        if self._consume is not None:
            release(self._model)
        self._consume = None
        if self._hook is not None:
            self._hook.remove()


def _clear(parameter: torch.Tensor, *, bucketed: bool) -> None:
    """Free a gradient; one that is a view of a bucket must stay, since the bucket is what fairscale sends."""
    if not bucketed:
        parameter.grad = None
    elif parameter.grad is not None:
        parameter.grad.zero_()
