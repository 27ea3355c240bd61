"""Engine `ddp`: DistributedDataParallel."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from twa_scale.engines import ParameterInfo
from twa_scale.ranks import World
from twa_scale.run.engines.run_engine import ELEMENT, Parameters, RunEngine, equal_part, total
from twa_scale.run.tasks import Task


class Ddp(RunEngine):
    """Every rank has the whole model and an equal part of the basis."""

    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model in DistributedDataParallel."""
        model = task.model().to(device=device, dtype=torch.float32)
        return DistributedDataParallel(model, process_group=mesh and mesh.get_group())

    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the number of elements of the first of equal parts."""
        return equal_part(info, self.ranks)

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the gradients and of DDP's buckets, which have the same size."""
        return {"gradients and buckets": 2 * total(parameters) * ELEMENT}

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the all-reduce of gradients and the all-gather of weights."""
        nbytes = total(parameters, trainable=True) * ELEMENT
        return {
            "gradient all-reduce (DDP)": self.all_reduced(nbytes),
            "weights all-gather (twa_scale)": self.gathered(nbytes),
        }
