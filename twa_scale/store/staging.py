"""Double buffering: a copy from host memory fills one buffer on a device while kernels read the other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_LINE = 256  # bytes: alignment of tensors, that of CUDA's allocator


@dataclass(frozen=True)
class _Buffer:
    memory: torch.Tensor
    filled: torch.cuda.Event | None
    read: torch.cuda.Event | None
    """The event after the last kernels that read the buffer. Both events are None on a CPU, where work is in order."""


class Staging:
    """Copies host tensors to `device` for kernels that read them there.

    Copies run on a separate stream. A copy waits only for the earlier kernels that read the same buffer, so that it
    overlaps with work on the current stream, such as a backward pass. The host never waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._nbytes = 0
        self._buffers: list[_Buffer] = []
        self._copies: torch.cuda.Stream | None = None
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """The bytes of both buffers on the device."""
        return 2 * self._nbytes

    def reserve(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make both buffers large enough for these tensors. Call this before the first `lend`."""
        assert not self._buffers
        self._nbytes = max(self._nbytes, sum(map(_room, tensors)))

    @contextmanager
    def lend(self, tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Copy host tensors. Kernels launched on the current stream inside the `with` block may read the copies."""
        if not self._buffers:
            self._allocate()
        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        places = _places(buffer.memory, tensors)
        if self._copies is None or buffer.read is None or buffer.filled is None:
            _copy(tensors, places)
            yield places
            return
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(buffer.read)
            _copy(tensors, places)
            buffer.filled.record(self._copies)
        current.wait_event(buffer.filled)
        try:
            yield places
        finally:
            buffer.read.record(current)

    def close(self) -> None:
        """Wait for the device, then release the buffers."""
        if self._copies is not None:
            torch.cuda.synchronize(self._device)
        self._buffers.clear()

    def _allocate(self) -> None:
        memory = [torch.empty(self._nbytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        if self._device.type != "cuda":
            self._buffers = [_Buffer(part, None, None) for part in memory]
            return
        with torch.cuda.device(self._device):
            self._copies = torch.cuda.Stream()
            self._copies.wait_stream(torch.cuda.current_stream())  # it may still read this memory
            self._buffers = [_Buffer(part, torch.cuda.Event(), torch.cuda.Event()) for part in memory]


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _LINE) * _LINE


def _places(memory: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    places, at = [], 0
    for tensor in tensors:
        places.append(memory[at : at + tensor.nbytes].view(tensor.dtype))
        at += _room(tensor)
    return places


def _copy(tensors: Sequence[torch.Tensor], places: Sequence[torch.Tensor]) -> None:
    for tensor, place in zip(tensors, places, strict=True):
        place.copy_(tensor, non_blocking=True)
