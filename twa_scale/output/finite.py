"""The check that written values are finite, except for infinities in masks."""

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
    if not stored.is_floating_point() or _all_finite(stored):
        return
    wrong = ~torch.isfinite(stored.float())
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


def _all_finite(values: torch.Tensor) -> bool:
    if not len(values):
        return True
    values = values if values.itemsize > 1 else values.float()  # torch has no sums of 8-bit floating point types.
    if torch.isfinite(values.sum()):  # This is the fastest test, but the sum of finite numbers may overflow.
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))
