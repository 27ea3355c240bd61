"""Host memory of a store, in huge pages for a CPU, and page-locked for a GPU."""

import mmap
from contextlib import suppress
from weakref import WeakSet

import torch

from twa_scale.errors import ConfigError

_MIN_BYTES = 4 << 20  # bytes: two huge pages of 2 MiB


def zeros_in_huge_pages(count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros as `torch.zeros` does, but on a CPU in huge pages, if the system has them.

    Huge pages need fewer page faults when memory is filled, and fewer entries of the TLB when it is read.

    Raises:
        ConfigError: the system has no more memory.
    """
    nbytes = count * dtype.itemsize
    if device.type != "cpu" or nbytes < _MIN_BYTES:
        return torch.zeros(count, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"store: needs {nbytes:,} more bytes of memory, and the system refused them ({error}). Use a smaller one "
            "(packed4), or more hosts."
        ) from None
    with suppress(AttributeError, OSError):  # not Linux, or a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


class _Pages(mmap.mmap):
    """Pages that can be locked for a GPU. They are unlocked before they are unmapped, when their tensor is freed."""

    _address = 0

    def lock(self, address: int, nbytes: int) -> None:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        self._address = address

    def unlock(self) -> None:
        if self._address:
            address, self._address = self._address, 0
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))

    def __del__(self) -> None:
        with suppress(Exception):  # CUDA may have ended before, with the interpreter
            self.unlock()


class PinnedMemory:
    """Allocates whole pages for each tensor, and locks them if the device is a GPU.

    torch's allocator of page-locked memory rounds up to a power of two, which could double the size of a store.
    Therefore, pages are mapped by the system and then registered with CUDA. The mapping is shared with child processes,
    for example of a DataLoader, because copy-on-write could replace pages that the GPU reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._locked = WeakSet[_Pages]()

    def zeros(self, count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return `count` zeros on the CPU.

        Raises:
            ConfigError: the system refuses to map or lock the memory.
        """
        assert device.type == "cpu"
        if not count:  # mmap does not accept zero bytes
            return torch.empty(0, dtype=dtype)
        try:
            pages = _Pages(-1, count * dtype.itemsize)
            tensor = torch.frombuffer(pages, dtype=dtype)
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):  # otherwise CUDA would initialize the first GPU too
                    pages.lock(tensor.data_ptr(), tensor.nbytes)
                self._locked.add(pages)
        except (OSError, torch.cuda.CudaError) as error:
            raise ConfigError(
                f"store_device: 'cpu' needs page-locked host memory, and the system refused {count * dtype.itemsize:,} "
                f"bytes ({error}). Use a smaller store (packed4), more hosts, or `store_device: auto`."
            ) from None
        return tensor

    def close(self) -> None:
        """Unlock the pages, which are otherwise unlocked with their tensors. Call this when no copy is running."""
        for pages in self._locked:
            pages.unlock()
        self._locked.clear()
