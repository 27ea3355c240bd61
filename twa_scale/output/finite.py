"""No file holds a number that is not finite, but for the infinities of masks."""

import torch

from twa_scale.base.spans import Span
from twa_scale.errors import OutputError


def require_finite(span: Span, values: torch.Tensor, stored: torch.Tensor, *, masks: bool = False) -> None:
    """Refuse what a file must not hold.

    Args:
        span: where the values stand in their tensor.
        values: 1-D, as they were before they were converted; of any type and on any device.
        stored: 1-D, on the CPU, what the file would get.
        masks: whether values that are infinite may be written.

    Raises:
        OutputError: a value that is not finite, or too large for the type in the file.
    """
    if not stored.is_floating_point() or _all_finite(stored):
        return
    wrong = ~torch.isfinite(stored.float())
    if masks:
        wrong &= ~torch.isinf(values.to("cpu", torch.float64))
    if not wrong.any():
        return
    i = int(wrong.nonzero()[0])
    value, where = values[i].item(), f"tensor {span.name!r}, element {span.element(i)}"
    if torch.isfinite(values[i]):
        raise OutputError(
            f"{where}: holds {value:g}, too large for {stored.dtype}, which ends at "
            f"{torch.finfo(stored.dtype).max:g}. Choose a wider dtype."
        )
    raise OutputError(
        f"{where}: holds {value}; only finite numbers are written. Look for candidates, coefficients or a learning "
        "rate that are too large, and go back to a state in which the weights are finite."
    )


def _all_finite(values: torch.Tensor) -> bool:
    if not len(values):
        return True
    values = values if values.itemsize > 1 else values.float()  # there are no sums of 8 bits
    if torch.isfinite(values.sum()):  # the cheapest test; but finite numbers may have a sum that is too large
        return True
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(values))
