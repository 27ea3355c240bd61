"""Counts the steps of optimizers, whoever calls them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle


def count_steps(count: Callable[[], None], optimizers: Iterable[Any]) -> list[RemovableHandle]:
    """Call `count` after each step of these optimizers, until the handles are removed.

    Trainers skip steps, within a gradient accumulation and after an overflow: the optimizer knows. No handle is
    returned for what is not an optimizer of torch, as DeepSpeed's are, whose engine has a count of its own.
    """

    def stepped(*_: object) -> None:
        count()

    return [
        optimizer.register_step_post_hook(stepped)
        for optimizer in optimizers
        if isinstance(optimizer, torch.optim.Optimizer)
    ]
