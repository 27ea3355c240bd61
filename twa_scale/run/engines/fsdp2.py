"""Engine `fsdp2`: `fully_shard`, block by block."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.overrides import TorchFunctionMode

from twa_scale.base.spans import share
from twa_scale.engines import ParameterInfo
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.engines.blocks import blocks_of
from twa_scale.run.engines.own_values import keeps_values
from twa_scale.run.engines.run_engine import ELEMENT, Parameters, RunEngine, total
from twa_scale.run.tasks import Task


class Fsdp2(RunEngine):
    """Every rank has its rows of every parameter. No rank ever holds a whole model whose values candidates give."""

    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model, sharded before it takes memory.

        One that keeps values of its own, as the base model of an adapter, is first built whole in host memory.

        Raises:
            ConfigError: a buffer whose value would be lost.
        """
        mesh = mesh or init_device_mesh(device.type, (world.size,))
        with _EmptyOnMeta():
            model = task.model().to(torch.float32)
        whole = keeps_values(self.config, model)
        if whole:
            model = task.model().to(torch.float32)
        computed = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
        policy = MixedPrecisionPolicy()
        if self.config.precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        if whole:
            return model.to(device)
        held = set(model.state_dict())
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():
            if name in computed:
                buffer.copy_(computed[name])
            elif name not in held:
                raise ConfigError(
                    f"task: buffer {name!r} of the model is neither computed when it is built nor held by checkpoints, "
                    "so its value would be lost under FSDP2. Register it with a value, or use engine: ddp."
                )
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return no context: FSDP2 casts by its own policy."""
        return nullcontext()

    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the elements of the first rank's rows."""
        rows = info.shape[0] if info.shape else 1
        return share(rows, 0, self.ranks)[1] * (prod(info.shape) // max(rows, 1))

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the rank's own rows."""
        return sum(map(self.owned_elements, parameters.values())) * ELEMENT

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return gathered parameters and gradients that are not reduced yet."""
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
        root = total(parameters) - sum(sizes)
        block = max(sizes, default=0)
        # Gathered: the root, and the block at work beside the one that is prefetched. Reduced: the block's gradient,
        # its copy in the order of the ranks, and those of the root at the end.
        return {
            "gathered parameters": (root + 2 * block) * self._compute_bytes,
            "gradients": max(2 * block, 2 * root) * ELEMENT,
        }

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the gathers of parameters and the scatter of gradients."""
        in_blocks = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
        # Blocks are gathered in forward and in backward; the rest stays in between.
        gathered = (total(parameters) + in_blocks) * self._compute_bytes
        return {
            "parameter all-gathers (FSDP2)": self.gathered(gathered),
            "gradient reduce-scatter (FSDP2)": self.gathered(total(parameters, trainable=True) * ELEMENT),
        }

    @property
    def _compute_bytes(self) -> int:
        return 2 if self.config.precision == "bfloat16" else ELEMENT


class _EmptyOnMeta(TorchFunctionMode):
    """Allocates nothing for uninitialized tensors, as parameters are at first; computed buffers keep their values."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)
