"""Resident memory of this process: how much, and making the allocator give back what is freed."""

import ctypes
import os
import sys
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 20


def resident() -> int:
    """Return the bytes that are resident now; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def peak_resident() -> int:
    """Return the most bytes that have been resident in the life of this process."""
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def return_freed_memory() -> None:
    """Have glibc give tensors of a megabyte and more back to the system when they are freed.

    By default it learns from the first large block that is freed to keep later ones in its heap, where the buffers that
    FSDP gathers and drops leave holes: the resident memory of a rank on CPU then grows far beyond what is alive, and
    beyond any plan. The price is page faults: gathered buffers are mapped anew each time. Other C libraries are
    left as they are.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
