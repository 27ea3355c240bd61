"""Memory of this process and of its machine: how much, and making the allocator give back what is freed."""

import ctypes
import os
import sys
from collections.abc import Iterator
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


def machine_memory(root: Path = Path("/")) -> int:
    """Return the bytes that all processes here may use: what is installed, or less where a cgroup says so."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(root)])


def free_memory() -> int:
    """Return the bytes that are free, or could be made so, on this machine; what it has where it does not tell."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return min([machine_memory(), *found])


def _limits(root: Path) -> Iterator[int]:
    """Yield the limits of this process's cgroups, of both versions, as containers and batch systems set them."""
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
