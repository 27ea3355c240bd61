"""Estimate the activations that autograd keeps for backward, on the meta device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from twa_scale.base.inputs import brief
from twa_scale.config import RunConfig
from twa_scale.run.engines import blocks_of
from twa_scale.run.tasks import Batch, Task, build_task


def activation_bytes(
    task: Task, model: nn.Module, config: RunConfig, batch: Batch
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the bytes of activations in backward, by description, and notes if they cannot be estimated."""
    scale = 0.5 if config.precision == "bfloat16" else 1.0
    batch = {key: value.to("meta") for key, value in batch.items()}
    try:
        kept, passing = _kept(task, model, batch)
        result = {"activations": int(scale * (kept + passing))}
        if config.task.options.get("recompute_activations"):
            task = build_task(config.task.model_copy(update={"recompute_activations": False}))
            with torch.device("meta"):
                model = task.model().to(torch.float32)
            of_blocks = _kept(task, model, batch)[0] - kept
            result["activations of the block computed again"] = int(scale * of_blocks / max(1, len(blocks_of(model))))
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        return {}, (f"activations are not counted: the model does not run on the meta device ({brief(why)})",)
    return result, ()


def _kept(task: Task, model: nn.Module, batch: Batch) -> tuple[int, int]:
    """Return the bytes that autograd keeps for backward, and twice the bytes of the largest tensor of them.

    The second number is an estimate of the gradients of activations.
    """
    parameter_storages = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata  # views of one storage, such as transposed weights, are counted once
        if storage not in parameter_storages:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _OnMeta():
        task.loss(model, batch)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    return sum(sizes), 2 * max(sizes, default=0)


class _OnMeta(TorchFunctionMode):
    """Makes models run on the meta device.

    Conditions on values of tensors are true, such as "nothing is masked" and "it is one sequence". Attention keeps no
    scores, like the fused kernels of real devices.
    """

    def __torch_function__(
        self, function: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if function is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> Any:
    return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    """An attention that saves the tensors of fused attention, except one number per query."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out
