"""The check that written values are finite, except for infinities in masks."""

import math

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import OutputError


def require_finite(span: Span, values: torch.Tensor, stored: torch.Tensor, *, allow_infinite: bool = False) -> None:
    """Check that the values to be written are finite.

    Args:
        span: the span of the values.
        values: the values before conversion, 1-D, of any type and on any device.
        stored: the values in the type of the file, 1-D, on the CPU.
        allow_infinite: whether values that were infinite before conversion are accepted.

    Raises:
        OutputError: a value is not finite, or too large for the type of the file.
    """
    if not stored.is_floating_point():
        return
    saturated = _saturated(values, stored)
    if saturated is None and _all_finite(stored):
        return
    wrong = ~torch.isfinite(stored.float())
    if saturated is not None:
        wrong |= saturated
    if allow_infinite:
        wrong &= ~torch.isinf(values.to("cpu", torch.float64))
    if not wrong.any():
        return
    i = int(wrong.nonzero()[0])
    value, location = values[i].item(), f"tensor {span.name!r}, element {span.element(i)}"
    if torch.isfinite(values[i]):
        raise OutputError(
            f"{location}: holds {value:g}, too large for {stored.dtype}, whose maximum is "
            f"{torch.finfo(stored.dtype).max:g}. Choose a wider dtype."
        )
    raise OutputError(
        f"{location}: holds {value}; only finite numbers are written. Look for candidates, coefficients or a learning "
        "rate that are too large, and go back to a state in which the weights are finite."
    )


def _saturated(values: torch.Tensor, stored: torch.Tensor) -> torch.Tensor | None:
    """Return where values were replaced by the largest number of an 8-bit type, which torch converts to without Inf."""
    if stored.itemsize > 1 or values.dtype == stored.dtype:
        return None
    limits = torch.finfo(stored.dtype)
    half_unit = limits.eps * 2 ** math.floor(math.log2(limits.max)) / 2
    beyond = values.to("cpu", torch.float64).abs() >= limits.max + half_unit
    return beyond if beyond.any() else None


def _all_finite(values: torch.Tensor) -> bool:
    if not len(values):
        return True
    values = values if values.itemsize > 1 else values.float()  # torch has no sums of 8-bit floating point types.
    if torch.isfinite(values.sum()):  # This is the fastest test, but the sum of finite numbers may overflow.
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))
