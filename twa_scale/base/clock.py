"""Timing of the parts of a step, and the memory bandwidth, on CPU and GPU."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_Event = tuple[str, torch.cuda.Event, torch.cuda.Event]


class Clock:
    """A sum of the times of named parts. On a GPU it records CUDA events, and synchronizes only in `read`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._pending: deque[_Event] = deque()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the body to part `name`."""
        if self._cuda:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._pending.append((name, first, last))
            self._collect(wait=False)
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    def read(self) -> dict[str, float]:
        """Return the seconds of each part since the last call, and reset the sums."""
        self._collect(wait=True)
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _collect(self, *, wait: bool) -> None:
        """Add the times of completed events, so that few events are kept between calls of `read`."""
        while self._pending:
            name, first, last = self._pending[0]
            if not wait and not last.query():
                return
            last.synchronize()
            self._add(name, first.elapsed_time(last) / 1e3)
            self._pending.popleft()

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds


@cache
def read_bandwidth(device: torch.device, nbytes: int = 1 << 28) -> float:
    """Measure the bandwidth of reading memory, in bytes per second: the best of five sums over `nbytes` of float32.

    A process measures it once for each device.
    """
    data = torch.ones(nbytes // 4, device=device)
    clock = Clock(device)
    data.sum()
    times = []
    for _ in range(5):
        with clock.part("read"):
            data.sum()
        times.append(clock.read()["read"])
    return data.nbytes / min(times)
