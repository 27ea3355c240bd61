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
from twa_scale.run.engines.own_values import keeps_values
from twa_scale.run.engines.run_engine import ELEMENT, Parameters, RunEngine, blocks_of, total
from twa_scale.run.tasks import Task


class Fsdp2(RunEngine):
    """Every rank has its rows of every parameter. The whole model is built only if it keeps its own values."""

    def build(self, task: Task, world: World, device: torch.device, mesh: DeviceMesh | None = None) -> nn.Module:
        """Return the task's model, sharded before memory is allocated.

        A model that keeps its own values, such as the base model of an adapter, is built in host memory first.

        Raises:
            ConfigError: the value of a buffer would be lost.
        """
        mesh = mesh or init_device_mesh(device.type, (world.size,))
        with _EmptyOnMeta():
            model = task.model().to(torch.float32)
        keep_values = keeps_values(self.config, model)
        if keep_values:
            model = task.model().to(torch.float32)
        computed = {name: buffer.clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
        policy = MixedPrecisionPolicy()
        if self.config.precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        if keep_values:
            return model.to(device)
        stored = set(model.state_dict())
        model.to_empty(device=device)
        for name, buffer in model.named_buffers():
            if name in computed:
                buffer.copy_(computed[name])
            elif name not in stored:
                raise ConfigError(
                    f"task: buffer {name!r} of the model is neither computed when it is built nor held by checkpoints, "
                    "so its value would be lost under FSDP2. Register it with a value, or use engine: ddp."
                )
        return model

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return a null context: the policy of FSDP2 casts."""
        return nullcontext()

    def owned_elements(self, info: ParameterInfo) -> int:
        """Return the number of elements of the first rank's rows."""
        rows = info.shape[0] if info.shape else 1
        return share(rows, 0, self.ranks)[1] * (prod(info.shape) // max(rows, 1))

    def weight_bytes(self, parameters: Parameters) -> int:
        """Return the bytes of the rank's rows."""
        return sum(map(self.owned_elements, parameters.values())) * ELEMENT

    def transient_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of gathered parameters and of gradients before their reduction."""
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
        root = total(parameters) - sum(sizes)
        block = max(sizes, default=0)
        # Gathered parameters: the root, the current block and the prefetched one. Gradients: those of a block and
        # their copy in the order of the ranks; at the end, the same for the root.
        return {
            "gathered parameters": (root + 2 * block) * self._compute_bytes,
            "gradients": max(2 * block, 2 * root) * ELEMENT,
        }

    def wire_bytes(self, model: nn.Module, parameters: Parameters) -> dict[str, int]:
        """Return the bytes of the all-gathers of parameters and the reduce-scatter of gradients."""
        in_blocks = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
        # Blocks are gathered in forward and in backward; the root stays gathered in between.
        gathered = (total(parameters) + in_blocks) * self._compute_bytes
        return {
            "parameter all-gathers (FSDP2)": self.gathered(gathered),
            "gradient reduce-scatter (FSDP2)": self.gathered(total(parameters, trainable=True) * ELEMENT),
        }

    @property
    def _compute_bytes(self) -> int:
        return 2 if self.config.precision == "bfloat16" else ELEMENT


class _EmptyOnMeta(TorchFunctionMode):
    """Redirect `torch.empty` to the meta device: parameters take no memory, and computed buffers keep their values."""

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)
