"""The memory of this process and of the machine, and the return of freed memory to the system."""

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 20


def resident() -> int:
    """Return the resident memory of this process in bytes; 0 if it is unknown."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes."""
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine_memory(root: Path = Path("/")) -> int:
    """Return the memory of this machine in bytes, or the limit of a cgroup of this process if that is lower."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(root)])


def free_memory() -> int:
    """Return the available memory of this machine in bytes, or its whole memory if that is unknown."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    values = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([machine_memory(), *values])


def _limits(root: Path) -> Iterator[int]:
    """Yield the memory limits of the cgroups of this process, versions 1 and 2."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds and "memory" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kinds else "")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                limit = folder / ("memory.limit_in_bytes" if kinds else "memory.max")
                text = limit.read_text().strip() if limit.exists() else ""
                yield from [int(text)] if text.isdigit() else []


def return_freed_memory() -> None:
    """Make glibc return freed tensors of a megabyte and more to the system.

    By default glibc raises its threshold when a large block is freed, and keeps later blocks in its heap. The buffers
    that FSDP gathers and frees then fragment the heap, and the resident memory of a rank on a CPU grows far beyond the
    memory in use. With the fixed threshold each gathered buffer costs page faults. Does nothing with other C libraries.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
