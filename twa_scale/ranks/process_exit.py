"""Process exit: signals raise an exception, and a rank exits with its own code although threads still run."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from twa_scale.ranks.mpi import finalize_mpi

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SignalExit(SystemExit):
    """Raised when a signal ends the process. The exit code is 128 plus the signal's number, as in shells."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Raise an exception on SIGINT, SIGTERM and SIGHUP inside a `with` block, so that the block cleans up.

    Has no effect outside the main thread, where Python does not allow signal handlers. A signal that is already ignored
    or handled, as SIGHUP is under nohup, keeps its handler. Signals during the clean-up are ignored.

    Raises:
        SignalExit: the process received a signal.
    """

    def exit_once(number: int, frame: FrameType | None) -> NoReturn:
        for replaced in before:
            signal.signal(replaced, signal.SIG_IGN)
        raise SignalExit(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {n: handler for n, handler in handlers.items() if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, exit_once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_process(code: int) -> NoReturn:
    """Run the exit handlers and end this process with `code`, without finalizing the interpreter.

    Threads of gloo outlive their process group while anything refers to it, and hold the tensors of their last
    collective. A thread that frees these tensors while the interpreter is finalized aborts the process
    (pytorch/pytorch#179291). A rank that has saved its state would then exit with code 134 and not be restarted.
    """
    atexit._run_exitfuncs()
    finalize_mpi()  # mpi4py registers this with C's atexit, which os._exit skips.
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # None if the process was started without it
            with suppress(OSError):
                stream.flush()
    os._exit(code)
