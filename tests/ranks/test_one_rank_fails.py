"""An error on one rank is raised on all ranks if they can communicate. Otherwise the other ranks end and name it."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import models
from tests.commands.conftest import TrainedCandidates
from tests.commands.conftest import scores as scores
from tests.commands.small_runs import Scores, run_here, settings
from tests.old_torch import OLD
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from tests.ranks.test_batchnorm import batches
from twa_scale import EngineError
from twa_scale.engines.ddp import DDPEngine
from twa_scale.engines.plain import PlainEngine
from twa_scale.errors import RankError
from twa_scale.ranks import Group


def recalibrate(engine: str, mode: str) -> tuple[str, bool]:
    """Make the second batch of the last rank invalid; return the error, and whether statistics and modes are kept."""
    model, twa = cases.attach(engine, Run({}))
    rank, size = cases.where()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def data() -> Iterator[dict[str, Tensor]]:
        first, second = batches()[:2]
        yield first
        if rank == size - 1:
            if mode == "iterator":
                raise ValueError("cannot decode picture 17")
            second = {name: value[:, :1] for name, value in second.items()}
        yield second

    message = ""
    try:
        twa.recalibrate_batchnorm(data())
    except (ValueError, RuntimeError) as error:
        message = str(error)
    assert sum(Group.world().gather(1)) == size  # the ranks are still synchronized
    return message, all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("engine", "mode"), [("plain", "iterator"), ("ddp", "iterator"), ("fsdp2", "iterator"), ("plain", "forward")]
)
def test_bad_data_in_recalibration(ranks: Pool, engine: str, mode: str, size: int) -> None:
    word = "cannot decode picture 17" if mode == "iterator" else "expected"
    for message, kept in ranks(recalibrate, size, engine=engine, mode=mode):
        assert word in message and kept, message


class FailingDDP(DDPEngine):
    def drain(self) -> None:
        super().drain()
        if dist.get_rank() == 1:
            raise EngineError("this rank has lost its gradients")


class FailingPlain(PlainEngine):
    def drain(self) -> None:
        if dist.get_rank() == 1:
            raise EngineError("this rank has lost its gradients")


def step(engine: str) -> tuple[str, bool]:
    model: nn.Module = models.build(seed=99)
    stored: Any = FailingPlain(model, Group.world())
    if engine == "ddp":
        model = DistributedDataParallel(model)
        stored = FailingDDP(model, Group.alone())
    twa = twa_scale.attach(stored, models.candidates(), {"groups": "block"})
    before = twa.coefficients
    rank, size = cases.where()
    models.loss(model, models.part(models.batch(0), rank, size)).backward()
    message = cases.error_text(twa.step)
    assert sum(Group.world().gather(1)) == size
    return message, torch.equal(before, twa.coefficients)


@pytest.mark.parametrize("engine", ["plain", "ddp"])
def test_engine_fails_in_drain(ranks: Pool, engine: str) -> None:
    for message, kept in ranks(step, 2, engine=engine):
        assert message == "this rank has lost its gradients" and kept


def attach_with_one_basis(engine: str) -> Tensor:
    only_the_first = (
        nullcontext()
        if dist.get_rank() == 0
        else patch("twa_scale.average.assemble.make_basis", side_effect=AssertionError)
    )
    with only_the_first:
        _, twa = cases.attach(engine, Run({"basis": "pca", "start": "last"}))
    coefficients: Tensor = twa.coefficients
    return coefficients


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_basis_is_computed_on_one_rank(ranks: Pool, engine: str) -> None:
    first, second = ranks(attach_with_one_basis, 2, engine=engine)
    assert torch.equal(first, second)


class Fails(Scores):
    """A task that fails at the given call of a method, on rank 1."""

    def __init__(self, method: str, call: int) -> None:
        super().__init__()
        self._method, self._left = method, call

    def _count(self, method: str) -> None:
        self._left -= method == self._method and os.environ["RANK"] == "1"
        if method == self._method and not self._left:
            raise KeyError("cannot decode picture 17")

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self._count("loss")
        return super().loss(model, batch)

    def metrics(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
        self._count("metrics")
        return super().metrics(model, batch)


def fails(method: str, call: int) -> Fails:
    return Fails(method, call)


@pytest.mark.parametrize(
    ("engine", "method", "timeout"),
    [
        ("plain", "loss", 50.0),  # long: the other rank is notified earlier
        ("fsdp2", "metrics", 6.0),  # it waits within a forward pass; the failing process and its group still exist
    ],
)
def test_task_fails_in_a_run(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, method: str, timeout: float
) -> None:
    if engine == "fsdp2" and OLD:
        pytest.skip("torch 2.6 does not change the time limit of a gloo group that exists")
    task = {"name": "tests.ranks.test_one_rank_fails:fails", "method": method, "call": 2}
    data = settings(scores.candidates, task, tmp_path / "out", engine=engine, timeout=timeout)
    other, failed = ranks.outcomes(run_here, 2, data=data)
    assert "cannot decode picture 17" in str(failed.error)
    assert isinstance(other.error, RankError), other.trace
    assert "rank 1 failed (KeyError: 'cannot decode picture 17')" in str(other.error)
