"""DeepSpeed engines for tests: ZeRO-1, 2 and 3, in the process group of the pool."""

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import twa_scale

ENGINES = ["zero1", "zero2", "zero3"]
SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "steps_per_print": None,
}
ZERO = {"reduce_bucket_size": 20_000, "stage3_param_persistence_threshold": 100}


def wrap(
    model: nn.Module,
    engine: str,
    accumulate: int = 1,
    bf16: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    zero: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """Wrap `model` with a DeepSpeedEngine. `settings` and `zero` (of `zero_optimization`) are added to its JSON."""
    # Launchers set these variables, which DeepSpeed reads.
    device = next(model.parameters()).device
    local_rank = dist.get_rank() if device.index is None else device.index
    os.environ |= {"LOCAL_RANK": str(local_rank), "DS_ACCELERATOR": device.type}
    import deepspeed

    forget_groups()
    config: dict[str, Any] = {
        **SETTINGS,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {**ZERO, "stage": int(engine.removeprefix("zero")), **(zero or {})},
        **({"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}} if bf16 else {}),
        **settings,
    }
    optimizer = optimizer or twa_scale.stateless_optimizer(p for p in model.parameters() if p.requires_grad)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def forget_groups() -> None:
    """Reset global state of earlier calls of the pool: groups that DeepSpeed keeps, and module numbers."""
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    if getattr(groups, "_made_in", None) is dist.group.WORLD:
        return
    groups._made_in = dist.group.WORLD
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # used for inference only, and compiles for a minute
    deepspeed.comm.comm.cdb = None
    groups._release_process_group_references()
    # Ranks that took part in other calls than rank 0 would have different values.
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    Init.param_id = 0


def whole(engine: Any) -> dict[str, Tensor]:
    """Return whole parameters as the next forward pass uses them: persistent ones unchanged, others gathered."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    named = dict(engine.module.named_parameters())
    apart = [p for p in named.values() if getattr(p, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE]
    with GatheredParameters(apart):
        return {name: p.detach().clone() for name, p in named.items()}
