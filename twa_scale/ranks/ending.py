"""The end of a process that was a rank: with the exit code that its job script waits for, whatever threads remain."""

import atexit
import os
import sys
from typing import NoReturn

from twa_scale.ranks.mpi import finalize_mpi


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
