"""Exponential moving averages of this rank's weights in float32."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import TwaError
from twa_scale.running.settings import EmaSettings

PIECE = 1 << 22
"""The number of elements that are converted to float32 at a time."""


class Ema:
    """One average for each decay and half-life, of the spans of this rank. No method is collective.

    The first update copies the weights. Each later update is `average = d * average + (1 - d) * weights`. With a
    constant decay d, torch.optim.swa_utils computes the same. With a half-life of h, a fraction of the updates so far,
    d = (1 - 1/t)^p at update t, with (1 - h)^p = 1/2: the last h t updates have half of the total weight. BEMA also
    keeps its exponential average and the first weights: see `BemaSettings`.

    Args:
        settings: the decays, and the steps of the updates.
        live: the weights of this rank, by span.
        buffers: the buffers of the model, not copied; empty on ranks that do not keep them.
        allocate: returns zeros for a number of elements and a type.
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
        self.stored_names = settings.stored_names()
        """The names of `averages`, which start with `names`."""
        self.updates = 0
        self.averages: list[dict[Span, torch.Tensor]] = [
            {span: allocate(len(span), averaging_dtype(values)) for span, values in live.items()}
            for _ in self.stored_names
        ]
        """The values of each average, by span: float32, or float64 for weights in float64."""
        averaged: Mapping[str, torch.Tensor] = buffers if settings.use_buffers else {}
        self.buffers: list[dict[str, torch.Tensor]] = [
            {name: allocate(buffer.numel(), buffer.dtype).view(buffer.shape) for name, buffer in averaged.items()}
            if average in self.names
            else {}
            for average in self.stored_names
        ]
        """The buffers of each average, by name, in the types of the model."""

    @property
    def nbytes(self) -> int:
        """The bytes of the averages on this rank."""
        averages = sum(tensor.nbytes for average in self.averages for tensor in average.values())
        return averages + sum(tensor.nbytes for buffers in self.buffers for tensor in buffers.values())

    @torch.no_grad()
    def update(self, live: Mapping[Span, torch.Tensor], buffers: Mapping[str, torch.Tensor]) -> None:
        """Update the averages with the current weights. On a GPU, the host does not wait."""
        updates = self.updates + 1
        gains = [1 - self.settings.decay(i, updates) for i in range(len(self.names))]
        for pieces in _buckets(live, self.averages[0]):
            targets = [[average[span][part] for span, part in pieces] for average in self.averages]
            values = _as_averages([live[span][part] for span, part in pieces], targets[0])
            if self.settings.bema:
                *targets, corrected, ema, first = targets
                targets.append(ema)
            for gain, target in zip(gains, targets, strict=True):
                _update(target, values, gain)
            if self.settings.bema:
                if updates == 1:
                    torch._foreach_copy_(first, values)
                _correct(corrected, ema, first, values, self.settings.alpha(updates))
        for gain, averages in zip(gains, self.buffers, strict=False):
            for name, average in averages.items():
                _update([average], [buffers[name].to(average)], gain if average.is_floating_point() else 1.0)
        self.updates = updates

    def require_finite(self, index: int) -> None:
        """Check that the weights of an average were finite.

        Raises:
            TwaError: names the average and the tensor.
        """
        for span, average in self.averages[index].items():
            if not bool(torch.isfinite(torch.stack(torch.aminmax(average))).all()):
                raise TwaError(
                    f"{self.names[index]}: tensor {span.name!r} is not finite, because the weights were not at an "
                    "update: training has diverged. Load the state of an earlier step."
                )

    @torch.no_grad()
    def write(self, index: int, live: Mapping[Span, torch.Tensor]) -> None:
        """Write one average into the weights, rounded once."""
        for span, values in live.items():
            values.copy_(self.averages[index][span], non_blocking=True)


def averaging_dtype(values: torch.Tensor) -> torch.dtype:
    """Return the type in which weights are averaged: float32, or float64 for weights in float64."""
    return torch.promote_types(values.dtype, torch.float32)


SpanSlice = tuple[Span, slice]
"""Some elements of a span."""


def _buckets(live: Mapping[Span, torch.Tensor], averages: Mapping[Span, torch.Tensor]) -> Iterator[list[SpanSlice]]:
    """Yield cuts that are updated together: all that need no copy, and others up to `PIECE` elements of one type."""
    copied = [span for span, values in live.items() if not _has_same_type(values, averages[span])]
    direct = live.keys() - set(copied)
    for dtype in {averages[span].dtype for span in direct}:
        yield [(span, slice(None)) for span in live if span in direct and averages[span].dtype == dtype]
    bucket: list[SpanSlice] = []
    size = 0
    for span in sorted(copied, key=lambda span: (str(live[span].dtype), str(averages[span].dtype))):
        for start in range(0, len(span), PIECE):
            part = slice(start, min(start + PIECE, len(span)))
            count = part.stop - start
            if bucket and (size + count > PIECE or live[bucket[0][0]].dtype != live[span].dtype):
                yield bucket
                bucket, size = [], 0
            bucket.append((span, part))
            size += count
    if bucket:
        yield bucket


def _has_same_type(values: torch.Tensor, average: torch.Tensor) -> bool:
    return values.dtype == average.dtype and values.device == average.device


def _as_averages(values: list[torch.Tensor], averages: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the values in the type and on the device of the averages."""
    if _has_same_type(values[0], averages[0]):
        return values
    copies = [torch.empty_like(average) for average in averages]
    torch._foreach_copy_(copies, values)
    return copies


def _update(averages: list[torch.Tensor], values: list[torch.Tensor], gain: float) -> None:
    """Add gain * (values - averages) to the averages, which have the same types."""
    if gain < 1:
        torch._foreach_lerp_(averages, values, gain)
    else:
        torch._foreach_copy_(averages, values)


def _correct(
    corrected: list[torch.Tensor],
    average: list[torch.Tensor],
    first: list[torch.Tensor],
    values: list[torch.Tensor],
    alpha: float,
) -> None:
    """Write average + alpha (values - first) into `corrected`. All tensors have the same types."""
    torch._foreach_copy_(corrected, values)
    torch._foreach_sub_(corrected, first)
    torch._foreach_mul_(corrected, alpha)
    torch._foreach_add_(corrected, average)
