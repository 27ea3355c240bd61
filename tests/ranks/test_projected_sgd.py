"""SGD on coefficients of an orthonormal basis is projected SGD in weight space, as published (TWA, ICLR 2023)."""

from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from tests import models
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.reference import Scored

LR, MOMENTUM, DECAY, NUM_STEPS = 3e-4, 0.9, 3.0, 10
BLOCKS = {  # which tensors are one vector of weight space
    "global": [""],
    "block": ["stem.", "embed.", "embed_mix.", "blocks.0.", "blocks.1."],
}


def run(groups: str) -> Run:
    sgd = {"name": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY}
    return Run({"basis": "orthonormal", "units": "weight", "groups": groups, "optimizer": sgd})


def trajectories(engine: str) -> dict[str, list[dict[str, Tensor]]]:
    """Return whole weights before the first step and after every step."""
    result: dict[str, list[dict[str, Tensor]]] = {}
    for groups in BLOCKS:
        model, twa = cases.attach(engine, run(groups))
        result[groups] = [cases.gathered(model)]
        for step in range(NUM_STEPS):
            cases.one_step(model, twa, step)
            result[groups].append(cases.gathered(model))
    return result


@cache
def projected_sgd(groups: str, size: int) -> list[dict[str, Tensor]]:
    """w <- w - lr m, m <- 0.9 m + P P^T (grad + decay w), where P is any orthonormal basis of a group."""
    model = models.build().double()
    scored = Scored(model, models.loss)
    states = models.candidates()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    parts = [[name for name in trained if name.startswith(prefix)] for prefix in BLOCKS[groups]]
    w = {name: torch.stack([state[name].double() for state in states]).mean(0) for name in shapes}
    projections = []
    for part in parts:
        columns = torch.stack([torch.cat([state[name].double().flatten() for name in part]) for state in states], dim=1)
        projections.append(torch.linalg.qr(columns).Q)
    momentum = [torch.zeros(len(q), dtype=torch.float64) for q in projections]
    history = [dict(w)]
    for step in range(NUM_STEPS):
        leaves = {name: w[name].clone().requires_grad_() for name in trained}
        for data in cases.micro_batches(step, size):
            weights = {f"model.{name}": value for name, value in (w | leaves).items()}
            (functional_call(scored, weights, (data,)) / size).backward()
        for i, (part, q) in enumerate(zip(parts, projections, strict=True)):
            flat_w = torch.cat([w[name].flatten() for name in part])
            gradient = torch.cat([leaves[name].grad.flatten() for name in part])  # type: ignore[union-attr]
            momentum[i] = MOMENTUM * momentum[i] + q @ (q.T @ (gradient + DECAY * flat_w))
            pieces = (flat_w - LR * momentum[i]).split([shapes[name].numel() for name in part])
            w |= {name: piece.view(shapes[name]) for name, piece in zip(part, pieces, strict=True)}
        history.append(dict(w))
    return history


QUICK = [("plain", 1), ("fsdp2", 2)]


@pytest.mark.parametrize(
    ("engine", "size"), rest_slow(product(["plain", "ddp", "fsdp2"], [1, 2, 3]), lambda *case: case in QUICK)
)
def test_every_step_is_a_step_of_projected_sgd(ranks: Pool, engine: str, size: int) -> None:
    for by_groups in ranks(trajectories, size, engine=engine):
        for groups, history in by_groups.items():
            reference = projected_sgd(groups, size)
            assert len(history) == len(reference) == NUM_STEPS + 1
            for step, (got, expected) in enumerate(zip(history, reference, strict=True)):
                for name, value in expected.items():
                    error = (got[name].double() - value).norm() / value.norm()
                    assert error <= 1e-5, f"{groups}, after {step} steps: {name} is {error:.1e} off"


def test_projected_sgd_changes_the_weights() -> None:
    for groups in BLOCKS:
        first, *_, last = projected_sgd(groups, 1)
        assert (last["embed.weight"] - first["embed.weight"]).norm() > 0.01 * first["embed.weight"].norm()
