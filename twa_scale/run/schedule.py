"""The learning rate schedule of the coefficients."""

import math

import torch

from twa_scale.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Return the factor of the learning rate at `step` of `num_steps`, counted from 0.

    The warmup is linear and reaches 1 at its last step. `cosine` and `linear` would reach `final` one step after the
    last, so that the last step still has a rate above it.
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


def set_rate(optimizer: torch.optim.Optimizer, lr: float, config: ScheduleConfig, step: int, num_steps: int) -> float:
    """Set the learning rate of `optimizer` for `step`, and return it."""
    rate = lr * factor(config, step, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
