"""Recompute BatchNorm statistics for averaged weights: they are not the average of the candidates' statistics."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from twa_scale.ranks import Pods, Ranks, publish_failure


def batchnorm_layers(module: nn.Module) -> list[_BatchNorm]:
    """Return the BatchNorm layers of `module` that have running statistics."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None]


@torch.no_grad()
def recalibrate(
    module: nn.Module,
    batches: Iterable[Any],
    pods: Pods,
    device: torch.device,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> int:
    """Replace the running statistics of `module` with their mean over the batches of all ranks.

    The other layers are in evaluation mode. All ranks stop when the first one has no batch left, because a sharded
    forward pass needs all ranks.

    Args:
        module: the model; forward passes may be collective.
        batches: tensors, dicts (passed by keyword), or sequences whose first item is the input.
        pods: all ranks.
        device: the device to move the batches to.
        forward: runs one batch; by default, `module(input)`.

    Returns:
        The number of batches over all ranks. If it is 0, the statistics are unchanged.

    Raises:
        Exception: an error of `batches`, on every rank. An error of a sharded forward pass is raised only on its rank:
            the other ranks may wait in that pass until the failed rank ends or the process group times out.
    """
    layers = batchnorm_layers(module)
    if not layers:
        return 0
    synced = any(isinstance(layer, nn.SyncBatchNorm) for layer in module.modules())
    local_forward = pods.size == pods.count and not synced  # no collectives, so ranks can agree on its errors
    modes = {child: child.training for child in module.modules()}
    momenta = [layer.momentum for layer in layers]
    saved: list[list[torch.Tensor]] | None = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    count = 0
    try:
        module.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the cumulative mean
            layer.train()
        iterator = iter(batches)
        while (batch := _next_on_all(iterator, pods, device)) is not None:
            with pods.agree() if local_forward else publish_failure():
                forward(module, batch) if forward else _call(module, batch)
            count += 1
        total = int(pods.sum_(torch.tensor([count], device=device)).item())
        if total:
            _average(layers, count / total, total, pods)
            saved = None
    finally:
        for layer, buffers in zip(layers, saved or (), strict=saved is not None):
            for buffer, value in zip(layer.buffers(), buffers, strict=True):
                buffer.copy_(value)
        for child, training in modes.items():
            child.training = training
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    return total


def _average(layers: list[_BatchNorm], part: float, total: int, group: Ranks) -> None:
    """Average the statistics over ranks, weighted by each rank's fraction of the batches.

    Args:
        layers: the BatchNorm layers.
        part: the fraction of the batches that this rank has processed.
        total: the number of batches of all ranks.
        group: the ranks.
    """
    for layer in layers:
        for buffer in (layer.running_mean, layer.running_var):
            assert buffer is not None
            buffer.copy_(group.sum_(buffer.to(torch.float64) * part))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(total)


def statistics(module: nn.Module, buffers: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of the `buffers` that are statistics of a BatchNorm layer."""
    buffer_ids = {id(buffer) for layer in batchnorm_layers(module) for buffer in layer.buffers()}
    return {name for name, buffer in buffers.items() if id(buffer) in buffer_ids}


def _next_on_all(iterator: Any, group: Ranks, device: torch.device) -> Any:
    """Return the next batch if every rank has one, else None."""
    with group.agree():
        batch = _to_device(next(iterator, None), device)
    have = group.sum_(torch.tensor([batch is not None], dtype=torch.int64, device=device))
    return batch if int(have.item()) == group.size else None


def _call(module: nn.Module, batch: Any) -> object:
    if isinstance(batch, dict):
        return module(**batch)
    return module(batch[0] if isinstance(batch, list | tuple) else batch)


def _to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: _to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_to_device(value, device) for value in batch]
    return batch
