"""The mean of the gradients of rows over replicas, which may exchange them rounded."""

import torch
from typing_extensions import assert_never

from twa_scale.config.kinds import RowDtype
from twa_scale.ranks import Reduction

_MAX_CODE = 127  # the codes of int8 are -127 to 127


def exchanged_bytes(dtype: RowDtype, k: int, rows: int) -> int:
    """Return the bytes of the gradients (k, rows) that a rank exchanges with its replicas."""
    match dtype:
        case "float32":
            return 4 * k * rows
        case "bfloat16":
            return 2 * k * rows
        case "int8":
            return (k + 4) * rows
    assert_never(dtype)


class RowExchange:
    """Averages gradients over replicas, with error feedback for rounded gradients.

    With error feedback (arXiv 1901.09847), a rounding error is added to the gradient of the next step, so that errors
    do not accumulate. The codes of `int8` have one scale for each row: 1/127 of its largest absolute value.

    Rounded gradients are gathered, not reduced, so that each is rounded once: a rank receives those of all replicas.

    Args:
        dtype: the type of the values that ranks exchange.
        reduction: connects the replicas.
    """

    def __init__(self, dtype: RowDtype, reduction: Reduction) -> None:
        self._dtype = dtype
        self._reduction = reduction
        self._error: torch.Tensor | None = None

    def average_(self, values: torch.Tensor) -> None:
        """Average float32 `values`, (k, R), over replicas in place, with equal bits on all of them. Collective."""
        if self._dtype == "float32" or self._reduction.num_replicas == 1 or not values.numel():
            self._reduction.average_over_replicas_(values)
            return
        if self._error is not None:
            values += self._error
        encoded = self._encoded(values)
        self._error = values - self._decoded(encoded, *values.shape)
        values.zero_()
        for codes in self._reduction.gather_from_replicas(encoded):
            values += self._decoded(codes, *values.shape)
        values /= self._reduction.num_replicas

    def forget(self) -> None:
        """Reset the rounding errors of earlier steps, because a state does not contain them."""
        self._error = None

    def _encoded(self, values: torch.Tensor) -> torch.Tensor:
        """Return the bytes of rounded values, uint8."""
        if self._dtype == "bfloat16":
            return values.to(torch.bfloat16).view(torch.uint8).flatten()
        scales = values.abs().amax(0) / _MAX_CODE
        codes = torch.where(scales > 0, values / scales, 0).round_()
        return torch.cat([codes.to(torch.int8).view(torch.uint8).flatten(), scales.view(torch.uint8)])

    def _decoded(self, encoded: torch.Tensor, k: int, rows: int) -> torch.Tensor:
        """Return the values of `_encoded`, (k, rows), float32."""
        if self._dtype == "bfloat16":
            return encoded.view(torch.bfloat16).view(k, rows).float()
        codes, scales = encoded[: k * rows], encoded[k * rows :]
        return codes.view(torch.int8).view(k, rows) * scales.clone().view(torch.float32)
