"""Being asked to stop before the time is up: by SIGUSR1 or SIGTERM, as schedulers and launchers send them."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
STOPPED = 75
"""Exit code of a run that was stopped and can be continued: EX_TEMPFAIL of sysexits.h, no error and no end."""


class Stopped(Exception):
    """The run was asked to stop and has saved its state; started again, it continues."""

    agreed = True
    """Every rank raises it, so that none has to end the others."""


@dataclass
class Stop:
    """Whether this process has been asked to stop. The ranks agree on it after attach, a step and an evaluation."""

    asked: bool = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Take the signals for a request in a `with` block, then give them back to whoever had them.

        Python lets only the main thread do so; in another one nothing changes.
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
