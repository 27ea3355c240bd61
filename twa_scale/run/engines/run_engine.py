"""The interface of the engines of a run."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import ClassVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twa_scale.base.spans import share
from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo
from twa_scale.ranks import World
from twa_scale.run.tasks import Task

ELEMENT = 4
"""Bytes of an element of weights and gradients in float32."""

Parameters = Mapping[str, ParameterInfo]


class RunEngine(ABC):
    """An engine of a run: it builds the model, runs its backward pass, and estimates memory and traffic of a rank.

    Args:
        config: the configuration of the run.
        ranks: the number of ranks that hold one model together.
    """

    needs_group: ClassVar[bool] = True
    """Whether the engine needs a process group."""
    allows_pods: ClassVar[bool] = True
    """Whether each of several groups of ranks can hold a model."""
    counts_micro_batches: ClassVar[bool] = False
    """Whether `step` of the average is called after every micro-batch, like `engine.step` of DeepSpeed."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self.config = config
        self.ranks = ranks

    @abstractmethod
    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model on `device`. Its weights need not be initialized. Collective.

        Args:
            task: builds the plain model.
            world: all ranks.
            device: the device of this rank.
            mesh: the ranks that hold the model together; None for all ranks.

        Raises:
            ConfigError: a library is missing, or the engine cannot hold the model.
        """

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context manager of forward passes."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Run the backward pass of a loss that is divided by the number of micro-batches."""
        del model
        loss.backward()

    def load_libraries(self) -> None:
        """Import the libraries of a run with this engine, so that `plan` can measure their memory.

        Raises:
            ConfigError: a library is missing.
        """
        return

    @abstractmethod
    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the number of elements of a parameter on the first rank; no rank has more."""

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the weights that a rank holds during the whole run."""
        return total(parameters) * ELEMENT

    def partition_bytes(self, parameters: Parameters) -> dict[str, int]:
        """Return the bytes that the sharding library allocates in addition to the weights, by description."""
        del parameters
        return {}

    @abstractmethod
    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of parameters and gradients that exist only during a part of a step, by description."""

    @abstractmethod
    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes that a rank sends in a step with ring algorithms, by description.

        In an all-gather or reduce-scatter each of R ranks sends (R - 1) / R of the data, in an all-reduce twice that.
        """

    def gathered(self, nbytes: int) -> int:
        """Return the bytes that a rank sends in a ring all-gather or reduce-scatter of `nbytes` in total."""
        return int((self.ranks - 1) / self.ranks * nbytes)

    def all_reduced(self, nbytes: int) -> int:
        """Return the bytes that a rank sends in a ring all-reduce of `nbytes`."""
        return all_reduced(nbytes, self.ranks)


def all_reduced(nbytes: int, ranks: int) -> int:
    """Return the bytes that each of `ranks` ranks sends in a ring all-reduce of `nbytes`."""
    return int(2 * (ranks - 1) / ranks * nbytes)


def total(parameters: Parameters, *, trainable: bool = False) -> int:
    """Return the number of elements of all parameters, or of those that need a gradient."""
    return sum(prod(info.shape) for info in parameters.values() if info.trainable or not trainable)


def largest(parameters: Parameters) -> int:
    """Return the number of elements of the largest parameter."""
    return max(prod(info.shape) for info in parameters.values())


def equal_part(info: ParameterInfo, ranks: int) -> int:
    """Return the number of elements of the first rank when a flattened parameter is divided equally."""
    return share(prod(info.shape), 0, ranks)[1]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules to shard as units: the items of every ModuleList whose items have the same class."""
    blocks: list[nn.Module] = []
    for child in model.modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(item) for item in child}) == 1:
            blocks += [item for item in child if any(True for _ in item.parameters())]
    return blocks
