"""A small training for each framework, and a training loop with which it is compared."""

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import twa_scale

STEPS, HALF, DECAY, ACCUMULATE, SIZE = 6, 3, 0.5, 2, 4
"""Steps, those of an epoch, the decay of the average, batches of a step and rows of a batch."""
WINDOW = {"every": 1, "keep": 3, "store": "packed8"}
LEARN: dict[str, Any] = {"groups": "tensor", "optimizer": {"lr": 0.05}}
ROWS = {**LEARN, "groups": "tensor+row"}

Weights = dict[str, torch.Tensor]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))


def rows() -> torch.Tensor:
    """Return the inputs of an epoch. The targets are their sines."""
    return torch.randn(HALF * ACCUMULATE * SIZE, 6, generator=torch.Generator().manual_seed(0))


def loss_of(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(net(x), x.sin())


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return a copy of a parameter. Collective if it is sharded."""
    value = parameter.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def weights_of(net: nn.Module) -> Weights:
    return {name: whole(p) for name, p in net.named_parameters()}


def same(one: Any, other: Any) -> bool:
    """Return whether two states have the same bits."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def require_equal(found: Weights, wanted: Weights, tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def require_learned(found: Weights, by_hand: dict[str, Any]) -> None:
    """Compare coefficients learned from a window. Rounding of weights changes packed differences by one."""
    require_equal(found, by_hand["learned"], 1e-3)
    assert not all(torch.allclose(found[name], value, rtol=0, atol=5e-3) for name, value in by_hand["ema"].items())


def train_by_hand() -> dict[str, Any]:
    """Train in a loop with RunningAverages, and learn from the window."""
    net, batches = network(), rows().split(SIZE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    averages = twa_scale.RunningAverages(net, ema=[DECAY], window=WINDOW)
    actual: dict[str, Any] = {}
    for i, x in enumerate([*batches, *batches]):
        (loss_of(net, x) / ACCUMULATE).backward()
        if (i + 1) % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
            averages.step()
        if i + 1 == HALF * ACCUMULATE:
            actual["trained half"] = weights_of(net)
            with averages.weights("ema"):
                actual["ema half"] = weights_of(net)
    actual["trained"] = weights_of(net)
    with averages.weights("ema"), torch.no_grad():
        actual["ema"] = weights_of(net)
        actual["val_loss"] = float(sum(loss_of(net, x) for x in batches[:2]) / 2)
    with averages.learning(LEARN) as twa:
        take_steps(net, twa)
        actual["learned"] = weights_of(net)
    return actual


def coefficients_by_hand() -> tuple[torch.Tensor, Weights]:
    """Return the coefficients of three networks after two epochs, and the weights with corrections of rows."""
    net = network()
    twa = twa_scale.attach(net, [network(seed).state_dict() for seed in range(3)], ROWS)
    take_steps(net, twa)
    take_steps(net, twa)
    twa.close()
    return twa.coefficients, weights_of(net)


def take_steps(net: nn.Module, twa: twa_scale.TrainableAverage) -> None:
    """Train coefficients for an epoch."""
    for i, x in enumerate(rows().split(SIZE)):
        (loss_of(net, x) / ACCUMULATE).backward()
        if (i + 1) % ACCUMULATE == 0:
            twa.step()
            twa.zero_grad()
