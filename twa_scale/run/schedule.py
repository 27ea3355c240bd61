"""The learning rate schedule of the coefficients."""

import math
from collections.abc import Sequence

import torch

from twa_scale.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor of the learning rate at `step` of `num_steps`, counted from 0.

    The warmup is linear and reaches 1 at its last step. `cosine` and `linear` would reach `final` one step after the
    last one, so that the last step has a larger rate.
    """
    warmup = round(config.warmup * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match config.name:
        case "cosine":
            return config.final + (1 - config.final) * (1 + math.cos(math.pi * min(progress, 1))) / 2
        case "linear":
            return config.final + (1 - config.final) * (1 - min(progress, 1))
        case "step":
            past = sum(step >= part * num_steps for part in config.milestones)
            return config.factor ** (past if config.every is None else (step - warmup) // config.every)
        case "constant":
            return 1.0


def set_rates(
    optimizer: torch.optim.Optimizer, lrs: Sequence[float], config: ScheduleConfig, step: int, num_steps: int
) -> float:
    """Set the learning rate of each group of `optimizer` for `step`, and return the first.

    Args:
        optimizer: the optimizer of an average.
        lrs: the rates of the coefficients and of the corrections of rows, before the schedule.
        config: the schedule.
        step: the step, counted from 0.
        num_steps: the number of all steps.
    """
    scale = factor(config, step, num_steps)
    for group, lr in zip(optimizer.param_groups, lrs, strict=False):
        group["lr"] = lr * scale
    return lrs[0] * scale
