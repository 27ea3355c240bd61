"""Engine `plain`: every rank holds the whole model."""

from math import prod

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from twa_scale.engines import ParameterInfo
from twa_scale.ranks import World
from twa_scale.run.engines.run_engine import ELEMENT, Parameters, RunEngine, largest
from twa_scale.run.tasks import Task


class Plain(RunEngine):
    """An unwrapped module. Several ranks are replicas that see different data."""

    needs_group = False

    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model on `device`."""
        return task.model().to(device=device, dtype=torch.float32)

    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the number of elements of the parameter."""
        return prod(info.shape)

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of gradients before their hooks free them."""
        return {"gradients": 2 * largest(parameters) * ELEMENT}

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return no entries: replicas exchange only coefficient gradients."""
        return {}
