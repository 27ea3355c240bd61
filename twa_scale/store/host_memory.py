"""Host memory of a store: in large pages, or locked for a GPU that reads it by itself while all others are at work."""

import mmap
from contextlib import suppress

import torch

from twa_scale.errors import ConfigError

_LARGE = 4 << 20  # bytes: two of the pages, of 2 MiB mostly, that processors have beside those of 4 KiB


def in_large_pages(count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return memory as `torch.zeros` does; on a CPU in large pages where the system has them.

    It is filled sooner, since the system hands it over page by page; and the processor looks up fewer addresses.

    Raises:
        ConfigError: the system has no more memory.
    """
    nbytes = count * dtype.itemsize
    if device.type != "cpu" or nbytes < _LARGE:
        return torch.zeros(count, dtype=dtype, device=device)
    try:
        pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ConfigError(
            f"store: needs {nbytes:,} more bytes of memory, and the system refused them ({error}). Take a smaller one "
            "(packed4), or more hosts."
        ) from None
    with suppress(AttributeError, OSError):  # not Linux, or a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype)


class Pages:
    """Whole pages for each tensor, locked in memory when they are for a GPU.

    torch's own allocator of such memory takes the next power of two, which could double a store. So the pages come from
    the system, and are then registered. Child processes (a DataLoader's, say) share them: copied on write, a page could
    become another one than that which the GPU reads.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._registered: list[int] = []

    def zeros(self, count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return `count` zeros on the CPU.

        Raises:
            ConfigError: the system has no more memory that it would lock.
        """
        assert device.type == "cpu"
        if not count:  # there is no map of zero bytes
            return torch.empty(0, dtype=dtype)
        try:
            tensor = torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize), dtype=dtype)
            if self._device.type == "cuda":
                self._register(tensor)
        except (OSError, torch.cuda.CudaError) as error:
            raise ConfigError(
                f"store_device: 'cpu' needs page-locked host memory, and the system refused {count * dtype.itemsize:,} "
                f"bytes ({error}). Take a smaller store (packed4), more hosts, or `store_device: auto`."
            ) from None
        return tensor

    def _register(self, tensor: torch.Tensor) -> None:
        with torch.cuda.device(self._device):  # else CUDA would start on the first GPU, too
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))
        self._registered.append(tensor.data_ptr())

    def close(self) -> None:
        """Unlock what is locked, before its tensors go; no copy may be under way."""
        for address in self._registered:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        self._registered.clear()
