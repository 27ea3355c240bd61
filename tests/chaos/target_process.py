"""Processes that a signal stops at a random moment of a phase of their work.

They are forked from the server of the pool, which has imported everything. Each tells its phases through a pipe.
"""

import multiprocessing
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from tests.pool import PRELOAD
from twa_scale.average.average import TrainableAverage
from twa_scale.errors import TwaError
from twa_scale.merge import streamed
from twa_scale.output import BackgroundWrite
from twa_scale.output.snapshots import Snapshots
from twa_scale.ranks import exit_process
from twa_scale.run import loop
from twa_scale.run.loop import Run

PHASES: dict[str, tuple[Any, str]] = {
    "attach": (Run, "_attach"),
    "step": (Run, "take_step"),
    "evaluation": (Run, "measure"),
    "state": (Run, "_save"),
    "export": (TrainableAverage, "export"),
    "results": (loop, "write_results"),
    "average": (streamed._Merger, "merge"),
    "export of a run": (streamed._Merger, "merge"),
    "snapshot": (Snapshots, "save"),
    "asynchronous snapshot": (BackgroundWrite, "_run"),
}
"""The function that a process is in during each phase."""
ELSEWHERE = "elsewhere"
_LONG = 120.0  # time limit of a process in seconds


@dataclass
class PhaseTiming:
    """How often a phase occurs in an undisturbed process, and its duration in seconds."""

    count: int
    seconds: float


@dataclass
class Moment:
    """A moment of a phase: `seconds` after its `count`-th start."""

    phase: str
    count: int
    seconds: float

    @classmethod
    def of(cls, phase: str, usual: PhaseTiming, chance: random.Random) -> "Moment":
        """Draw a moment. All moments are equally likely."""
        return cls(phase, chance.randint(1, usual.count), chance.random() * usual.seconds)


class TargetProcess:
    """A process that calls a function of a module and reports which of `phases` it enters and leaves."""

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        phases: tuple[str, ...],
        environment: Mapping[str, str] = {},
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipe, there = context.Pipe(duplex=False)
        self._process: BaseProcess = context.Process(
            target=_run_work, args=(there, phases, dict(environment), function, arguments), daemon=True
        )
        self._process.start()
        there.close()
        self._entered: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._phase = ELSEWHERE
        self.output = ""
        """The error by which it ended itself."""

    def reach(self, moment: Moment) -> bool:
        """Wait for a moment. Return False if the process ended before."""
        while len(self._entered[moment.phase]) < moment.count:
            if not self._receive(_LONG):
                return False
        time.sleep(moment.seconds)
        return True

    def stop(self, number: signal.Signals) -> str:
        """Send a signal that ends or stops the process, and return the phase in which it arrived."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):  # the process has just ended
            os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.join(_LONG)
        while self._receive(0.2):
            pass
        return self._phase

    def ended(self, seconds: float = _LONG) -> int | None:
        """Wait for the end. Return the exit code, or None after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._receive(max(0.0, deadline - time.monotonic())):
            pass
        self._process.join(max(0.1, deadline - time.monotonic()))
        return self._process.exitcode

    def kill(self) -> None:
        """Kill the process, also if it is frozen."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def usual(self) -> dict[str, PhaseTiming]:
        """Return the phases of a process that completed."""
        return {
            phase: PhaseTiming(len(seconds), sum(seconds) / len(seconds)) for phase, seconds in self._seconds.items()
        }

    def _receive(self, seconds: float) -> bool:
        """Receive one message. Return False if none arrives within `seconds`, or if the process has ended."""
        try:
            if not self._pipe.poll(seconds):
                return False
            name, phase, current = self._pipe.recv()
        except (EOFError, OSError):
            return False
        match name:
            case "enter":
                self._entered[phase].append(current)
                self._phase = phase
            case "leave":
                self._seconds[phase].append(current - self._entered[phase][-1])
                self._phase = ELSEWHERE
            case "error":
                self.output = phase
        return True


def _run_work(
    pipe: Connection,
    phases: tuple[str, ...],
    environment: dict[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment)
    for phase in phases:
        _report(phase, pipe)
    code = 0
    try:
        function(*arguments)
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}", time.monotonic()))
        code = 2 if isinstance(error, TwaError) else 1
    exit_process(code)


def _report(phase: str, pipe: Connection) -> None:
    """Make the function of a phase report its start and its end."""
    owner, name = PHASES[phase]
    function = getattr(owner, name)

    def told(*arguments: Any, **options: Any) -> Any:
        pipe.send(("enter", phase, time.monotonic()))
        try:
            return function(*arguments, **options)
        finally:
            pipe.send(("leave", phase, time.monotonic()))

    setattr(owner, name, told)
