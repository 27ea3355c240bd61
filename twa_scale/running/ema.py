"""Exponential moving averages of this rank's weights, in float32 beside them."""

from collections.abc import Callable, Mapping, Sequence

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import TwaError
from twa_scale.running.settings import EmaSettings

PIECE = 1 << 22
"""Elements of a span that are widened to float32 at a time."""


class Ema:
    """One average for each decay and half-life, of the spans of this rank. Nothing here is collective.

    The first update copies the weights; each later one is `average = d * average + (1 - d) * weights`, which with a
    constant decay d is what torch.optim.swa_utils computes. With a half-life of h updates so far, d = 2^(-1 / (h t))
    at update t: half of an average's weight lies on the last h t updates, at any t.

    Args:
        settings: decays and when to update.
        live: the weights of this rank, by span.
        buffers: of the model, live.
        allocate: gives zeros for a number of elements and a type.
    """

    def __init__(
        self,
        settings: EmaSettings,
        live: Mapping[Span, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        allocate: Callable[[int, torch.dtype], torch.Tensor],
    ) -> None:
        self.settings = settings
        self.names = tuple(settings.names())
        self.updates = 0
        self.averages: list[dict[Span, torch.Tensor]] = [
            {span: allocate(len(span), wide(values)) for span, values in live.items()} for _ in self.names
        ]
        """By average: float32, or float64 where the weights are."""
        held: Mapping[str, torch.Tensor] = buffers if settings.use_buffers else {}
        self.buffers: list[dict[str, torch.Tensor]] = [
            {name: torch.zeros_like(buffer) for name, buffer in held.items()} for _ in self.names
        ]

    @property
    def nbytes(self) -> int:
        """Bytes that the averages occupy on this rank."""
        averages = sum(tensor.nbytes for average in self.averages for tensor in average.values())
        return averages + sum(tensor.nbytes for buffers in self.buffers for tensor in buffers.values())

    @torch.no_grad()
    def update(self, live: Mapping[Span, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
        """Take in the present weights. On a GPU it is queued, and nothing waits."""
        self.updates += 1
        gains = [1 - self.settings.decay(i, self.updates) for i in range(len(self.names))]
        for span, values in live.items():
            _add(values, [average[span] for average in self.averages], gains)
        for name, buffer in buffers.items() if self.settings.use_buffers else ():
            for gain, averages in zip(gains, self.buffers, strict=True):
                if buffer.is_floating_point() and gain < 1:
                    averages[name].lerp_(buffer, gain)
                else:
                    averages[name].copy_(buffer)

    def require_finite(self, index: int) -> None:
        """Refuse an average of weights that were not finite.

        Raises:
            TwaError: names the average and the tensor.
        """
        for span, average in self.averages[index].items():
            if not bool(torch.isfinite(torch.stack(torch.aminmax(average))).all()):
                raise TwaError(
                    f"{self.names[index]}: tensor {span.name!r} is not finite, because the weights were not at an "
                    "update: training has diverged. Load the state of a step before."
                )

    @torch.no_grad()
    def write(self, index: int, live: Mapping[Span, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
        """Write one average into the weights, rounded once, and its buffers into those of the model."""
        for span, values in live.items():
            values.copy_(self.averages[index][span], non_blocking=True)
        for name, values in self.buffers[index].items():
            buffers[name].copy_(values)


def wide(values: torch.Tensor) -> torch.dtype:
    """Return the type in which weights are averaged: float32, or float64 where they are."""
    return torch.promote_types(values.dtype, torch.float32)


def _add(values: torch.Tensor, averages: Sequence[torch.Tensor], gains: Sequence[float]) -> None:
    """Move averages of one span towards its values, a piece at a time where these have to be widened or moved."""
    same = all(average.dtype == values.dtype and average.device == values.device for average in averages)
    size = len(values) if same else PIECE
    for start in range(0, len(values), max(size, 1)):
        piece = values[start : start + size]
        for average, gain in zip(averages, gains, strict=True):
            place = average[start : start + size]
            if piece.device != place.device or piece.dtype != place.dtype:
                piece = piece.to(place)
            if gain < 1:
                place.lerp_(piece, gain)
            else:
                place.copy_(piece)
