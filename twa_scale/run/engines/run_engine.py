"""What a run and its plan need to know of an engine."""

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
"""Bytes: weights and gradients are float32."""

Parameters = Mapping[str, ParameterInfo]


class RunEngine(ABC):
    """Holds the model of a run: builds it, runs it, and knows what it costs a rank.

    Args:
        config: of the run.
        ranks: number of ranks that hold one model together.
    """

    needs_group: ClassVar[bool] = True
    """Whether the engine works only in a process group."""
    allows_pods: ClassVar[bool] = True
    """Whether several groups of ranks can hold a model each."""
    counts_micro_batches: ClassVar[bool] = False
    """Whether the average's `step` is called after every micro-batch, as `engine.step` of DeepSpeed is."""

    def __init__(self, config: RunConfig, ranks: int) -> None:
        self.config = config
        self.ranks = ranks

    @abstractmethod
    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model on `device`. Its values are not set: candidates fill them. Collective.

        Args:
            task: builds the plain model.
            world: all ranks.
            device: of this rank.
            mesh: the ranks that hold the model together, where that is not the world.

        Raises:
            ConfigError: a library that is missing, or a model that the engine cannot hold.
        """

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of forward passes."""
        if self.config.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)

    def backward(self, model: nn.Module, loss: torch.Tensor) -> None:
        """Run the backward pass of a loss that is already divided by the number of micro-batches."""
        del model
        loss.backward()

    def load_libraries(self) -> None:
        """Import what a run with this engine imports. `plan` counts its memory.

        Raises:
            ConfigError: a library that is missing.
        """
        return

    @abstractmethod
    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the elements of one parameter in the basis of the first rank, which never has fewer than others."""

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of weights that a rank holds during the whole run."""
        return total(parameters) * ELEMENT

    def partition_bytes(self, parameters: Parameters) -> dict[str, int]:
        """Return the bytes that the library keeps beside the weights, by what they are."""
        del parameters
        return {}

    @abstractmethod
    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of parameters and gradients that exist for a part of a step only, by what they are."""

    @abstractmethod
    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes that a rank sends in a step by ring algorithms, by what they are.

        A gather or a scatter sends (R - 1) / R of its data on each of R ranks, an all-reduce twice that.
        """

    def gathered(self, nbytes: int) -> int:
        """Return the bytes that a rank sends when `nbytes` in all are gathered or scattered along a ring."""
        return int((self.ranks - 1) / self.ranks * nbytes)

    def all_reduced(self, nbytes: int) -> int:
        """Return the bytes that a rank sends when `nbytes` are all-reduced along a ring."""
        return all_reduced(nbytes, self.ranks)


def all_reduced(nbytes: int, ranks: int) -> int:
    """Return the bytes that each of `ranks` ranks sends when `nbytes` are all-reduced along a ring."""
    return int(2 * (ranks - 1) / ranks * nbytes)


def total(parameters: Parameters, *, trainable: bool = False) -> int:
    """Return the number of elements of all parameters, or of those that need a gradient."""
    return sum(prod(info.shape) for info in parameters.values() if info.trainable or not trainable)


def largest(parameters: Parameters) -> int:
    """Return the number of elements of the largest parameter."""
    return max(prod(info.shape) for info in parameters.values())


def equal_part(info: ParameterInfo, ranks: int) -> int:
    """Return the elements of the first rank's part when a parameter's flattening is divided equally."""
    return share(prod(info.shape), 0, ranks)[1]
