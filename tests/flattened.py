"""The test model in flat parameters (FSDP1), and with whole tensors assigned to ranks (fairscale)."""

from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.fsdp import FullyShardedDataParallel

ENGINES = ["fsdp1", "fsdp1-flat", "sharded-ddp"]
OUTSIDE = "blocks.1.norm2.bias"  # trained, but not known to the user's optimizer


def wrap(model: Any, engine: str) -> nn.Module:
    """Wrap the test model.

    FSDP1 cannot flatten a parameter of shape (), nor a frozen one with others when it drops the original parameters.
    """
    if engine == "sharded-ddp":
        return wrap_module(model, engine)
    flat = engine == "fsdp1-flat"
    ignored = [p for p in model.parameters() if p.dim() == 0 or (flat and not p.requires_grad)]
    for i, block in enumerate(model.blocks):
        model.blocks[i] = wrap_module(block, engine)
    return wrap_module(model, engine, ignored_states=ignored or None)


def wrap_module(module: nn.Module, engine: str, **options: Any) -> nn.Module:
    """Wrap any module. Buckets of fairscale hold small tensors only."""
    if engine != "sharded-ddp":
        fixed: dict[str, Any] = {"use_orig_params": engine == "fsdp1", "device_id": torch.device("cpu")}
        return FullyShardedDataParallel(module, **(fixed | options))
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS

    known = [p for name, p in module.named_parameters() if name != OUTSIDE]
    stored: nn.Module = ShardedDataParallel(
        module, OSS(known, optim=optim.SGD, lr=0.1), reduce_buffer_size=300, **options
    )
    return stored


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return whole parameters by their plain names, as FSDP1 gathers them."""
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {plain(name): p.detach().clone() for name, p in model.named_parameters()}


def plain(name: str) -> str:
    """Return the name in the model before it was wrapped."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
