"""Averages that people name: "mean", "last", an index, or coefficients of their own."""

from collections.abc import Sequence

import torch

from twa_scale.config import candidate_index
from twa_scale.errors import ConfigError

Which = str | int | Sequence[float] | torch.Tensor


def averaging_coefficients(which: Which, center_weights: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the averaging coefficients a (n, G) that `which` names, like `center_weights` (n,) in type and device.

    Args:
        which: "mean" (uniform), "center", "first", "last", the index of a candidate, or coefficients: n numbers, or
            (n, G).
        center_weights: b, (n,).
        num_groups: G.

    Raises:
        ConfigError: an unknown name, an index out of range, or coefficients of another shape.
    """
    n = len(center_weights)
    if isinstance(which, str) and which == "mean":
        a = torch.full_like(center_weights, 1 / n)
    elif isinstance(which, str) and which == "center":
        a = center_weights
    elif isinstance(which, int) or (isinstance(which, str) and which in ("first", "last")):
        a = torch.zeros_like(center_weights)
        a[candidate_index(which, n, "weights")] = 1.0
    elif isinstance(which, str):
        raise ConfigError(f"weights: {which!r} is no name of weights; use trained, mean, center, first, last.")
    else:
        a = torch.as_tensor(which).to(center_weights)
    if a.shape == (n,):
        a = a[:, None].expand(-1, num_groups).contiguous()
    if a.shape != (n, num_groups):
        raise ConfigError(
            f"weights: coefficients of shape {tuple(a.shape)}; give ({n},) or ({n}, {num_groups}): candidates x groups."
        )
    return a
