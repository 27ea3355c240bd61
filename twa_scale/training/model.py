"""Building the model of a run so that no rank ever holds it whole, unless its engine wants it whole."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from twa_scale.config import RunConfig
from twa_scale.errors import ConfigError
from twa_scale.tasks import Task
from twa_scale.world import World


class _EmptyOnMeta(TorchFunctionMode):
    """Gives what is created uninitialized, as parameters are, no memory; computed buffers keep their values."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def build_model(config: RunConfig, task: Task, world: World, device: torch.device) -> nn.Module:
    """Return the task's model as `engine` says, on `device`; its values are not set: candidates will fill them.

    Raises:
        ConfigError: an engine that needs several ranks, or a model whose buffers would be lost.
    """
    engine = resolve_engine(config.engine, world)
    if engine == "fsdp2":
        return _sharded(config, task, device, world)
    model = task.model().to(device=device, dtype=torch.float32)
    return DistributedDataParallel(model) if engine == "ddp" else model


def resolve_engine(engine: str, world: World) -> str:
    """Turn `auto` into an engine: FSDP2 when there are several ranks."""
    if engine == "auto":
        return "fsdp2" if world.size > 1 else "plain"
    if engine in ("ddp", "fsdp2") and world.size == 1:
        raise ConfigError(f"engine: {engine!r} needs a process group; start with torchrun, or use engine: plain.")
    return engine


def autocast(config: RunConfig, model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of forward passes: FSDP2 casts by its own policy, others by autocast."""
    if config.precision == "float32" or isinstance(model, FSDPModule):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are sharded and gathered as one: the items of every ModuleList that repeats one class."""
    blocks: list[nn.Module] = []
    for child in model.modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(item) for item in child}) == 1:
            blocks += [item for item in child if any(True for _ in item.parameters())]
    return blocks


def _sharded(config: RunConfig, task: Task, device: torch.device, world: World) -> nn.Module:
    with _EmptyOnMeta():
        model = task.model().to(torch.float32)
    computed = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if config.precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    held = set(model.state_dict())
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        if name in computed:
            buffer.copy_(computed[name])
        elif name not in held:
            raise ConfigError(
                f"task: buffer {name!r} of the model is neither computed when it is built nor held by checkpoints, so "
                "that its value would be lost under FSDP2. Register it with a value, or use engine: ddp."
            )
    return model
