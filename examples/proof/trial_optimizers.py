"""Other ways to train coefficients, for trials of the recipes: methods with the key `optimizer`.

Each takes the place of torch.optim.AdamW while the coefficients are trained, so that all else is the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class SharpnessAware(torch.optim.AdamW):
    """Sharpness-aware minimization of the coefficients (arXiv 2010.01412). An update takes two steps.

    The first step of a pair moves the coefficients along the gradient by `radius`. The second one returns, and updates
    with the gradient at the other point, which is of the next batch.
    """

    radius: float

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        x = coefficients(self)
        state = self.state[x]
        if "moved" in state:
            x.sub_(state.pop("moved"))
            super().step(closure)
        else:
            moved = self.radius * x.grad / x.grad.norm().clamp_min(1e-12)  # a gradient of zeros moves nothing
            x.add_(moved)
            state["moved"] = moved


class PartOfCandidates(torch.optim.AdamW):
    """A step updates the coefficients of a random part of the candidates, as a store of these alone would."""

    fraction: float

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        x = coefficients(self)
        number, state = len(x), self.state[x]
        left_out = torch.randperm(number)[round(self.fraction * number) :]
        weights = x[left_out].clone()
        moments = {key: value[left_out].clone() for key, value in state.items() if value.shape == x.shape}
        super().step(closure)
        x[left_out] = weights
        for key, value in state.items():
            if value.shape == x.shape:
                value[left_out] = moments.get(key, 0.0)  # they are zero before the first step


def coefficients(optimizer: torch.optim.Optimizer) -> Any:
    """Return the only tensor of an optimizer."""
    tensors = [x for group in optimizer.param_groups for x in group["params"]]
    if len(tensors) > 1:
        raise ValueError(f"{type(optimizer).__name__} is for one coefficient a tensor or fewer, not for groups +row")
    return tensors[0]


OPTIMIZERS = {"sharpness-aware": SharpnessAware, "part of the candidates": PartOfCandidates}


@contextmanager
def in_place_of_adamw(name: str | None, options: dict[str, float]) -> Iterator[None]:
    """Train with one of `OPTIMIZERS` in a `with` block; `options` are its attributes. None: with AdamW itself."""
    if name is None:
        yield
        return
    adamw = torch.optim.AdamW
    vars(torch.optim)["AdamW"] = type(adamw.__name__, (OPTIMIZERS[name],), options)
    try:
        yield
    finally:
        vars(torch.optim)["AdamW"] = adamw
