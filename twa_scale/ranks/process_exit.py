"""The end of a process that was a rank: with the exit code that its job script waits for, whatever threads remain."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from twa_scale.ranks.mpi import finalize_mpi

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
    """A signal ended the process: exit code 128 + its number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGHUP end a `with` block by an exception, so that it cleans up.

    Python lets only the main thread handle signals; in another one nothing changes. A signal that is ignored or handled
    already, as SIGHUP is under nohup, stays so. Signals that come while the block cleans up are ignored.

    Raises:
        Ended: a signal came.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for taken in before:
            signal.signal(taken, signal.SIG_IGN)
        raise Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {n: handler for n, handler in found.items() if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(code: int) -> NoReturn:
    """End this process with `code`: do what was registered for the end, but do not take the interpreter down.

    Worker threads of gloo outlive their group where anything still refers to it, and hold the tensors of their last
    collective. One that lets go of them while the interpreter is taken down asks for its lock and aborts the process
    (pytorch/pytorch#179291): a rank that has saved its state would leave with 134 and not be started again.
    """
    atexit._run_exitfuncs()
    finalize_mpi()  # mpi4py registers it below Python, for an end that does not come
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
