"""`twa-scale evaluate` evaluates weights in files with the model and the data of a configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import as_launched, load, run_here, settings
from tests.commands.test_keep import candidates, measured_by_hand
from tests.pool import Pool
from twa_scale.config import RunConfig, validated
from twa_scale.run.evaluation import evaluate_weights


def test_evaluate_reads_the_output_of_a_run(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    """By default, the last candidate and the exported average are evaluated on the whole split."""
    data = settings(scores.candidates, scores.task, tmp_path / "out", evaluate_batches=1)
    config = tmp_path / "run.json"
    config.write_text(json.dumps(data))
    early = shell("evaluate", config)
    assert early.code == 2 and "no finished run" in early.err and "twa-scale run" in early.err
    run_here(data)
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    result = shell("evaluate", config, "--split", "validation", "-o", tmp_path / "found.json")
    assert result.code == 0, result.err
    measured = json.loads((tmp_path / "found.json").read_text())
    assert [Path(path).name for path in measured] == ["step-00000040", "average"]
    last, average = (metrics["loss"] for metrics in measured.values())
    assert last == pytest.approx(measured_by_hand(scores, candidates(scores)[-1]), rel=1e-5)
    assert average == pytest.approx(measured_by_hand(scores, load(tmp_path / "out/average")), rel=1e-5)
    assert f"{average:.6g}" in result.out and "validation" in result.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before


def evaluate_here(data: dict[str, Any], weights: list[str], recalibrate: bool = False) -> dict[str, Any]:
    config = validated(RunConfig, data | {"evaluate_split": "validation", "evaluate_batches": None})
    return as_launched(lambda: evaluate_weights(config, weights, recalibrate=recalibrate))


def test_ranks_read_their_parts_of_files_of_several_formats(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path
) -> None:
    torch.save(candidates(scores)[0], tmp_path / "first.pt")
    data = settings("nothing/*", scores.task, tmp_path / "out", engine="fsdp2", select={"last": 1})
    actual, other = ranks(evaluate_here, 2, data=data, weights=[str(tmp_path / "first.pt"), scores.candidates])
    assert actual == other and len(actual) == 4
    for metrics, state in zip(actual.values(), [candidates(scores)[0], *candidates(scores)], strict=True):
        assert metrics["loss"] == pytest.approx(measured_by_hand(scores, state), rel=1e-5)


def test_batchnorm_statistics(digits: TrainedCandidates, tmp_path: Path) -> None:
    """The statistics are those of the file unless they are recalibrated."""
    stale = {name: value + 1 if "running" in name else value for name, value in candidates(digits)[-1].items()}
    save_file(stale, tmp_path / "stale.safetensors")
    data, weights = settings(digits.candidates, digits.task, tmp_path / "out"), [str(tmp_path / "stale.safetensors")]
    (stored,), (recalibrated,) = (evaluate_here(data, weights, repeated).values() for repeated in (False, True))
    assert stored["loss"] == pytest.approx(measured_by_hand(digits, stale), rel=1e-4)
    assert recalibrated["loss"] < 0.9 * stored["loss"]


@pytest.mark.parametrize(
    "settings_of_averages",
    [
        {"store": "packed4", "coding": "increments", "split": "nothing"},
        {"groups": "tensor+row", "optimizer": {"name": "adamw", "lr": "auto", "row_lr": 0.01}},
        {"buffers": 2, "center": "lawa:2", "basis": "pca", "num_components": 1, "start": "best"},
        {"recipe": "soup", "groups": ["0"], "split": "train"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_of_averages_change_nothing(
    digits: TrainedCandidates, tmp_path: Path, settings_of_averages: dict[str, Any]
) -> None:
    data = settings(digits.candidates, digits.task, tmp_path / "out") | settings_of_averages
    (actual,) = evaluate_here(data, [f"{Path(digits.candidates).parent}/step-00000040"]).values()
    assert actual["loss"] == pytest.approx(measured_by_hand(digits, candidates(digits)[-1]), rel=1e-4)


def test_a_tensor_that_a_file_lacks_is_not_that_of_the_file_before(scores: TrainedCandidates, tmp_path: Path) -> None:
    whole = candidates(scores)[-1]
    save_file(whole, tmp_path / "a.safetensors")
    save_file({name: value for name, value in whole.items() if name != "0.bias"}, tmp_path / "b.safetensors")
    data = settings("nothing/*", scores.task, tmp_path / "out", missing="keep")
    torch.manual_seed(7)
    a, b = evaluate_here(data, [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]).values()
    assert a["loss"] == pytest.approx(measured_by_hand(scores, whole), rel=1e-5)
    assert abs(a["loss"] - b["loss"]) > 1e-4


def test_paths_are_printed_unchanged(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    folder = tmp_path / "[lr=1e-4]" / "[/b]"
    folder.mkdir(parents=True)
    save_file(candidates(scores)[-1], folder / "x.safetensors")
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings(scores.candidates, scores.task, tmp_path / "out")))
    result = shell("evaluate", config, "--split", "validation", "--weights", folder / "x.safetensors")
    assert result.code == 0 and "[lr=1e-4]/[/b]/x" in "".join(result.out.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--split", "validation", "--weights", "nowhere"], "nowhere"),
        (["--split", "tests"], "'tests' is not one of"),
        (["--batches", "0"], "--batches"),
        (["evaluate_split=validation"], "--split"),
        (["evaluate_batches=3"], "--batches"),
        (["evaluate_every=x"], "evaluate_every"),
    ],
)
def test_invalid_arguments_raise(
    text: TrainedCandidates, tmp_path: Path, shell: Any, words: list[str], named: str
) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings(text.candidates, text.task, tmp_path / "out")))
    result = shell("evaluate", config, *words)
    assert result.code == 2 and named in result.err and "Traceback" not in result.err


def test_files_other_than_metrics_are_not_replaced(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config, weights, out = tmp_path / "run.json", tmp_path / "w.pt", tmp_path / "found.json"
    config.write_text(json.dumps(settings(scores.candidates, scores.task, tmp_path / "out")))
    torch.save(candidates(scores)[0], weights)
    words = ("evaluate", config, "--split", "validation", "--batches", 1, "--weights", weights, "-o")
    for kept in (weights, config, tmp_path):
        before = kept.read_bytes() if kept.is_file() else b""
        result = shell(*words, kept)
        assert result.code == 2 and str(kept) in result.err and (kept.is_dir() or "--out" in result.err)
        assert not before or kept.read_bytes() == before
    assert shell(*words, out).code == 0
    first = json.loads(out.read_text())
    result = shell(*words, out, "--weights", tmp_path / "out")  # the second one is missing
    assert result.code == 2
    assert shell(*words, out).code == 0 and json.loads(out.read_text()) == first


def test_a_split_that_a_task_does_not_know(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(settings(scores.candidates, scores.task, tmp_path / "out")))
    result = shell("evaluate", config, "--split", "tset")
    assert result.code == 2 and "did you mean 'test'?" in result.err
