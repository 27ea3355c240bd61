"""Weights that a step leaves to the next forward pass, unit by unit: `combine: forward`."""

from collections.abc import Callable, Collection, Sequence

import torch

from twa_scale.base.clock import Clock
from twa_scale.base.spans import Span

Combine = Callable[[Collection[Span]], None]
"""Writes the weights of these spans."""


class Postponed:
    """Writes the weights of units beside the step: on a GPU on a stream of its own, on a CPU when a unit is settled.

    Args:
        units: spans that are used together, in the order of forward passes; none if nothing is to be postponed.
        spans: those that are trained.
        device: where the weights are.
        clock: is told how long `settle` has held up the current stream, or the CPU.
    """

    def __init__(
        self, units: Sequence[Sequence[Span]], spans: Collection[Span], device: torch.device, clock: Clock
    ) -> None:
        self.units = [[span for span in unit if span in spans] for unit in units]
        postponed = {span for unit in self.units for span in unit}
        self.rest = [span for span in spans if span not in postponed]
        self._device = device
        self._clock = clock
        self._side = torch.cuda.Stream(device) if units and device.type == "cuda" else None
        self._unwritten: dict[int, Combine] = {}
        self._launched: dict[int, torch.cuda.Event] = {}

    def start(self, make: Callable[[], Combine]) -> None:
        """Let `make()` write the units, in place of what was postponed before."""
        self.drop()
        if self._side is None:
            self._unwritten = dict.fromkeys(range(len(self.units)), make())
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            combine = make()  # here: memory of this stream is given to nobody before its kernels are done
            for unit, spans in enumerate(self.units):
                combine(spans)
                self._launched[unit] = self._side.record_event()

    def settle(self, unit: int) -> torch.cuda.Event | None:
        """Let the current stream find the weights of a unit; return what other streams have to wait for, if any."""
        with self._clock.part("combine in forward"):
            return self._settle(unit)

    def settle_all(self) -> None:
        """Let the current stream find all weights."""
        for unit in range(len(self.units)):
            self._settle(unit)

    def drop(self) -> None:
        """Forget what is not written, and let the current stream wait for what is being written."""
        self._unwritten.clear()
        self._launched.clear()
        if self._side is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._side)

    def _settle(self, unit: int) -> torch.cuda.Event | None:
        if combine := self._unwritten.get(unit):
            combine(self.units[unit])
            del self._unwritten[unit]  # not before: what is interrupted here is still to be written
        event = self._launched.get(unit)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return event
