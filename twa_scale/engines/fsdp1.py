"""FSDP1 (`FullyShardedDataParallel`): each rank holds an equal part of every flat parameter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor

from twa_scale.engines.flat_parameters import FlatEngine, FlatUnit, Member, one_group
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError
from twa_scale.ranks import Group
from twa_scale.version import TESTED_TORCH

_MODULE = ("_handle", "_is_root", "_sync_gradients")
_HANDLE = ("flat_param", "uses_sharded_strategy", "reshard", "post_reshard", "_prefetched")
_FLAT = (
    "_params",
    "_shared_params",
    "_param_infos",
    "_shared_param_infos",
    "_shapes",
    "_fqns",
    "_contiguities",
    "_param_extensions",
    "_numels_with_padding",
    "_is_padding_mask",
)


class FSDP1Engine(FlatEngine):
    """An engine for FSDP1, with or without `use_orig_params`. Spans come from the metadata of the flat parameters."""

    def __init__(self, module: nn.Module, replica_group: Group | None = None) -> None:
        wrapped = FullyShardedDataParallel.fsdp_modules(module)
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            raise EngineError(
                "FullyShardedDataParallel over tensor parallelism (DTensor) is not supported: use fully_shard."
            )
        process_groups: list[Any] = [child.process_group for child in wrapped]
        group = one_group(process_groups, "FullyShardedDataParallel")
        replicas = _replicas(wrapped, group, replica_group)
        with _translate_attribute_errors():
            # The handle is None if the FSDP modules inside a module hold all of its parameters.
            handles: list[Any] = [child._handle for child in wrapped]
        units = [_Unit(child, handle, group) for child, handle in zip(wrapped, handles, strict=True) if handle]
        super().__init__(module, units, group, replicas)
        self.averages_replicas = replicas is not replica_group


def _replicas(wrapped: Sequence[FullyShardedDataParallel], group: Group, replica_group: Group | None) -> Group:
    """Return the replica group of HYBRID_SHARD, or the given one."""
    hybrid = (ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2)
    # `__dict__`, because getattr would continue the search in the wrapped module.
    process_groups = [child.__dict__.get("_inter_node_pg") for child in wrapped]
    defined_groups = [process_group for process_group in process_groups if process_group is not None]
    if not defined_groups:
        if any(child.sharding_strategy in hybrid for child in wrapped):
            raise _missing_attribute("_inter_node_pg")
        return replica_group or Group.alone()
    if len(defined_groups) < len(wrapped):
        raise EngineError("only some modules of this model use HYBRID_SHARD; use it for all FSDP modules or for none.")
    hybrid_group = one_group(defined_groups, "HYBRID_SHARD")
    if replica_group is not None and hybrid_group.size > 1:
        raise EngineError(
            "replica_group: HYBRID_SHARD has its own replicas, over which FSDP averages gradients; leave "
            "replica_group out, or use FULL_SHARD on the process group of each pod."
        )
    if group.size == 1 and hybrid_group.size > 1:
        raise EngineError(
            "HYBRID_SHARD with one rank in a shard group is not supported: torch divides such gradients without "
            "summing them. Use DistributedDataParallel, or shard over at least two ranks."
        )
    return replica_group or hybrid_group


class _Unit(FlatUnit):
    """A flat parameter of torch. Its metadata and storages are private attributes."""

    def __init__(self, module: FullyShardedDataParallel, handle: Any, group: Group) -> None:
        self.group = group
        self._module: Any = module
        self._handle = handle
        self._unreduced = False
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        if module.cpu_offload.offload_params:
            raise EngineError(
                "CPUOffload(offload_params=True) is not supported: FSDP1 loses gradients there when they are "
                "accumulated. Leave it out, or use fully_shard with CPUOffloadPolicy."
            )
        require("torch", module, _MODULE)
        require("torch", handle, _HANDLE)
        require("torch", handle.flat_param, _FLAT)
        with _translate_attribute_errors():
            self._flat = flat = handle.flat_param
            self._parameters = flat._params and [*flat._params, *flat._shared_params]
            self.whole = not handle.uses_sharded_strategy
            self.members = {key: self._member(index, start) for key, index, start in self._flattened()}
            for tied in flat._shared_param_infos:
                owner = self.members[id(tied.prim_module), tied.prim_param_name]
                self.members[id(tied.module), tied.param_name] = owner

    def _flattened(self) -> Iterator[tuple[tuple[int, str], int, int]]:
        """Yield ((module id, name), index, offset) of each tensor. Padding counts for offsets but is not yielded."""
        flat = self._flat
        ends = accumulate(flat._numels_with_padding)
        starts = (end - numel for end, numel in zip(ends, flat._numels_with_padding, strict=True))
        kept = (start for start, padding in zip(starts, flat._is_padding_mask, strict=True) if not padding)
        for i, (info, start) in enumerate(zip(flat._param_infos, kept, strict=True)):
            yield (id(info.module), info.param_name), i, start

    def _member(self, i: int, start: int) -> Member:
        flat = self._flat
        if not flat._contiguities[i] or flat._param_extensions[i] is not None:
            raise EngineError(
                f"parameter {flat._fqns[i]!r} is not flattened in row-major order (channels_last, or a tensor "
                "subclass); call .contiguous() on it before FullyShardedDataParallel."
            )
        trainable = flat.requires_grad if flat._params is None else flat._params[i].requires_grad
        return Member(self, start, tuple(flat._shapes[i]), trainable)

    @property
    def _started(self) -> bool:
        """Whether a forward pass has run. Before it, there are no separate local shard and no gathered weights."""
        with _translate_attribute_errors():
            return self._module._is_root is not None

    def local(self) -> torch.Tensor:
        with _translate_attribute_errors():
            memory: torch.Tensor = self._flat._local_shard if self._started else self._flat
        return memory.detach()

    def gradient(self) -> torch.Tensor | None:
        gradient: torch.Tensor | None = self._flat.grad
        if gradient is None or (self._parameters and all(p.grad is None for p in self._parameters)):
            return None  # as in torch, the gradients of the original parameters take precedence
        if self._unreduced or gradient.shape != self.local().shape:
            raise EngineError(
                "FSDP1 holds gradients that it has not reduced; leave no_sync() before the last backward pass of a "
                "step."
            )
        return gradient.detach()

    def leaf(self) -> torch.Tensor:
        leaf: torch.Tensor = self._flat
        return leaf

    def forget(self) -> None:
        self._unreduced = False
        self._flat.__dict__.pop("_saved_grad_shard", None)  # left by a backward pass before one under no_sync
        for parameter in (self._flat, *(self._parameters or ())):
            parameter.grad = None

    def reshard(self) -> None:
        if not self._started:
            return
        with _translate_attribute_errors():
            self._handle.reshard(not self.whole)
            self._handle.post_reshard()
            self._handle._prefetched = False
        # FSDP1 gathers into one of these storages, which depends on mixed precision and on training or evaluation.
        for gathered in ("_full_param_padded", "_full_prec_full_param_padded"):
            if hasattr(self._flat, gathered):
                getattr(self._flat, gathered).untyped_storage().resize_(0)

    def watch(self) -> None:
        """Record for each backward pass whether it ran under `no_sync`. With NO_SHARD the shape does not show it."""

        def record(_: torch.Tensor) -> None:
            self._unreduced = not self._module._sync_gradients

        if self._flat.requires_grad:
            self._hook = self._flat.register_post_accumulate_grad_hook(record)

    def close(self) -> None:
        if self._hook is not None:
            self._hook.remove()


@contextmanager
def _translate_attribute_errors() -> Iterator[None]:
    """Turn an AttributeError into an EngineError that names the version of torch."""
    try:
        yield
    except AttributeError as error:
        raise _missing_attribute(error.name) from error


def _missing_attribute(name: str | None) -> EngineError:
    return EngineError(
        f"FullyShardedDataParallel of torch {torch.__version__} has no {name!r}, which this version of twa_scale "
        f"needs; use fully_shard, or torch {TESTED_TORCH}."
    )
