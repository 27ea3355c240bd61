"""One operation, timed: the best of several calls, as many on every rank."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from twa_scale.ranks import Group

_TIMES, _SECONDS, _MOST = 7, 0.5, 1000  # at least as often and as long: others may disturb any one call


@dataclass(frozen=True)
class Measured:
    """One operation: the best of several times."""

    what: str
    seconds: float
    nbytes: float
    """Bytes of memory that it has to move, each counted once."""

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / self.seconds


def measure(what: str, function: Callable[[], object], nbytes: float, device: torch.device) -> Measured:
    """Return the best of several calls, after one that compiles and touches memory; as many on every rank."""
    function()
    group, more = Group.world(), True
    seconds: list[float] = []
    while more:
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        wanted = len(seconds) < _TIMES or (sum(seconds) < _SECONDS and len(seconds) < _MOST)
        more = bool(group.sum_(torch.tensor(float(wanted))))
    return Measured(what, min(seconds), nbytes)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
