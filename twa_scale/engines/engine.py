"""The interface between the average and a sharding library."""

from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from twa_scale.base.spans import Span
from twa_scale.errors import EngineError
from twa_scale.ranks import Group


@dataclass(frozen=True)
class ParameterInfo:
    """Global metadata of one parameter, equal on every rank. Tied parameters are one, under their first name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    aliases: tuple[str, ...]
    """All names of the parameter, `name` first."""


def register_gradient_hooks(call: Callable[[], None], leaves: Iterable[torch.Tensor]) -> list[RemovableHandle]:
    """Register hooks that call `call` when autograd computes a gradient of one of `leaves`, before accumulation."""
    return [leaf.register_hook(lambda _: call()) for leaf in leaves]


Consume = Callable[[Span, torch.Tensor], None]
"""A callback that takes a local span and its gradient (1-D, averaged over the data-parallel ranks).

The engine frees the gradient when the callback returns.
"""


class LossScale(ABC):
    """The loss scaler of a sharding library that scales the loss itself."""

    @abstractmethod
    def value(self) -> float:
        """Return the factor by which the current gradients are scaled."""

    @abstractmethod
    def update(self, overflow: bool) -> None:
        """Choose the next factor, given whether the gradients overflowed."""


class _CheckedMeta(ABCMeta):
    """A metaclass that raises EngineError when an engine without a required method or attribute is constructed.

    ABCMeta alone raises a TypeError and does not check attributes.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.__abstractmethods__:
            methods = ", ".join(f"{name}()" for name in sorted(cls.__abstractmethods__))
            raise EngineError(f"{cls.__name__} does not implement {methods}, which an Engine must.")
        engine = super().__call__(*args, **kwargs)
        for name, kind in _REQUIRED.items():
            if not hasattr(engine, name):
                raise EngineError(f"{cls.__name__} does not set {name!r} ({kind.__name__}), which an Engine must.")
            if not isinstance(value := getattr(engine, name), kind):
                raise EngineError(
                    f"{cls.__name__} sets {name!r} to a {type(value).__name__}; an Engine needs a {kind.__name__}."
                )
        return engine


class Engine(metaclass=_CheckedMeta):
    """Access to the spans of this rank in a model that one shard group holds.

    The interface excludes forward, backward and the optimizer, which belong to the training script; full tensors,
    which no rank holds; and candidates.

    Raises:
        EngineError: at construction, if a subclass lacks a method or an attribute that has no default.
    """

    module: nn.Module
    """The module whose forward pass is called."""
    device: torch.device
    """The device of the weights."""
    shard_group: Group
    """The ranks that together hold the weights once. Coefficient gradients are summed over it."""
    replica_group: Group
    """The ranks that hold the same spans and see different data. Coefficient gradients are averaged over it."""
    parameters: dict[str, ParameterInfo]
    """All parameters by name without the prefixes of wrappers, in the order of the model."""
    loss_scale: LossScale | None = None
    """The loss scaler of the sharding library, if it has one."""
    keeps_gradients: bool = False
    """Set by the average before `watch`. If True, `drain` passes on each gradient once per step, summed over the
    backward passes; if False, the engine may pass it on during backward."""
    keeps_optimizer: bool = False
    """Set before `check`. If True, training continues with the model's own optimizer, which may hold state."""
    averages_replicas: bool = False
    """Whether the gradients passed to the callback are already means over `replica_group`."""
    complex_names: frozenset[str] = frozenset()
    """The complex parameters and buffers of the model, which are presented as their real views."""

    def _averaging_groups(self) -> list[Group]:
        """Return the groups over which the sharding library averages the gradients of parameters that it shards."""
        return [self.shard_group, self.replica_group] if self.averages_replicas else [self.shard_group]

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the average that came with the model, for example in DeepSpeed's JSON."""
        return {}

    def check(self) -> None:
        """Raise EngineError if the model can be read and written but an average of it cannot be trained."""
        return

    def boundary(self) -> bool:
        """Return whether the gradients are complete.

        It is called once for each micro-batch. An engine whose library counts gradient accumulation counts the
        micro-batch, and returns False for all but the last.
        """
        return True

    @abstractmethod
    def spans(self) -> list[Span]:
        """Return the spans of this rank. Over the shard group, the spans cover every parameter exactly once.

        A span may be strided (`Span.run`). `live` and the gradients have their elements in the order of the span.
        """

    @abstractmethod
    def live(self, span: Span) -> torch.Tensor:
        """Return the memory of a local span in the model, as a 1-D contiguous view."""

    def low_precision(self, span: Span) -> torch.Tensor | None:
        """Return the low-precision copy of a local span that forward passes use, or None if they use `live`."""
        return None

    @abstractmethod
    def publish(self, names: Collection[str]) -> None:
        """Make writes to `live` of these parameters visible to the next forward pass. Collective."""

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return, for each of these parameters of this rank, a value that changes when other code writes it.

        The average reads the values after each of its writes and compares them at the next step. It does not compare
        parameters that are left out.

        Raises:
            EngineError: a parameter was replaced by another.
        """
        return {}

    def sharded(self, span: Span, values: torch.Tensor) -> torch.Tensor | None:
        """Return values of this span as a DTensor that shares their memory and has the placement of the parameter.

        Returns:
            The DTensor, or None if the span is not the whole local part of a DTensor.
        """
        return None

    def steps_taken(self) -> int | None:
        """Return the number of optimizer steps, or None if the sharding library does not count them."""
        return None

    def counters(self) -> Callable[[], None]:
        """Return a function that restores the current values of the sharding library's counters, as of steps."""
        return lambda: None

    def units(self) -> list[list[Span]]:
        """Return the units of `before_use`: lists of local spans that the model uses at once, in forward order.

        Raises:
            EngineError: the engine cannot detect when the model uses weights.
        """
        raise EngineError(
            "combine: 'forward' needs a model whose units fully_shard (FSDP2) gathers one after the other; set "
            "`combine: step`, or shard the model with fully_shard (`engine: fsdp2` of a run)."
        )

    def before_use(self, prepare: Callable[[int], torch.cuda.Event | None]) -> None:
        """Register a callback that runs before the model uses the weights of a unit.

        Args:
            prepare: called with the index of the unit in `units()`. When it returns, the current stream may use the
                weights. Other streams first have to wait for the event that it returns, if any.
        """
        raise EngineError(
            f"combine: 'forward': {type(self).__name__} implements units() but not before_use(); implement both."
        )

    @abstractmethod
    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the persistent buffers, complete on every rank, by name without the prefixes of wrappers."""

    @abstractmethod
    def watch(self, consume: Consume) -> None:
        """Start passing each gradient of a local span to `consume` as soon as it is final, and freeing it."""

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that computes a gradient of a parameter on this rank.

        Returns:
            The handles that remove the hooks.
        """
        leaves = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return register_gradient_hooks(call, leaves)

    @abstractmethod
    def drain(self) -> None:
        """Pass on the gradients that were not passed on during backward. Collective.

        Code that can fail on one rank only has to run after the collectives or inside `Group.agree`, so that `step`
        raises the error on every rank.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop the pending gradients."""

    @abstractmethod
    def close(self) -> None:
        """Stop passing on gradients and remove all hooks."""


_REQUIRED: dict[str, type] = {
    "module": nn.Module,
    "device": torch.device,
    "shard_group": Group,
    "replica_group": Group,
    "parameters": dict,
}
