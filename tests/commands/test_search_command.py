"""`twa-scale search` chooses an average by a metric of the task, on all ranks, also after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import as_launched, load, run_here, settings
from tests.commands.test_keep import candidates, measured_by_hand
from tests.pool import Pool
from tests.sums import averaged
from twa_scale.config import center_weights, load_config
from twa_scale.run.search import SearchOptions, run_search

TRIED = 3 + 7 * 2  # number of evaluations of a sweep over three candidates


def written(trained_candidates: TrainedCandidates, folder: Path, **changes: Any) -> Path:
    path = folder / "run.json"
    path.write_text(
        json.dumps(
            settings(trained_candidates.candidates, trained_candidates.task, folder / "out", evaluate_batches=None)
            | changes
        )
    )
    return path


def found(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "out/search/summary.json").read_text())
    return summary


def mixed(trained_candidates: TrainedCandidates, weights: Any) -> dict[str, torch.Tensor]:
    return averaged(weights, candidates(trained_candidates))


def test_sweep_exports_the_average_with_the_lowest_loss(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    """The scores are the losses of averages computed by the test, and the best one is exported."""
    config = written(scores, tmp_path, groups="tensor+row")
    result = shell("search", config)
    assert result.code == 0, result.err
    summary = found(tmp_path)
    tried = {item["label"]: item["score"] for item in summary["tried"]}
    assert len(tried) == summary["measured"] == TRIED and summary["metric"] == "validation/loss"
    assert not summary["higher_is_better"] and list(tried.values()) == sorted(tried.values())
    for name, label in (("lawa:2", "lawa:2"), ("minus-sqrt", "minus-sqrt of the last 3")):
        assert tried[label] == pytest.approx(measured_by_hand(scores, mixed(scores, center_weights(name, 3))), rel=1e-5)
    best = summary["best"]
    assert (
        best["score"] == min(tried.values()) and f"{best['score']:.6g}" in result.out and "last candidate" in result.out
    )
    exported = load(tmp_path / "out/search/average")
    for name, value in mixed(scores, best["coefficients"]).items():
        torch.testing.assert_close(exported[name].double(), value, rtol=1e-5, atol=1e-6)
    repeated = shell("search", config)
    assert repeated.code == 0 and "0 evaluated now" in repeated.out
    assert {**found(tmp_path), "seconds": 0, "measured": 0} == {**summary, "seconds": 0, "measured": 0}
    shell("search", config, "evaluate_batches=1", "--budget", 2)  # other data has a separate record
    assert found(tmp_path)["measured"] == 2 and len(found(tmp_path)["tried"]) == 2


def test_search_continues_after_a_signal(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    task = {"name": "tests.commands.interrupted:scores", "method": "metrics", "call": 9}
    config = written(TrainedCandidates(task, scores.candidates), tmp_path, evaluate_batches=2)
    result = shell("search", config)
    assert result.code == 75 and "after 5 averages" in result.err and not (tmp_path / "out/search/average").exists()
    (record,) = (tmp_path / "out/search").glob("scores-*.jsonl")
    assert len(record.read_text().splitlines()) == 1 + 5
    codes = [shell("search", config).code for _ in range(3)]  # each process receives the signal again
    assert codes == [75, 75, 0] and found(tmp_path)["measured"] == TRIED - 15 and len(found(tmp_path)["tried"]) == TRIED


def search_here(path: Path) -> dict[str, Any]:
    options = SearchOptions(["greedy", "sweep"])
    return as_launched(lambda: run_search(load_config(path), options))


def test_ranks_have_the_same_search_results(ranks: Pool, scores: TrainedCandidates, tmp_path: Path) -> None:
    """Each method starts at the best average so far, and the best of all is exported."""
    (tmp_path / "one").mkdir()
    (first,) = ranks(search_here, 1, path=written(scores, tmp_path / "one", start="best"))
    two, second = ranks(search_here, 2, path=written(scores, tmp_path, engine="fsdp2"))
    assert two["best"] == second["best"] and two["best"]["label"] == first["best"]["label"]
    assert two["best"]["score"] == pytest.approx(first["best"]["score"], rel=1e-5)
    assert len(first["tried"]) == TRIED + 5
    single, combined = load(tmp_path / "one/out/search/average"), load(tmp_path / "out/search/average")
    for name, value in single.items():
        torch.testing.assert_close(combined[name], value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--metric", "accuracy"], ["'accuracy'", "--lower-is-better"]),
        (["--metric", "accuracy", "--higher-is-better"], ["'accuracy'", "loss"]),
        (["--method", "swep"], ["'swep'", "did you mean 'sweep'"]),
        (["basis=simplex", "groups=tensor"], ["basis 'simplex'"]),
    ],
)
def test_invalid_searches_are_refused(
    scores: TrainedCandidates, tmp_path: Path, shell: Any, words: list[str], expected: list[str]
) -> None:
    result = shell("search", written(scores, tmp_path), *words)
    assert result.code == 2 and "Traceback" not in result.err and all(word in result.err for word in expected), (
        result.err
    )
    assert not (tmp_path / "out/search/average").exists() and not (tmp_path / "out/search/.lock").exists()


def test_a_summary_of_others_is_kept(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = written(scores, tmp_path)
    path = Path(json.loads(config.read_text())["output"]) / "search" / "summary.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"mine": 1}')
    result = shell("search", config)
    assert result.code and "was not written by a search" in " ".join(result.err.split())
    assert path.read_text() == '{"mine": 1}'


def test_run_and_search_share_an_output(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    """A search writes to its own directory and keeps the files of a run."""
    config = written(scores, tmp_path)
    run_here(json.loads(config.read_text()))
    before = (tmp_path / "out/summary.json").read_bytes()
    assert shell("search", config, "--budget", 1).code == 0
    assert (tmp_path / "out/summary.json").read_bytes() == before and "nothing was done" in shell("run", config).err
