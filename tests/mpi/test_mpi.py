"""Ranks that mpirun starts: replicas without a process group, and shards that reduce over MPI."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models, reference
from tests.mpi.conftest import Mpirun
from tests.mpi.settings import BATCH, CONFIGS, PODS, STEPS
from tests.ranks.test_equality import errors

SIZES = [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]


@pytest.fixture(scope="session")
def launched(mpirun: Mpirun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """Return the results of each case by rank for a number of ranks. One launch for each number runs all cases.

    A fixture with the number as its parameter would launch again each time that pytest changes between numbers.
    """

    @cache
    def launch(size: int) -> Any:
        directory = tmp_path_factory.mktemp("mpi")
        cases = ["methods", "replicas", "spoiled", *(["wants_gloo", "sharded"] if size > 1 else [])]
        ended = mpirun(size, "tests.mpi.script", ",".join(cases), directory)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return {case: [torch.load(directory / f"{case}-{rank}.pt") for rank in range(size)] for case in cases}

    return launch


@pytest.fixture(params=SIZES)
def results(request: pytest.FixtureRequest, launched: Callable[[int], Any]) -> Any:
    return launched(request.param)


@cache
def expected(config: str, size: int) -> dict[str, torch.Tensor]:
    """Return the weights of a single process with the same batches."""
    steps = [[models.part(models.batch(step, BATCH), rank, size) for rank in range(size)] for step in range(STEPS)]
    model, states = models.build(scalar_shape=(1,)), models.candidates(scalar_shape=(1,))
    return reference.train(model, models.loss, states, CONFIGS[config], steps).weights[-1]


def require_equal(by_rank: list[dict[str, Any]], name: str, config: str) -> None:
    for result in by_rank:
        off = errors(result[name]["weights"], expected(config, len(by_rank)))
        assert max(off.values()) <= 1e-5, off
        assert torch.equal(result[name]["coefficients"], by_rank[0][name]["coefficients"])


@pytest.mark.parametrize("config", CONFIGS)
def test_replicas_equal_one_process_on_all_data(results: Any, config: str) -> None:
    require_equal(results["replicas"], config, config)


@pytest.mark.parametrize("results", SIZES[1:], indirect=True)
def test_sharded_model_reduces_over_mpi(results: Any) -> None:
    for name in {2: ["block"], 4: ["block", PODS]}[len(results["methods"])]:
        require_equal(results["sharded"], name, "block")


def test_error_of_one_rank_is_raised_on_all(results: Any) -> None:
    output = {result["error"] for result in results["spoiled"]}
    assert len(output) == 1 and "head.weight" in output.pop()


@pytest.mark.parametrize("results", SIZES[1:], indirect=True)
def test_torch_reductions_need_a_process_group(results: Any) -> None:
    for result in results["wants_gloo"]:
        assert "'gloo' needs a torch process group" in result["error"]


def test_all_methods_of_a_group_over_mpi(results: Any) -> None:
    size = len(results["methods"])
    ranks = range(size)
    for result in results["methods"]:
        assert result["kind"] == ("MpiGroup" if size > 1 else "Group")
        assert result["sum"].tolist() == [
            [sum(r + 1 for r in ranks) * v for v in row] for row in ([0, 3], [1, 4], [2, 5])
        ]
        assert result["whole"] == size * 2**53 + sum(ranks)
        assert result["half"].tolist() == [0.5 * size, sum(ranks)] and result["half"].dtype == torch.bfloat16
        assert result["none"].numel() == 0 and torch.equal(result["third"], results["methods"][0]["third"])
        assert result["gather"] == [{"rank": rank} for rank in ranks] and result["broadcast"] == size - 1
        assert result["all_gather"].tolist() == [rank for rank in ranks for _ in range(2)]
        assert result["copied"].tolist() == [[size - 1] * 2] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [("dies", "not mounted on this node"), ("lost", "MASTER_ADDR")],
)
def test_failing_rank_ends_the_others(mpirun: Mpirun, tmp_path: Path, case: str, words: str) -> None:
    ended = mpirun(2, "tests.mpi.script", case, tmp_path, timeout=60)
    assert ended.returncode != 0 and words in ended.stderr
