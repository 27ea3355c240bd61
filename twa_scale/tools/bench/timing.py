"""The timing of operations: the best of several calls."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from twa_scale.ranks import Group

# Other processes may disturb single calls, so there are at least _MIN_CALLS of them and _MIN_SECONDS in total.
_MIN_CALLS, _MIN_SECONDS, _MAX_CALLS = 7, 1.0, 1000


@dataclass(frozen=True)
class Measured:
    """The best time of several calls of one operation."""

    name: str
    seconds: float
    nbytes: float
    """The bytes of memory that the operation has to move, each counted once."""

    @property
    def rate(self) -> float:
        """The rate in bytes per second."""
        return self.nbytes / self.seconds


@dataclass(frozen=True)
class Operation:
    """An operation to measure."""

    name: str
    """The name of the operation."""
    function: Callable[[], object]
    nbytes: float
    """The bytes that it has to move."""


def measure(operations: Sequence[Operation], device: torch.device) -> list[Measured]:
    """Return the best times of several calls, after a call for warm-up. Collective: all ranks make the same calls.

    The operations are called in turn, so that the ratio of two of them changes little if the machine is disturbed.

    Args:
        operations: the operations.
        device: the device that is synchronized before and after each call.
    """
    for operation in operations:
        operation.function()
    group, more = Group.world(), True
    seconds: list[list[float]] = [[] for _ in operations]
    while more:
        for operation, calls in zip(operations, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            operation.function()
            _synchronize(device)
            calls.append(time.perf_counter() - start)
        count, shortest = len(seconds[0]), min(map(sum, seconds))
        unfinished = count < _MIN_CALLS or (shortest < _MIN_SECONDS and count < _MAX_CALLS)
        more = bool(group.sum_(torch.tensor(float(unfinished))))
    return [Measured(op.name, min(calls), op.nbytes) for op, calls in zip(operations, seconds, strict=True)]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
