"""What the average needs of whatever shards a model."""

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
    """One parameter of the model, described alike on every rank; tied parameters are one, under their first name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    aliases: tuple[str, ...]
    """Every name it goes by, its own first."""


def calling(call: Callable[[], None], leaves: Iterable[torch.Tensor]) -> list[RemovableHandle]:
    """Call `call` when autograd has a gradient of one of `leaves`, before it is accumulated."""
    return [leaf.register_hook(lambda _: call()) for leaf in leaves]


Consume = Callable[[Span, torch.Tensor], None]
"""Called with a local span and its gradient (1-D, averaged over the data-parallel ranks), which is freed afterwards."""


class LossScale(ABC):
    """A loss scaler that an engine keeps by itself."""

    @abstractmethod
    def value(self) -> float:
        """Return the factor that the present gradients carry."""

    @abstractmethod
    def update(self, overflow: bool) -> None:
        """Learn whether these gradients were finite, which decides the next factor."""


class _Complete(ABCMeta):
    """Makes an incomplete engine an error when it is constructed: what it lacks would be missed in the middle of a run.

    ABCMeta alone knows nothing of attributes, and raises a TypeError.
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


class Engine(metaclass=_Complete):
    """A model whose weights are held by one shard group, each rank knowing only its spans.

    Left out on purpose: forward, backward and the optimizer, which stay the user's; full tensors, which no rank has;
    and everything about candidates.

    Raises:
        EngineError: at construction, where a subclass lacks a method or an attribute that has no default.
    """

    module: nn.Module
    """The model to run a forward pass with."""
    device: torch.device
    shard_group: Group
    """The ranks that hold the weights once: coefficient gradients are summed over it."""
    replica_group: Group
    """Ranks that hold the same spans and see other data: coefficient gradients are averaged over it."""
    parameters: dict[str, ParameterInfo]
    """By name without wrappers, in the model's order."""
    loss_scale: LossScale | None = None
    keeps_gradients: bool = False
    """Set before `watch`: whether each gradient is handed over once a step, in `drain`, summed over backward passes."""
    keeps_optimizer: bool = False
    """Set before `check`: whether the optimizer that came with the model goes on afterwards, and keeps its state."""
    averages_replicas: bool = False
    """Whether the gradients that are handed over are means over `replica_group` already."""

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the average that came with the model, in the JSON of its own engine perhaps."""
        return {}

    def check(self) -> None:
        """Raise EngineError where the model can be read and written, but an average of it not be trained."""
        return

    def boundary(self) -> bool:
        """Return whether gradients are complete: False for a micro-batch of an engine that counts them itself."""
        return True

    @abstractmethod
    def spans(self) -> list[Span]:
        """Return the spans of this rank: over the shard group they tile every parameter exactly once.

        A span may be strided (`Span.run`); its order of elements is that of `live` and of the gradients.
        """

    @abstractmethod
    def live(self, span: Span) -> torch.Tensor:
        """Return the live memory of a local span: 1-D, contiguous, what is written there is what the model uses."""

    @abstractmethod
    def publish(self, names: Collection[str]) -> None:
        """Make what was written to `live` of these parameters visible to the next forward pass. Collective."""

    def changed(self, names: Collection[str]) -> dict[str, object]:
        """Return, for each of these parameters of this rank, what is another value once something has written it.

        It is asked after each write of the average, and compared at the next step. Parameters that are left out are not
        compared.

        Raises:
            EngineError: a parameter that was replaced by another.
        """
        return {}

    def sharded(self, span: Span, values: torch.Tensor) -> torch.Tensor | None:
        """Return values of this span as a DTensor that shares their memory and is sharded as the parameter is.

        None where the span is no whole local part of a DTensor.
        """
        return None

    def steps_taken(self) -> int | None:
        """Return how many steps the optimizer has taken, where the engine's library counts them."""
        return None

    def units(self) -> list[list[Span]]:
        """Return local spans by what the model uses at once, in the order of forward passes: for `before_use`.

        Raises:
            EngineError: nothing tells the engine when weights are used.
        """
        raise EngineError(
            "combine: 'forward' needs a model whose units fully_shard (FSDP2) gathers one after the other; set "
            "`combine: step`, or shard the model with fully_shard (`engine: fsdp2` of a run)."
        )

    def before_use(self, settle: Callable[[int], torch.cuda.Event | None]) -> None:
        """From now on call `settle(i)` before the weights of `units()[i]` are used.

        The current stream may use them then; other streams first have to wait for the event that it returns, if any.
        """
        raise EngineError(
            f"combine: 'forward': {type(self).__name__} has units(), but no before_use() that says when they are used."
        )

    @abstractmethod
    def buffers(self) -> dict[str, torch.Tensor]:
        """Return the buffers that a checkpoint holds, live and whole on every rank, by name without wrappers."""

    @abstractmethod
    def watch(self, consume: Consume) -> None:
        """From now on hand every gradient of a local span to `consume`, as soon as it is final, and free it."""

    def on_gradient(self, call: Callable[[], None]) -> list[RemovableHandle]:
        """Call `call` in every backward pass that reaches a parameter, as soon as it does on this rank.

        Returns:
            What stops it.
        """
        leaves = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return calling(call, leaves)

    @abstractmethod
    def drain(self) -> None:
        """Hand over the gradients that could not be handed over during backward. Collective.

        What may fail on one rank only comes after the collectives, or inside `Group.agree`: then `step` raises the
        error on every rank.
        """

    @abstractmethod
    def forget(self) -> None:
        """Drop the gradients that parameters hold now."""

    @abstractmethod
    def close(self) -> None:
        """Stop watching."""


_REQUIRED: dict[str, type] = {
    "module": nn.Module,
    "device": torch.device,
    "shard_group": Group,
    "replica_group": Group,
    "parameters": dict,
}
