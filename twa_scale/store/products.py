"""What `Store.project` returns, from the rows and the center of a span."""

import torch

from twa_scale.kernels import Dense, Kernels, Rows


def products(
    kernels: Kernels, rows: Rows, center: torch.Tensor, gradient: torch.Tensor, with_center: bool
) -> torch.Tensor:
    """Return <row_i, gradient> and, last, <center, gradient> (zero unless `with_center`): (n + 1,), float64."""
    found = kernels.project(rows, gradient)
    last = kernels.project(Dense.one(center), gradient) if with_center else found.new_zeros(1)
    return torch.cat([found, last])
