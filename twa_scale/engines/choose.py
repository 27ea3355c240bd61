"""Finding the engine of a model."""

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from twa_scale.comm import Group
from twa_scale.engines.ddp import DDPEngine
from twa_scale.engines.fsdp2 import FSDP2Engine
from twa_scale.engines.plain import PlainEngine
from twa_scale.engines.protocol import Engine
from twa_scale.errors import EngineError

_KNOWN = "a plain torch.nn.Module, DistributedDataParallel, or a module sharded by fully_shard (FSDP2)"


def choose_engine(model: object, replica_group: dist.ProcessGroup | None = None) -> Engine:
    """Return the engine for `model`.

    Args:
        model: what a user trains.
        replica_group: the ranks that hold the same spans and see other data, when those are not what the model's own
            wrapper says: this rank's counterparts in the other pods.

    Raises:
        EngineError: a kind of model that no engine here knows, or one without parameters.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"cannot attach to {type(model).__name__}: give {_KNOWN}.")
    unwrapped = getattr(model, "_orig_mod", model)  # torch.compile keeps the module that it compiled here
    if next(model.parameters(), None) is None:
        raise EngineError("the model has no parameters: there is nothing to average.")
    replicas = Group.alone() if replica_group is None else Group(replica_group)
    match unwrapped:
        case DistributedDataParallel():
            return DDPEngine(unwrapped, replicas)
        case _ if any(isinstance(child, FSDPModule) for child in unwrapped.modules()):
            return FSDP2Engine(unwrapped, replicas)
        case _ if (kind := _foreign(unwrapped)) is not None:
            raise EngineError(f"cannot attach to a model that holds {kind}: give {_KNOWN}.")
        case _:
            return PlainEngine(unwrapped, Group.world() if replica_group is None else replicas)


def _foreign(model: nn.Module) -> str | None:
    """Name what shards the model behind our back, if anything does: treating it as whole would be silently wrong."""
    if any(isinstance(child, FullyShardedDataParallel) for child in model.modules()):
        return "FullyShardedDataParallel (FSDP1)"
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return "DTensor parameters without fully_shard"
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3 parameters"
    if type(model).__name__ in ("DeepSpeedEngine", "DataParallel", "ShardedDataParallel"):
        return type(model).__name__
    return None
