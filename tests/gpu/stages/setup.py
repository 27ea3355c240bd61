"""The device and the sizes of a stage, and its results."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table: a measured value and the expected one."""

    name: str
    measured: str
    expected: str = ""
    ok: bool | None = None
    """Whether it is as expected; None if there is no expected value."""


@dataclass(frozen=True)
class Setup:
    """The device and the sizes."""

    device: torch.device
    tiny: bool
    """Run all code on small data, to find errors without a GPU."""
    scratch: Path
    """A folder of this stage on a local disk."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def backend(self) -> str:
        return "cpu:gloo,cuda:nccl" if self.cuda else "gloo"

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], times: int = 10) -> float:
        """Return the median time of several calls, after two calls for compilation and warm-up."""
        actual: list[float] = []
        for _ in range(2 + self.size(times, 1)):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            actual.append(time.perf_counter() - start)
        return sorted(actual[2:])[len(actual[2:]) // 2]

    def device_seconds(self, work: Callable[[], object], times: int = 10) -> float:
        """Return the median time by GPU events, without the launch time of the first kernel."""
        if not self.cuda:
            return self.seconds(work, times)
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        for _ in range(2 + times):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            events.append((first, last))
        self.wait()
        actual: list[float] = sorted(first.elapsed_time(last) / 1e3 for first, last in events[2:])
        return actual[len(actual) // 2]


Stage = Callable[[Setup], Iterator[Row]]


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"
