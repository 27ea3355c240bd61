"""Every kernel, with every store, against float64."""

from collections.abc import Iterator

import torch

from tests.gpu.stages.rows import STORES, exact, random_rows
from tests.gpu.stages.setup import Row, Setup
from twa_scale.kernels import Kernels, choose_kernels

SHAPES = ((1, 1, 0), (3, 129, 0), (16, 5003, 0), (5, 1000, 37), (16, 70_001, 127))
LARGE = (16, (1 << 22) + 5, 77)
TOLERANCE = {"triton": 2e-6, "torch": 2e-6, "numba": 1e-4}
"""Relative to the lengths of the vectors. CPU kernels round the factor of a block to 16 bits."""
ROUNDED = 3e-3
"""Relative to the length of weights that are rounded to bfloat16."""


def run(setup: Setup) -> Iterator[Row]:
    torch.manual_seed(0)
    for name in ("triton", "torch") if setup.cuda else ("numba", "torch"):
        kernels = choose_kernels(name, setup.device)
        if kernels.name != name:
            yield Row(f"{name} kernels", "not to be had", ok=False)
            continue
        shapes = SHAPES if setup.tiny else (*SHAPES, LARGE)
        for store in STORES:
            actual = [errors(kernels, store, n, m, start, setup.device) for n, m, start in shapes]
            project, combine, rounded = (max(column) for column in zip(*actual, strict=True))
            ok = max(project, combine) <= TOLERANCE[name] and rounded <= ROUNDED
            measured = f"project {project:.1e}, combine {combine:.1e}, to bfloat16 {rounded:.1e}"
            yield Row(f"{name}, `{store}`: largest error", measured, f"{TOLERANCE[name]:.0e}, {ROUNDED:.0e}", ok)


def errors(
    kernels: Kernels, store: str, n: int, m: int, start: int, device: torch.device
) -> tuple[float, float, float]:
    """Return the errors of project, and of combine in float32 and bfloat16, relative to the lengths of vectors."""
    rows = random_rows(store, n, m, device, start)
    precise, gradient, base = exact(rows), torch.randn(m, device=device), torch.randn(m, device=device)
    weights = torch.randn(n, device=device)
    lengths = precise.norm(dim=1) * gradient.double().norm()
    project = ((kernels.project(rows, gradient) - precise @ gradient.double()).abs() / lengths.clamp(min=1e-30)).max()
    expected = 0.7 * base.double() + weights.double() @ precise
    actual = []
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((m,), torch.nan, device=device, dtype=dtype)
        kernels.combine(rows, weights, base, 0.7, out)
        size = 0.7 * base.double().norm() + (weights.double().abs() * precise.norm(dim=1)).sum()
        actual.append(float((out.double() - expected).norm() / size))
    return float(project), actual[0], actual[1]
