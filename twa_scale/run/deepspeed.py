"""Building a DeepSpeedEngine for a run: what its JSON has to say, and a model that no rank holds whole under ZeRO-3."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from importlib import import_module
from typing import Any

import torch
from torch import nn

from twa_scale.config import RunConfig
from twa_scale.engines.zero import stateless_optimizer
from twa_scale.errors import ConfigError
from twa_scale.ranks import World
from twa_scale.run.batches import cut
from twa_scale.run.tasks import Task

# Of ZeRO-3's own defaults some hold a model of a billion parameters whole between forward and backward.
ZERO = {
    "reduce_bucket_size": 20_000_000,
    "stage3_prefetch_bucket_size": 5_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 10_000,
}


def build_zero(config: RunConfig, task: Task, world: World, device: torch.device) -> nn.Module:
    """Return the task's model in a DeepSpeedEngine; its values are not set.

    Raises:
        ConfigError: DeepSpeed is not installed, or its JSON and the run disagree.
    """
    settings = zero_settings(config, world.size)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed asks for it whoever launched us
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = load_deepspeed()
    deepspeed.init_distributed(verbose=False)  # takes the group that is there; else zero.Init would count one rank
    created: AbstractContextManager[object] = nullcontext()
    if config.engine == "zero3":
        created = deepspeed.zero.Init(config_dict_or_path=settings)
    with created:
        model = task.model()
    if config.engine != "zero3":
        model.to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine: nn.Module = deepspeed.initialize(model=model, optimizer=stateless_optimizer(trained), config=settings)[0]
    return engine


def zero_settings(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Return what `deepspeed.initialize` gets: the user's JSON, completed and checked against the run.

    Blocks that only concern training by `engine.step` (`optimizer`, `scheduler`) are left out.

    Raises:
        ConfigError: a number or a stage on which the two disagree.
    """
    given = {k: v for k, v in (config.deepspeed or {}).items() if k not in ("optimizer", "scheduler")}
    micro, accumulate = cut(config.batch_size, config.micro_batch_size, ranks)
    batch = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulate,
    }
    for key, value in batch.items():
        if given.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"deepspeed.{key} is {given[key]}, but batch_size {config.batch_size} on {ranks} ranks in "
                f"micro-batches of {micro} makes it {value}: leave it out, or make both agree."
            )
    stage = int(config.engine.removeprefix("zero"))
    zero = {**ZERO, **given.get("zero_optimization", {})}
    if zero.setdefault("stage", stage) != stage:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage is {zero['stage']}, but engine is {config.engine!r}: leave one out."
        )
    settings = {"zero_allow_untested_optimizer": True, "steps_per_print": None, **given, **batch}
    precisions = ("bf16", "fp16", "torch_autocast")
    if config.precision == "bfloat16" and not any(given.get(key, {}).get("enabled") for key in precisions):
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return {**settings, "zero_optimization": zero}


def load_deepspeed() -> Any:
    """Import DeepSpeed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        with redirect_stdout(sys.stderr):  # where its log goes from then on: our own output may be JSON
            import deepspeed
    except ImportError:
        raise ConfigError("engine: zero1, zero2 and zero3 need DeepSpeed: pip install deepspeed.") from None
    # An all-reduce for inference on CPUs, which DeepSpeed would compile for a minute on the first run of a machine.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def load_stages() -> None:
    """Import all that a run will, whose memory `plan` counts as libraries."""
    load_deepspeed()
    for name in ("deepspeed.runtime.zero.stage3", "deepspeed.module_inject", "torch._dynamo"):
        import_module(name)
