"""FullyShardedDataParallel of fairscale: flat parameters as in FSDP1, or single parameters sharded the same way."""

import sys
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from twa_scale.engines.flat_parameters import FlatEngine, FlatUnit, Member, is_flat, one_group
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_WRAPPER = (
    "params",
    "process_group",
    "move_params_to_cpu",
    "_has_shared_params",
    "has_full_params",
    "_free_full_params",
    "_use_fp32_param_shard",
)
_PARAMETER = ("_is_sharded",)
_SINGLE = ("_orig_size",)
_FLAT = ("_param_infos", "_param_numels", "_param_shapes", "_shared_param_infos")


def sharded_by_fairscale(model: nn.Module) -> list[Any]:
    """Return the FSDP modules of fairscale in `model`. fairscale is not imported; such a model has imported it."""
    fairscale: Any = sys.modules.get("fairscale.nn.data_parallel")
    wrapper = () if fairscale is None else fairscale.FullyShardedDataParallel
    return [child for child in model.modules() if isinstance(child, wrapper)]


class FairscaleEngine(FlatEngine):
    """An engine for fairscale's FullyShardedDataParallel, which shards as FSDP1 does.

    With `flatten_parameters=False` each parameter is a flat parameter of one tensor. fairscale also shards frozen
    parameters.
    """

    def __init__(self, module: nn.Module, replica_group: Group | None = None) -> None:
        wrapped = sharded_by_fairscale(module)
        for child in wrapped:
            require("fairscale", child, _WRAPPER)
        group = one_group([child.process_group for child in wrapped], "fairscale FullyShardedDataParallel")
        locations: dict[int, list[tuple[int, str]]] = {}
        for child in module.modules():
            for name, parameter in child._parameters.items():
                locations.setdefault(id(parameter), []).append((id(child), name))
        units = [_Unit(child, p, locations[id(p)], group) for child in wrapped for p in child.params]
        super().__init__(module, units, group, replica_group or Group.alone())


class _Unit(FlatUnit):
    """A parameter that fairscale has sharded, flat or single."""

    def __init__(self, wrapper: Any, parameter: Any, locations: list[tuple[int, str]], group: Group) -> None:
        require("fairscale", parameter, (*_PARAMETER, *(_FLAT if is_flat(parameter) else _SINGLE)))
        if wrapper.move_params_to_cpu or wrapper._has_shared_params:
            raise EngineError(
                "fairscale FullyShardedDataParallel with move_params_to_cpu (cpu_offload) or append_shared_param is "
                "not supported: leave them out."
            )
        self.group = group
        self.whole = not parameter._is_sharded
        self._wrapper = wrapper
        self._parameter = parameter
        if not is_flat(parameter):
            only = Member(self, 0, tuple(parameter._orig_size), parameter.requires_grad)
            self.members = dict.fromkeys(locations, only)
            return
        self.members = dict(self._flattened())
        for _, _, module, name, owner, owned in parameter._shared_param_infos:
            self.members[id(module), name] = self.members[id(owner), owned]

    def _flattened(self) -> Iterator[tuple[tuple[int, str], Member]]:
        p = self._parameter
        starts = accumulate(p._param_numels, initial=0)
        for (_, module, name), shape, start in zip(p._param_infos, p._param_shapes, starts, strict=False):
            yield (id(module), name), Member(self, start, tuple(shape), p.requires_grad)

    def local(self) -> torch.Tensor:
        memory: torch.Tensor = getattr(self._parameter, "_fp32_shard", self._parameter)
        return memory.detach().view(-1)

    def gradient(self) -> torch.Tensor | None:
        gradient: torch.Tensor | None = self._parameter.grad
        if gradient is None:
            return None
        if gradient.numel() != len(self.local()):
            raise EngineError(
                "fairscale holds gradients that it has not reduced; leave no_sync() before the last backward pass of a "
                "step."
            )
        return gradient.detach().view(-1)

    def leaf(self) -> torch.Tensor:
        leaf: torch.Tensor = self._parameter
        return leaf

    def forget(self) -> None:
        self._parameter.grad = None
        self._parameter.__dict__.pop("_saved_grad_shard", None)  # left by a backward pass before one under no_sync

    def reshard(self) -> None:
        if self._wrapper.has_full_params:
            self._wrapper._free_full_params()
            self._wrapper._use_fp32_param_shard()
