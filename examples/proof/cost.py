"""What a method costs: forward and backward passes, passes for evaluations, and seconds, counted while it runs."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook


@dataclass
class Cost:
    """The cost of a method beyond that of the run that its candidates come from."""

    steps: float = 0.0
    """Forward and backward passes, in batches of training."""
    evaluations: float = 0.0
    """Forward passes alone, in batches of training."""
    seconds: float = 0.0
    """Time of the processor, in all threads, so that other programs on the machine do not count; for a GPU, of the
    clock."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.steps + other.steps, self.evaluations + other.evaluations, self.seconds + other.seconds)

    def of(self, steps: float) -> "Cost":
        """Return the cost of some of the steps, with all evaluations."""
        return Cost(steps, self.evaluations, self.seconds * steps / self.steps)

    def row(self) -> dict[str, float]:
        """Return the cost as a part of a row."""
        return asdict(self)


def clock(device: torch.device) -> float:
    """Return the seconds of `Cost` until now. A GPU finishes its work first."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def measured(model: nn.Module, batch_size: int) -> Iterator[Cost]:
    """Count what happens in a `with` block; the numbers are right at its end.

    Every forward pass of a model of the class of `model` counts, whoever calls it: with a backward pass if gradients
    are on.
    """
    cost, kind, device = Cost(), type(model), next(model.parameters()).device

    def count(module: nn.Module, _: Any, outputs: Any) -> None:
        if isinstance(module, kind):
            batches = len(outputs if isinstance(outputs, torch.Tensor) else outputs.logits) / batch_size
            if torch.is_grad_enabled():
                cost.steps += batches
            else:
                cost.evaluations += batches

    start = clock(device)
    with register_module_forward_hook(count):
        yield cost
    cost.seconds = clock(device) - start
