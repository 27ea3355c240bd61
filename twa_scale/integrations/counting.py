"""Counts the steps of optimizers, whoever calls them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from twa_scale.running import RunningAverages


def count_steps(averages: RunningAverages, optimizers: Iterable[Any]) -> list[RemovableHandle]:
    """Call `averages.step()` after each step of these optimizers, until the handles are removed.

    Trainers skip steps, within a gradient accumulation and after an overflow: the optimizer knows. No handle is
    returned for what is not an optimizer of torch, as DeepSpeed's are, whose engine has a count of its own.
    """

    def count(*_: object) -> None:
        averages.step()

    return [
        optimizer.register_step_post_hook(count)
        for optimizer in optimizers
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
