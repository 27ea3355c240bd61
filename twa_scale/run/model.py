"""Building the model of a run so that no rank ever holds it whole, unless its engine wants it whole."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from twa_scale.config import RunConfig
from twa_scale.engines.zero import is_deepspeed
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.deepspeed import build_zero
from twa_scale.run.tasks import Task

ZERO_ENGINES = ("zero1", "zero2", "zero3")


class _EmptyOnMeta(TorchFunctionMode):
    """Gives what is created uninitialized, as parameters are, no memory; computed buffers keep their values."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def pod_mesh(config: RunConfig, world: World, device: torch.device) -> DeviceMesh | None:
    """Return the ranks as a mesh ("pods", "ranks"), or None where there is one pod only. Collective.

    Raises:
        ConfigError: `pods` that do not fit the number of ranks or the engine.
    """
    resolve_engine(config.engine, world, config.pods)
    if config.pods == 1:
        return None
    return init_device_mesh(device.type, (config.pods, world.size // config.pods), mesh_dim_names=("pods", "ranks"))


def build_model(
    config: RunConfig, task: Task, world: World, device: torch.device, pod: DeviceMesh | None = None
) -> nn.Module:
    """Return the task's model as `engine` says, on `device`; its values are not set: candidates will fill them.

    Args:
        config: the run.
        task: builds the model.
        world: all ranks.
        device: of this rank.
        pod: the ranks that hold it together, where that is not the world.

    Raises:
        ConfigError: an engine that needs several ranks, or a model whose buffers would be lost.
    """
    engine = resolve_engine(config.engine, world, config.pods)
    if engine in ZERO_ENGINES:
        return build_zero(config, task, world, device)
    if engine == "fsdp2":
        return _sharded(config, task, device, pod or init_device_mesh(device.type, (world.size,)))
    model = task.model().to(device=device, dtype=torch.float32)
    return DistributedDataParallel(model, process_group=pod and pod.get_group()) if engine == "ddp" else model


def resolve_engine(engine: str, world: World, pods: int = 1) -> str:
    """Turn `auto` into an engine: FSDP2 when a pod has several ranks.

    Raises:
        ConfigError: an engine that needs a process group, or ranks that cannot be cut into `pods`.
    """
    if world.size % pods:
        raise ConfigError(
            f"pods: {world.size} ranks cannot be cut into {pods} equal pods; start a multiple of {pods} ranks, or set "
            f"pods to a divisor of {world.size}."
        )
    if engine == "auto":
        return "fsdp2" if world.size > pods else "plain"
    if engine == "plain" and pods not in (1, world.size):
        raise ConfigError(f"pods: with engine: plain each of the {world.size} ranks is a pod; leave pods out.")
    if engine in ZERO_ENGINES and pods > 1:
        raise ConfigError(f"pods: engine {engine!r} holds the average once on all ranks; use engine: fsdp2 or ddp.")
    if engine in ("ddp", "fsdp2", *ZERO_ENGINES) and world.size == 1:
        raise ConfigError(f"engine: {engine!r} needs a process group; start with torchrun, or use engine: plain.")
    return engine


def autocast(config: RunConfig, model: nn.Module, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of forward passes: FSDP2 and DeepSpeed cast by their own settings, others by autocast."""
    if config.precision == "float32" or isinstance(model, FSDPModule) or is_deepspeed(model):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def backward(model: nn.Module, loss: torch.Tensor) -> None:
    """Run a backward pass of a loss that is divided by the number of micro-batches already."""
    if is_deepspeed(model):
        model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
    else:
        loss.backward()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that are sharded and gathered as one: the items of every ModuleList that repeats one class."""
    blocks: list[nn.Module] = []
    for child in model.modules():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(item) for item in child}) == 1:
            blocks += [item for item in child if any(True for _ in item.parameters())]
    return blocks


def _sharded(config: RunConfig, task: Task, device: torch.device, mesh: DeviceMesh) -> nn.Module:
    with _EmptyOnMeta():
        model = task.model().to(torch.float32)
    computed = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
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
