"""Compile each kernel in one process at a time. The others wait, and load what it has compiled."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import Any

from numba.core.compiler_lock import global_compiler_lock
from numba.core.dispatcher import Dispatcher

_compile = Dispatcher.compile


def compile_once() -> None:
    """Let this process, and those that it forks, wait while another one compiles the same kernel."""
    setattr(Dispatcher, "compile", _compile_alone)  # noqa: B010


def _compile_alone(dispatcher: Any, signature: Any) -> Any:
    """Compile a function. A kernel, which other processes can load, has a lock meanwhile, also of those that it calls.

    Threads take numba's own lock first. With the locks of files only, two of them could wait for each other.
    """
    kernel, *variant = dispatcher.py_func.__qualname__.rpartition(".")[-1].split("-")
    if not variant:  # inlined into kernels, or a part of numba
        return _compile(dispatcher, signature)
    name = f"twa_scale-compile-{kernel}-{variant[0]}-{os.getuid()}.lock"
    with global_compiler_lock, (Path(tempfile.gettempdir()) / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _compile(dispatcher, signature)
