"""Inner products of a gradient with the rows and the center of a span."""

import torch

from twa_scale.kernels import Dense, Kernels, Rows


def products(kernels: Kernels, rows: Rows, center: torch.Tensor | None, gradient: torch.Tensor) -> torch.Tensor:
    """Return <row_i, gradient> and, last, <center, gradient> (zero without a center): (n + 1,), float64."""
    found = kernels.project(rows, gradient)
    last = found.new_zeros(1) if center is None else kernels.project(Dense.one(center), gradient)
    return torch.cat([found, last])
