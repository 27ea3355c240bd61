"""Choose the engine of a run by its name in the configuration."""

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from typing_extensions import assert_never

from twa_scale.base.names import plural
from twa_scale.config import RunConfig
from twa_scale.config.kinds import EngineName
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.engines.ddp import Ddp
from twa_scale.run.engines.fsdp2 import Fsdp2
from twa_scale.run.engines.plain import Plain
from twa_scale.run.engines.run_engine import RunEngine
from twa_scale.run.engines.zero import Zero1, Zero2, Zero3


def engine_class(name: EngineName) -> type[RunEngine]:
    """Return the class of the engine of this name."""
    match name:
        case "plain":
            return Plain
        case "ddp":
            return Ddp
        case "fsdp2":
            return Fsdp2
        case "zero1":
            return Zero1
        case "zero2":
            return Zero2
        case "zero3":
            return Zero3
        case _:
            assert_never(name)


def run_engine(config: RunConfig, world: World) -> RunEngine:
    """Return the engine of a run; `auto` is FSDP2 when a pod has several ranks.

    Raises:
        ConfigError: the engine needs a process group, or the ranks cannot be divided into `pods`.
    """
    pods = config.pods
    if world.size % pods:
        raise ConfigError(
            f"pods: {world.size} {plural(world.size, 'rank')} cannot be divided into {pods} equal pods; start a "
            f"multiple of {pods} ranks, or set pods to a divisor of {world.size}."
        )
    if config.engine == "auto":
        name: EngineName = "fsdp2" if world.size > pods else "plain"
    else:
        name = config.engine
    chosen = engine_class(name)
    if name == "plain" and pods not in (1, world.size):
        raise ConfigError(f"pods: with engine: plain each of the {world.size} ranks is a pod; leave pods out.")
    if not chosen.allows_pods and pods > 1:
        raise ConfigError(f"pods: engine {name!r} holds the average once on all ranks; use engine: fsdp2 or ddp.")
    if chosen.needs_group and world.size == 1:
        raise ConfigError(f"engine: {name!r} needs a process group; start with torchrun, or use engine: plain.")
    return chosen(config, world.size // pods)


def pod_mesh(config: RunConfig, world: World, device: torch.device) -> DeviceMesh | None:
    """Return the ranks as a mesh ("pods", "ranks"), or None if there is only one pod. Collective."""
    if config.pods == 1:
        return None
    return init_device_mesh(device.type, (config.pods, world.size // config.pods), mesh_dim_names=("pods", "ranks"))
