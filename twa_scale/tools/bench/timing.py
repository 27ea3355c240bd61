"""The timing of one operation: the best of several calls."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from twa_scale.ranks import Group

# Other processes may disturb single calls, so there are at least _MIN_CALLS of them and _MIN_SECONDS in total.
_MIN_CALLS, _MIN_SECONDS, _MAX_CALLS = 7, 0.5, 1000


@dataclass(frozen=True)
class Measured:
    """The best time of several calls of one operation."""

    what: str
    seconds: float
    nbytes: float
    """The bytes of memory that the operation has to move, each counted once."""

    @property
    def rate(self) -> float:
        """The rate in bytes per second."""
        return self.nbytes / self.seconds


def measure(what: str, function: Callable[[], object], nbytes: float, device: torch.device) -> Measured:
    """Return the best time of several calls, after a call for warm-up. Collective: all ranks make the same calls.

    Args:
        what: the name of the operation.
        function: the operation.
        nbytes: the bytes that it has to move.
        device: the device that is synchronized before and after each call.
    """
    function()
    group, more = Group.world(), True
    seconds: list[float] = []
    while more:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
        unfinished = len(seconds) < _MIN_CALLS or (sum(seconds) < _MIN_SECONDS and len(seconds) < _MAX_CALLS)
        more = bool(group.sum_(torch.tensor(float(unfinished))))
    return Measured(what, min(seconds), nbytes)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
