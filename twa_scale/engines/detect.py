"""Selection of the engine for a model."""

from math import prod

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from twa_scale.engines.complex_weights import with_real_views
from twa_scale.engines.ddp import DDPEngine
from twa_scale.engines.engine import Engine
from twa_scale.engines.fairscale_fsdp import FairscaleEngine, sharded_by_fairscale
from twa_scale.engines.fairscale_sharded_ddp import ShardedDDPEngine, is_sharded_ddp
from twa_scale.engines.fsdp1 import FSDP1Engine
from twa_scale.engines.fsdp2 import FSDP2Engine
from twa_scale.engines.parameters import require_usable
from twa_scale.engines.plain import PlainEngine
from twa_scale.engines.zero import is_deepspeed, zero_engine
from twa_scale.errors import EngineError
from twa_scale.ranks import Group

_KNOWN = (
    "a plain torch.nn.Module, DistributedDataParallel, a module sharded by fully_shard (FSDP2) or by torch's or "
    "fairscale's FullyShardedDataParallel, one with DTensor parameters (tensor parallelism), fairscale's "
    "ShardedDataParallel, or a DeepSpeedEngine with ZeRO 1, 2 or 3"
)


def choose_engine(model: object, replica_group: dist.ProcessGroup | None = None) -> Engine:
    """Return the engine for `model`. It presents complex tensors as their real views.

    Args:
        model: the model as its sharding library returned it, or a custom `Engine`.
        replica_group: the ranks that hold the same spans and see different data, if the model's wrapper does not
            define them: this rank's counterparts in the other pods.

    Raises:
        EngineError: no engine supports the model, the model has no parameters, or `replica_group` is not a process
            group.
    """
    raw_group: object = replica_group
    if not (
        raw_group is None or raw_group == dist.GroupMember.NON_GROUP_MEMBER or isinstance(raw_group, dist.ProcessGroup)
    ):
        raise EngineError(
            f"replica_group: is a {type(replica_group).__name__}; give a torch.distributed process group, as "
            "new_group() or DeviceMesh.get_group() returns."
        )
    return with_real_views(_engine_of(model, replica_group))


def _engine_of(model: object, replica_group: dist.ProcessGroup | None) -> Engine:
    if isinstance(model, Engine):
        return _checked(model, replica_group)
    if not isinstance(model, nn.Module):
        raise EngineError(f"cannot attach to {type(model).__name__}: give {_KNOWN}.")
    if any(isinstance(child, torch.jit.ScriptModule) for child in model.modules()):
        raise EngineError(
            "cannot attach to a TorchScript module (torch.jit): its parameters cannot be reached as those of a module. "
            "Attach to the module before torch.jit.script or torch.jit.trace; torch.compile is supported."
        )
    require_usable(model)
    if is_deepspeed(model):
        return zero_engine(model, Group.alone() if replica_group is None else Group(replica_group))
    unwrapped = _uncompiled(model)
    if next(model.parameters(), None) is None:
        raise EngineError("the model has no parameters to average.")
    group = None if replica_group is None else Group(replica_group)
    replicas = group or Group.alone()
    match unwrapped:
        case DistributedDataParallel():
            return DDPEngine(unwrapped, replicas)
        case _ if is_sharded_ddp(unwrapped):
            return ShardedDDPEngine(unwrapped, group)
        case _ if sharded_by_fairscale(unwrapped):
            return FairscaleEngine(unwrapped, group)
        case _ if any(isinstance(child, FullyShardedDataParallel) for child in unwrapped.modules()):
            return FSDP1Engine(unwrapped, group)
        case _ if any(isinstance(child, FSDPModule) for child in unwrapped.modules()):
            return FSDP2Engine(unwrapped, group)
        case _ if (kind := _unsupported_wrapper(unwrapped)) is not None:
            raise EngineError(f"cannot attach to a model that holds {kind}: give {_KNOWN}.")
        case _ if any(isinstance(parameter, DTensor) for parameter in unwrapped.parameters()):
            return FSDP2Engine(unwrapped, group)  # tensor parallelism alone
        case _:
            return PlainEngine(unwrapped, Group.world() if replica_group is None else replicas)


def _uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that was given to torch.compile, if `model` is its result; otherwise `model`.

    `_modules` is read directly because some wrappers forward getattr to the module that they wrap. A compiled module
    that was sharded afterwards is returned itself, because it holds the sharding.
    """
    inner = model._modules.get("_orig_mod")
    return model if inner is None or isinstance(model, FSDPModule) else inner


def _checked(engine: Engine, replica_group: dist.ProcessGroup | None) -> Engine:
    if replica_group is not None:
        raise EngineError(f"replica_group: {type(engine).__name__} is an Engine; set its `replica_group` instead.")
    _require_tiling(engine)
    return engine


def _require_tiling(engine: Engine) -> None:
    """Check that the spans of a shard group have as many elements as the parameters. Collective.

    Raises:
        EngineError: on every rank, if elements of a parameter belong to no span or to several.
    """
    kind, index = type(engine).__name__, {name: i for i, name in enumerate(engine.parameters)}
    owned = torch.zeros(len(index), dtype=torch.int64, device=engine.device)
    with engine.shard_group.agree():
        for span in engine.spans():
            if span.name not in index:
                raise EngineError(f"{kind}: spans() has {span.name!r}, which is not in `parameters`.")
            owned[index[span.name]] += len(span)
    for info, total in zip(engine.parameters.values(), engine.shard_group.sum_(owned).tolist(), strict=True):
        if total != prod(info.shape):
            raise EngineError(
                f"{kind}: the spans of all ranks have {total} elements of {info.name!r}, which has {prod(info.shape)}; "
                "over the shard group each element must be in exactly one span."
            )


def _unsupported_wrapper(model: nn.Module) -> str | None:
    """Return a description of a sharding wrapper that no engine supports, or None.

    Such a model must not be treated as unsharded, because its average would be wrong without an error.
    """
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        return "DeepSpeed ZeRO-3 parameters (attach to the engine that deepspeed.initialize returned)"
    if type(model).__name__ == "DataParallel":
        return "DataParallel (start one process for each GPU, as torchrun does, or set CUDA_VISIBLE_DEVICES to one GPU)"
    if type(model).__name__ == "DeepSpeedEngine":
        return "a DeepSpeedEngine"
    return None
