"""Weights that are written unit by unit before the next forward pass uses them: `combine: forward`."""

from collections.abc import Callable, Collection, Sequence

import torch

from twa_scale.base.clock import Clock
from twa_scale.base.spans import Span

Combine = Callable[[Collection[Span]], None]
"""A function that writes the weights of the given spans."""


class DeferredWeights:
    """Units whose weights are written after the step: on a GPU in a side stream, on a CPU when a unit is first used.

    Args:
        units: the spans that the model uses together, in forward order; empty if no write is deferred.
        spans: the trained spans.
        device: the device of the weights.
        clock: measures how long `prepare` delays the current stream, or the CPU.
    """

    def __init__(
        self, units: Sequence[Sequence[Span]], spans: Collection[Span], device: torch.device, clock: Clock
    ) -> None:
        self.units = [[span for span in unit if span in spans] for unit in units]
        deferred = {span for unit in self.units for span in unit}
        self.rest = [span for span in spans if span not in deferred]
        self._device = device
        self._clock = clock
        self._stream = torch.cuda.Stream(device) if units and device.type == "cuda" else None
        self._unwritten: dict[int, Combine] = {}
        self._launched: dict[int, torch.cuda.Event] = {}

    def start(self, make: Callable[[], Combine]) -> None:
        """Defer the writes of all units to the function that `make` returns, and discard earlier deferred writes."""
        self.discard()
        if self._stream is None:
            self._unwritten = dict.fromkeys(range(len(self.units)), make())
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            # `make` runs in this stream so that the allocator does not reuse its memory before the kernels end.
            combine = make()
            for unit, spans in enumerate(self.units):
                combine(spans)
                self._launched[unit] = self._stream.record_event()

    def prepare(self, unit: int) -> torch.cuda.Event | None:
        """Write the weights of a unit, or make the current stream wait for them.

        Returns:
            The event that other streams have to wait for, if any.
        """
        with self._clock.part("combine in forward"):
            return self._write(unit)

    def write_all(self) -> None:
        """Write the weights of all units, or make the current stream wait for them."""
        for unit in range(len(self.units)):
            self._write(unit)

    def discard(self) -> None:
        """Cancel the writes that have not started, and make the current stream wait for the others."""
        self._unwritten.clear()
        self._launched.clear()
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def _write(self, unit: int) -> torch.cuda.Event | None:
        if combine := self._unwritten.get(unit):
            combine(self.units[unit])
            del self._unwritten[unit]  # after the write, so that an interrupted write is repeated
        event = self._launched.get(unit)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return event
