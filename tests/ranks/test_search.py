"""Search on several ranks: one rank proposes, all ranks evaluate, and scores must be the same."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests.pool import Pool


def searched(engine: str, method: Any, local: bool = False) -> tuple[list[float], list[str]]:
    states = []
    for i in range(4):
        torch.manual_seed(i)
        states.append(nn.Linear(6, 4).state_dict())
    model: nn.Module = nn.Linear(6, 4)
    if engine == "fsdp2":
        fully_shard(model)
    elif engine == "ddp":
        model = DistributedDataParallel(model)
    twa = twa_scale.attach(model, states)
    torch.manual_seed(dist.get_rank())
    inputs, target = torch.randn(8, 6), (states[2]["weight"] + states[3]["weight"]) / 2

    def loss() -> float:
        with torch.no_grad():
            result = (model(inputs) - inputs @ target.T).square().sum()
        if not local:
            dist.all_reduce(result)
        return float(result)

    actual = twa_scale.search(twa, loss, method, budget=30, higher_is_better=False)
    twa.close()
    return twa.coefficients[:, 0].tolist(), [evaluation.label for evaluation in actual.evaluations]


@pytest.mark.parametrize(("engine", "size"), [("fsdp2", 2), pytest.param("ddp", 3, marks=pytest.mark.slow)])
def test_all_ranks_end_at_the_best(ranks: Pool, engine: str, size: int) -> None:
    for method in ("sweep", "cma"):
        actual = ranks(searched, size, engine=engine, method=method)
        assert all(item == actual[0] for item in actual)
        if method == "sweep":
            assert actual[0][0] == pytest.approx([0, 0, 0.5, 0.5], abs=1e-6)


def test_scores_that_differ_are_refused(ranks: Pool) -> None:
    outcomes = ranks.outcomes(searched, 2, engine="fsdp2", method="sweep", local=True)
    assert all(isinstance(outcome.error, twa_scale.ConfigError) for outcome in outcomes)
    assert all("Sum it over the ranks" in str(outcome.error) for outcome in outcomes)
