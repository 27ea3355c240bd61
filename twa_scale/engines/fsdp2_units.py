"""The parameter groups of FSDP2, and a hook before each all-gather. FSDP2 has no public API for either."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from twa_scale.engines.parameters import ALREADY_ATTACHED
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError

Prepare = Callable[[], torch.cuda.Event | None]
"""A function that makes the weights of a unit available to the current stream.

It returns the event that other streams have to wait for, if any.
"""

_GROUP = ("fsdp_params", "_partial_reduce_output")
_PARAMETER = ("sharded_param", "unsharded_accumulated_grad", "_unsharded_param")
_RESET = ("reset_sharded_param", "_sharded_param_data", "_module_info", "pin_memory")
GATHERED = ("_unsharded_param", "_sharded_post_forward_param")
"""Attributes of a parameter of FSDP2 with the tensors that replace the sharded parameter in the module."""
_UNSHARD = ("unshard", "_wait_all_gather_streams_on_event")


def parameter_groups(wrapped: Iterable[FSDPModule]) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers together, in the order of the modules.

    Raises:
        EngineError: this version of torch lacks an attribute that engines need.
    """
    groups: dict[int, Any] = {}
    for child in wrapped:
        require("torch", child, ["_get_fsdp_state"])
        state: Any = child._get_fsdp_state()
        if not hasattr(state, "_fsdp_param_groups"):
            require("torch", state, ["_fsdp_param_group"])  # before torch 2.12
        for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
            require("torch", group, _GROUP)
            for parameter in group.fsdp_params:
                require("torch", parameter, _PARAMETER)
            groups[id(group)] = group
    return list(groups.values())


def keep_memory_of_shards(groups: Iterable[Any]) -> None:
    """Let FSDP2 keep the memory of uneven shards, as torch does from 2.9 on.

    Earlier versions copy them to new memory at the first forward pass and in `load_state_dict`. Parameters in
    page-locked memory and tensor subclasses are left to them.

    Raises:
        EngineError: this version of torch lacks an attribute that is needed for it.
    """
    if torch.__version__ >= "2.9":
        return
    for group in groups:
        for parameter in group.fsdp_params:
            require("torch", parameter, _RESET)
            if "reset_sharded_param" not in vars(parameter):
                parameter.reset_sharded_param = partial(_reset_if_moved, parameter, parameter.reset_sharded_param)


def _reset_if_moved(parameter: Any, reset: Callable[[], None]) -> None:
    info = parameter._module_info
    current = getattr(info.module, info.param_name)
    plain = current is parameter.sharded_param and type(current._local_tensor) is torch.Tensor
    if plain and not parameter.pin_memory and not current.is_meta:
        padded, local = (t.untyped_storage().data_ptr() for t in (parameter._sharded_param_data, current._local_tensor))
        if padded == local > 0:
            return
    reset()


class PreparingUnshard:
    """A replacement for the `unshard` method of a parameter group that first calls `prepare`.

    FSDP2 calls `unshard` for forward, backward and prefetching. State dicts read and write the weights without it, so
    `prepare` is also a hook of the state dict methods.

    Args:
        group: the parameter group of FSDP2.
        module: the model whose state dicts hold the weights.
        prepare: called before each use of the weights.
    """

    def __init__(self, group: Any, module: nn.Module, prepare: Prepare) -> None:
        self._group = group
        self._unshard = group.unshard
        self.prepare = prepare
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        parameter_ids = {id(p.sharded_param) for p in group.fsdp_params}
        for child in module.modules():
            if any(id(p) in parameter_ids for p in child.parameters(recurse=False)):
                self._hooks.append(child.register_state_dict_pre_hook(self._state_dict_hook))
                self._hooks.append(child.register_load_state_dict_pre_hook(self._state_dict_hook))
        group.unshard = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call `prepare`, make the all-gather streams wait for its event, and unshard."""
        if event := self.prepare():
            self._group._wait_all_gather_streams_on_event(event)
        return self._unshard(*args, **kwargs)

    def _state_dict_hook(self, *_: object) -> None:
        self.prepare()

    def remove(self) -> None:
        """Restore the `unshard` of FSDP2, unless other code has replaced it meanwhile."""
        for hook in self._hooks:
            hook.remove()
        if vars(self._group).get("unshard") is self:
            del self._group.unshard


def installed_unshard(group: Any) -> PreparingUnshard | None:
    """Return the `PreparingUnshard` of a group, or None if it has none."""
    replacement = vars(group).get("unshard")
    return replacement if isinstance(replacement, PreparingUnshard) else None


def require_replaceable_unshard(groups: Iterable[Any]) -> None:
    """Check that `PreparingUnshard` can replace the `unshard` of all groups.

    Raises:
        EngineError: another average is attached, another library has replaced `unshard`, or this torch lacks it.
    """
    for group in groups:
        if installed_unshard(group):
            raise EngineError(ALREADY_ATTACHED)
        missing = [name for name in _UNSHARD if not hasattr(group, name)]
        if missing or "unshard" in vars(group):
            reason = (
                f"torch {torch.__version__} has no {missing[0]}" if missing else "something has replaced its unshard"
            )
            raise EngineError(
                f"combine: 'forward' needs a hook before FSDP2 gathers a unit, but {reason}; set `combine: step`."
            )
