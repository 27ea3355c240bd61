"""Count the steps of optimizers, which trainers call."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def count_steps(count: Callable[[], None], optimizers: Iterable[Any]) -> list[RemovableHandle]:
    """Call `count` after each step of these optimizers, until the handles are removed.

    Trainers skip steps within a gradient accumulation and after an overflow, so only the optimizer can count them.
    Optimizers of other libraries get no handle, such as those of DeepSpeed, whose engine counts steps itself.
    """

    def stepped(*_: object) -> None:
        count()

    return [
        optimizer.register_step_post_hook(stepped)
        for optimizer in optimizers
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
