"""`pods` in a configuration divides a run into groups that exchange only the gradient of the coefficients."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import load, run_here, settings
from tests.grid import rest_slow
from tests.pool import Pool
from twa_scale import ConfigError


@pytest.mark.parametrize(
    ("engine", "pods", "size"),
    rest_slow(
        [("auto", 2, 4), ("ddp", 2, 4), ("auto", 3, 3), ("plain", 2, 2)],
        lambda engine, pods, size: engine != "ddp" and pods == 2,
    ),
)
def test_a_run_in_pods_is_the_run_on_one_rank(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, pods: int, size: int
) -> None:
    """The weights are the same for the same batches. Every pod reads each byte of the candidates once."""
    single = settings(scores.candidates, scores.task, tmp_path / "alone")
    split = settings(scores.candidates, scores.task, tmp_path / "split", engine=engine, pods=pods)
    (whole,) = ranks(run_here, 1, data=single)
    result = ranks(run_here, size, data=split)[0]
    expected = load(tmp_path / "alone" / "average")
    for name, value in load(tmp_path / "split" / "average").items():
        assert (value - expected[name]).norm() <= 1e-5 * expected[name].norm(), name
    assert result["evaluation"] == pytest.approx(whole["evaluation"], rel=1e-5)
    assert sum(result["bytes_read_per_rank"]) == pods * sum(whole["bytes_read_per_rank"])


@pytest.mark.parametrize(("engine", "pods", "size"), [("auto", 2, 3), ("auto", 4, 2), ("plain", 2, 4)])
def test_invalid_number_of_pods_raises(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, pods: int, size: int
) -> None:
    data = settings(scores.candidates, scores.task, tmp_path / "out", engine=engine, pods=pods)
    error = ranks.error(run_here, size, data=data)
    assert isinstance(error, ConfigError) and "pods" in str(error) and str(size) in str(error)


def test_plan_with_pods(text: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    """A rank of 4 in 2 pods has the memory of a rank of 2, and few bytes are sent between pods."""
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings(text.candidates, text.task, tmp_path / "out")))

    def plan(*words: object) -> dict[str, Any]:
        result = shell("plan", config, "--json", *words)
        assert result.code == 0, result.err
        actual: dict[str, Any] = json.loads(result.out)
        return actual

    pods, half = plan("--ranks", 4, "pods=2"), plan("--ranks", 2)
    for key in ("weights", "store (dense32)"):
        assert pods["memory"][key] == half["memory"][key]
    assert pods["bytes_read"] == half["bytes_read"]
    numbers = 8 * (pods["num_candidates"] + 1) * pods["num_groups"]
    assert pods["wire_between_pods"]["coefficient gradients (twa_scale)"] == numbers
    assert half["wire_between_pods"] == {}
    refused = shell("plan", config, "--ranks", 3, "pods=2")
    assert refused.code == 2 and "pods" in refused.err
