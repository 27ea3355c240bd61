"""Recalibrated BatchNorm statistics equal those that one process measures on all batches."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from tests import models
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale.engines.zero import is_deepspeed

NUM_BATCHES = 6
RUN = Run({"groups": "block", "center": "last"})


def batches() -> list[dict[str, Tensor]]:
    data = [models.batch(50 + i, 8) for i in range(NUM_BATCHES)]
    return [{"image": item["image"], "tokens": item["text"][:, :-1]} for item in data]


def recalibrate(engine: str) -> dict[str, Any]:
    model, twa = cases.attach(engine, RUN)
    for step in range(2):
        cases.one_step(model, twa, step)
    rank, size = cases.where()
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    model.eval()
    norm.momentum = 0.3
    twa.recalibrate_batchnorm(batches()[rank::size])
    modes = [
        module.training for module in model.modules() if not is_deepspeed(module)
    ]  # the flag of the wrapper itself never changes
    return {
        "weights": cases.gathered(model),
        "mean": norm.running_mean,
        "var": norm.running_var,
        "kept": norm.momentum == 0.3 and not any(modes),
    }


class ByKeyword(nn.Module):
    """A model that torch's update_bn can call: a dict is one input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(**inputs)
        return logits


@pytest.mark.parametrize(
    ("engine", "size"),
    rest_slow(
        product(["plain", "ddp", "fsdp2", "hsdp", "zero2", "zero3"], [1, 2, 3]),
        lambda engine, size: size == {"plain": 1, "fsdp2": 3, "hsdp": 2, "zero3": 2}.get(engine),
    ),
)
def test_statistics_are_those_of_all_batches_in_one_process(ranks: Pool, engine: str, size: int) -> None:
    for result in ranks(recalibrate, size, engine=engine):
        model = models.build()
        model.load_state_dict(result["weights"] | {"head.weight": result["weights"]["embed.weight"]}, strict=False)
        update_bn(batches(), ByKeyword(model))
        torch.testing.assert_close(result["mean"], model.stem.norm.running_mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(result["var"], model.stem.norm.running_var, rtol=1e-5, atol=1e-6)
        assert result["kept"], "momentum or modes were left changed"
