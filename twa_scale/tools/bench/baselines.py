"""Baselines for `project` and `combine`: memory rates, AdamW and the published method; and the rest of an update."""

import torch

from twa_scale.ranks import Group
from twa_scale.tools.bench.timing import Measured, Operation, measure

MEMORY = 1 << 31
"""The largest amount of memory that is read and copied, in bytes."""


def coefficient_optimizer(n: int, groups: int, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW for coefficients of shape (groups, n), with a gradient."""
    x = torch.nn.Parameter(torch.zeros(groups, n, device=device))
    x.grad = torch.zeros_like(x)
    return torch.optim.AdamW([x], lr=1e-3)


def memory_rates(elements: int, device: torch.device) -> list[Measured]:
    """Measure reading and copying `elements` float32 numbers, at most `MEMORY` bytes."""
    data = torch.ones(min(elements, MEMORY // 4), device=device)
    first, second = data.chunk(2) if len(data) % 2 == 0 else data[1:].chunk(2)
    copy = Operation("copy", lambda: first.copy_(second), 2 * first.nbytes)
    return measure([Operation("read", data.sum, data.nbytes), copy], device)


def reduction(n: int, groups: int, device: torch.device) -> Measured:
    """Measure the all-reduce of the coefficient gradients. Collective."""
    group, products = Group.world(), torch.zeros(groups, n + 1, dtype=torch.float64, device=device)
    reduce = Operation(f"reduction over {group.size} ranks", lambda: group.sum_(products), products.nbytes)
    return measure([reduce], device)[0]


def adamw(weights: torch.Tensor, gradient: torch.Tensor) -> Measured:
    """Measure a step of AdamW on all weights, as in training without averaging."""
    parameter = torch.nn.Parameter(weights.clone())
    parameter.grad = gradient
    optimizer = torch.optim.AdamW([parameter], lr=1e-9, fused=True)
    optimizer.step()
    return measure([Operation("AdamW(fused=True)", optimizer.step, 7 * weights.nbytes)], weights.device)[0]


def published(n: int, gradient: torch.Tensor) -> list[Measured]:
    """Measure the published method (journal branch): uint8 codes with one scale and zero point for each row.

    The method dequantizes all n rows to float32. It is measured on a part of the elements, and the time is scaled to
    all.
    """
    part = gradient[: 1 << 20]
    times = len(gradient) / len(part)
    codes = torch.randint(256, (n, len(part)), dtype=torch.uint8, device=gradient.device)
    scale, zero, u = (
        torch.rand(n, 1, device=gradient.device),
        torch.rand(n, device=gradient.device),
        torch.rand(n, 1, device=gradient.device),
    )

    def project() -> torch.Tensor:
        return (codes * (scale * part)).sum(1) + zero * part.sum()

    def combine() -> torch.Tensor:
        return (codes * (scale * u)).sum(0) + (zero[:, None] * u).sum()

    named = {"published project": project, "published combine": combine}
    nbytes = codes.nbytes + part.nbytes
    small = measure([Operation(name, function, nbytes) for name, function in named.items()], gradient.device)
    return [Measured(of.name, of.seconds * times, of.nbytes * times) for of in small]
