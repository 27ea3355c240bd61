"""What FSDP2 gathers at once: its parameter groups, with a word before each is gathered. No public way leads there."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from twa_scale.engines.parameters import TWICE
from twa_scale.engines.private_attributes import require
from twa_scale.errors import EngineError

Settle = Callable[[], torch.cuda.Event | None]
"""Lets the current stream find the weights of a unit; returns what other streams have to await, if anything."""

_GROUP = ("fsdp_params", "_partial_reduce_output")
_PARAMETER = ("sharded_param", "unsharded_accumulated_grad", "_unsharded_param")
_UNSHARD = ("unshard", "_wait_all_gather_streams_on_event")


def parameter_groups(wrapped: Iterable[FSDPModule]) -> list[Any]:
    """Return the groups of parameters that FSDP2 gathers together, once each, in the order of the modules.

    Raises:
        EngineError: a torch that calls what engines need otherwise.
    """
    found: dict[int, Any] = {}
    for child in wrapped:
        require("torch", child, ["_get_fsdp_state"])
        state: Any = child._get_fsdp_state()
        if not hasattr(state, "_fsdp_param_groups"):
            require("torch", state, ["_fsdp_param_group"])  # before torch 2.12
        for group in getattr(state, "_fsdp_param_groups", None) or filter(None, [state._fsdp_param_group]):
            require("torch", group, _GROUP)
            for parameter in group.fsdp_params:
                require("torch", parameter, _PARAMETER)
            found[id(group)] = group
    return list(found.values())


class SettlingUnshard:
    """Stands in for `unshard` of a group, through which forward, backward and prefetching get at its weights.

    Args:
        group: that of FSDP2.
        module: whose state dicts read and write the weights, too.
        settle: called before either.
    """

    def __init__(self, group: Any, module: nn.Module, settle: Settle) -> None:
        self._group = group
        self._unshard = group.unshard
        self.settle = settle
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        held = {id(p.sharded_param) for p in group.fsdp_params}
        for child in module.modules():
            if any(id(p) in held for p in child.parameters(recurse=False)):
                self._hooks.append(child.register_state_dict_pre_hook(self._settle))
                self._hooks.append(child.register_load_state_dict_pre_hook(self._settle))
        group.unshard = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Settle, and let the streams that gather wait for it, too: they do not wait for the current one."""
        if event := self.settle():
            self._group._wait_all_gather_streams_on_event(event)
        return self._unshard(*args, **kwargs)

    def _settle(self, *_: object) -> None:
        self.settle()

    def remove(self) -> None:
        """Put FSDP2's own back, unless something else stands there by now."""
        for hook in self._hooks:
            hook.remove()
        if vars(self._group).get("unshard") is self:
            del self._group.unshard


def settling(group: Any) -> SettlingUnshard | None:
    """Return what stands in for `unshard` of a group, if it is ours."""
    stand_in = vars(group).get("unshard")
    return stand_in if isinstance(stand_in, SettlingUnshard) else None


def require_own_unshard(groups: Iterable[Any]) -> None:
    """Raise EngineError where `SettlingUnshard` cannot be put: another torch, another average, or another library."""
    for group in groups:
        if settling(group):
            raise EngineError(TWICE)
        missing = [name for name in _UNSHARD if not hasattr(group, name)]
        if missing or "unshard" in vars(group):
            why = f"torch {torch.__version__} has no {missing[0]}" if missing else "something has replaced its unshard"
            raise EngineError(
                f"combine: 'forward' has to know when FSDP2 gathers a unit, but {why}; set `combine: step`."
            )
