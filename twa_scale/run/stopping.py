"""Stop a run early on SIGUSR1 or SIGTERM, which schedulers and launchers send."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOPPED = 75
"""The exit code of a run that was stopped and can be continued: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):
    """The run received a signal and saved its state. The same command continues it."""

    agreed = True
    """Whether every rank raises it, so that no rank has to end the others."""


@dataclass
class Stop:
    """Whether this process has received a signal. The ranks exchange it after attach, each step and each evaluation."""

    asked: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle the signals in a `with` block, then restore the previous handlers.

        Only the main thread can set handlers; in other threads this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
