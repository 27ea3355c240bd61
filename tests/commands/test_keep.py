"""Runs export the best evaluated average, and compare it with the last candidate."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import by_hand, load, run_here, settings
from tests.pool import Pool
from tests.states import values_of_rows
from twa_scale.average.state import KeptState, load_state
from twa_scale.average.stateful import AverageValues
from twa_scale.config import RunConfig, TaskConfig, validated
from twa_scale.errors import ConfigError
from twa_scale.run.best import BestAverage
from twa_scale.run.comparison import advice, caveat, evaluated_on
from twa_scale.run.tasks import build_task, stack

WILD = {"optimizer": {"name": "adamw", "lr": 50.0}, "schedule": {"name": "constant", "warmup": 0}, "evaluate_every": 2}
"""A learning rate at which every step increases the loss."""


def records(output: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}


def summary_of(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


def measured_by_hand(trained_candidates: TrainedCandidates, weights: dict[str, torch.Tensor]) -> float:
    """Return the loss on the whole validation split."""
    task = build_task(validated(TaskConfig, trained_candidates.task))
    model, data = task.model(), task.dataset("validation")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    total, count = task.metrics(model.eval(), stack([data[i] for i in range(len(data))]))["loss"]
    return total.item() / count


def candidates(trained_candidates: TrainedCandidates) -> list[dict[str, torch.Tensor]]:
    pattern = Path(trained_candidates.candidates)
    return [load(path) for path in sorted(pattern.parent.glob(pattern.name))]


@pytest.mark.parametrize("keep", ["best", "last"])
def test_exported_step(scores: TrainedCandidates, tmp_path: Path, shell: Any, keep: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(settings(scores.candidates, scores.task, tmp_path / "out", **WILD, evaluate_batches=None))
    )
    result = shell("run", config, f"keep={keep}")
    assert result.code == 0, result.err
    losses, summary = records(tmp_path / "out"), summary_of(tmp_path / "out")
    best = min(losses, key=losses.__getitem__)
    assert best == 0 and losses[4] > 1.5 * losses[0]
    step = best if keep == "best" else 4
    assert summary["exported_step"] == step and summary["evaluation"]["validation/loss"] == losses[step]
    exported = load(tmp_path / "out" / "average")
    for name, value in by_hand(scores.candidates, tmp_path / "out").items():
        torch.testing.assert_close(exported[name].double(), value, rtol=1e-5, atol=1e-6)
    assert measured_by_hand(scores, exported) == pytest.approx(losses[step], rel=1e-5)
    messages = json.loads((tmp_path / "out/average/twa_scale.json").read_text())["coefficients"]
    assert messages == load_state(tmp_path / "out").exported.coefficients.tolist()
    assert "No step was better than the start on the validation split. Try a lower optimizer.lr" in " ".join(
        result.err.split()
    )
    assert f"exported: step {step}" in result.err and f"exported, step {step}" in result.err
    result = shell("export", tmp_path / "out", "--out", tmp_path / "merged")
    assert result.code == 0 and f"coefficients of step {step}" in result.out
    assert (keep == "last") == ("the best of the evaluations" not in result.out)
    merged = load(tmp_path / "merged")
    assert all(torch.allclose(merged[name], value, rtol=1e-5, atol=1e-6) for name, value in exported.items())


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_corrections_of_rows_are_kept_and_exported(
    scores: TrainedCandidates, tmp_path: Path, shell: Any, keep: str
) -> None:
    """An export from coefficients has the weights of the run, and a continued run has them, too."""
    more = {"groups": "tensor+row", "optimizer": {"name": "adamw", "lr": 0.05, "row_lr": 0.05}, "keep": keep}
    config = settings(scores.candidates, scores.task, tmp_path / "whole", **more, steps=4, evaluate_every=1)
    run_here(config, pictures=True)
    exported = load(tmp_path / "whole" / "average")
    state = load_state(tmp_path / "whole").exported
    assert any(bool(value.any()) for value in values_of_rows(state, tmp_path / "whole").values())
    assert len(list((tmp_path / "whole").glob("state.rows-*"))) == 1, "of two saves at the last step"
    corrected = by_hand(scores.candidates, tmp_path / "whole")  # with the coefficients of tensors only
    assert any((exported[name] - value).norm() > 1e-4 * value.norm() for name, value in corrected.items())
    result = shell("export", tmp_path / "whole", "--out", tmp_path / "merged")
    assert result.code == 0, result.err
    assert (tmp_path / "whole" / "rows.png").read_bytes().startswith(b"\x89PNG")
    merged = load(tmp_path / "merged")
    for name, value in exported.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
    run_here({**config, "output": str(tmp_path / "parts"), "steps": 2, "schedule": {"name": "constant"}})
    run_here({**config, "output": str(tmp_path / "other"), "schedule": {"name": "constant"}})
    run_here({**config, "output": str(tmp_path / "parts"), "schedule": {"name": "constant"}})
    parts, other = (values_of_rows(load_state(tmp_path / name).twa, tmp_path / name) for name in ("parts", "other"))
    assert other and all(torch.equal(parts[name], value) for name, value in other.items())


@pytest.mark.parametrize(
    ("training_loss", "held_out", "best", "message"),
    [
        (0.44, 1.7, 0, "1.7, and on the train split 0.44: the candidates have memorized"),
        (1.6, 1.7, 0, "Try a lower optimizer.lr"),
        (-1.9, -2.0, 0, "Try a lower optimizer.lr"),  # a log density
        (None, 1.7, 0, "Try a lower optimizer.lr"),  # the first steps were made before the run was continued
        (0.44, 1.7, 3, None),
    ],
)
def test_advice_if_no_step_is_better_than_the_start(
    training_loss: float | None, held_out: float, best: int, message: str | None
) -> None:
    task: Any = SimpleNamespace()
    kept = BestAverage(task, config())
    empty = torch.zeros(0)
    kept.best = KeptState(
        step=best, data=kept.data, metrics={"loss": held_out}, x=empty, coefficients=empty, buffers={}
    )
    actual = advice(kept, config(), 100, training_loss)
    assert actual is None if message is None else message in str(actual)


def test_state_continues_from_last_step(scores: TrainedCandidates, tmp_path: Path) -> None:
    run_here(settings(scores.candidates, scores.task, tmp_path, **WILD))
    state = load_state(tmp_path)
    assert state.step == 4 and state.exported_step == 0
    assert (state.twa.coefficients - state.exported.coefficients).abs().max() > 0.1
    assert run_here(settings(scores.candidates, scores.task, tmp_path, **WILD, steps=6))["exported_step"] == 0


@pytest.mark.parametrize(("engine", "size"), [("plain", 1), ("fsdp2", 2)])
def test_resumed_run_restores_best_average(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, size: int
) -> None:
    """The best evaluation is not repeated. The best average has no corrections of rows, the last step has some."""
    changes = {**WILD, "steps": 6, "checkpoint_every": 1, "engine": engine}
    changes["groups"] = "tensor" if size == 1 else "tensor+row"
    ranks(run_here, size, data=settings(scores.candidates, scores.task, tmp_path / "whole", **changes))
    dying = scores.task | {"die_at": 6}
    outcomes = ranks.outcomes(run_here, size, data=settings(scores.candidates, dying, tmp_path / "parts", **changes))
    assert all("the machine is gone" in str(outcome.error) for outcome in outcomes)
    ranks(run_here, size, data=settings(scores.candidates, scores.task, tmp_path / "parts", **changes))
    first, second = (summary_of(tmp_path / name) for name in ("whole", "parts"))
    for key in ("evaluation", "comparison", "exported_step", "verdict"):
        assert first[key] == second[key]
    assert first["exported_step"] == 0
    expected, actual = load(tmp_path / "whole/average"), load(tmp_path / "parts/average")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_batchnorm_statistics_of_exported_average(digits: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    changes = {**WILD, "batch_size": 24, "evaluate_batches": None, "recalibrate_batches": 5}
    run_here(settings(digits.candidates, digits.task, tmp_path / "out", **changes))
    summary = summary_of(tmp_path / "out")
    exported = load(tmp_path / "out/average")
    assert summary["exported_step"] < 4
    loss = measured_by_hand(digits, exported)
    assert loss == pytest.approx(summary["evaluation"]["validation/loss"], rel=1e-4)
    assert loss == pytest.approx(records(tmp_path / "out")[summary["exported_step"]], rel=1e-4)
    assert shell("export", tmp_path / "out", "--out", tmp_path / "merged").code == 0
    assert measured_by_hand(digits, load(tmp_path / "merged")) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("engine", "size"), [("plain", 1), ("fsdp2", 2)])
def test_comparison_equals_evaluation_of_files(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, size: int
) -> None:
    data = settings(scores.candidates, scores.task, tmp_path, evaluate_batches=None, engine=engine)
    ranks(run_here, size, data=data)
    summary, states = summary_of(tmp_path), candidates(scores)
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    actual = {name: values["validation/loss"] for name, values in summary["comparison"].items()}
    assert list(actual) == ["last candidate", "center", "trained", "exported"]
    assert actual["last candidate"] == pytest.approx(measured_by_hand(scores, states[-1]), rel=1e-5)
    assert actual["center"] == pytest.approx(measured_by_hand(scores, mean), rel=1e-5)
    assert actual["exported"] == pytest.approx(measured_by_hand(scores, load(tmp_path / "average")), rel=1e-5)
    assert ("WORSE" in summary["verdict"]) == (actual["exported"] > actual["last candidate"])
    assert f"{actual['last candidate']:.6g}" in summary["verdict"]


def test_verdict_and_compare_false(scores: TrainedCandidates, tmp_path: Path) -> None:
    worst_last = [str(path) for path in sorted(Path(scores.candidates).parent.glob("step-*"))][::-1]
    run_here(settings(worst_last, scores.task, tmp_path / "one"))  # type: ignore[arg-type]
    assert summary_of(tmp_path / "one")["verdict"].startswith("The average is better than the last candidate: ")
    run_here(settings(scores.candidates, scores.task, tmp_path / "two", compare=False))
    summary = summary_of(tmp_path / "two")
    assert list(summary["comparison"]) == ["trained", "exported"] and summary["verdict"] is None


def test_comparison_with_the_best_of_all_candidates(scores: TrainedCandidates, tmp_path: Path) -> None:
    data = settings(scores.candidates, scores.task, tmp_path, evaluate_batches=None, compare="candidates")
    run_here(data)
    summary = summary_of(tmp_path)
    actual = {name: values["validation/loss"] for name, values in summary["comparison"].items()}
    losses = [measured_by_hand(scores, state) for state in candidates(scores)]
    assert actual["best candidate"] == pytest.approx(min(losses), rel=1e-5)
    assert actual["last candidate"] == pytest.approx(losses[-1], rel=1e-5)
    better = "is better" if actual["exported"] < min(losses) else "is WORSE"
    assert f"{better} than the best candidate: " in summary["verdict"]


@pytest.mark.parametrize(("split", "message"), [("validation", ", on which"), ("train", None)])
def test_title_of_the_comparison_names_the_data(split: str, message: str | None) -> None:
    actual = evaluated_on(config(split=split))
    assert actual.startswith("Evaluation on the validation split") and (message or "split") in actual
    assert (", on which the coefficients were trained" in actual) == bool(message)


def test_changed_evaluation_data_discards_best_average(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(scores.candidates, scores.task, tmp_path / "out", **WILD)))
    assert shell("run", config).code == 0
    result = shell("run", config, "steps=6", "evaluate_batches=1")
    assert result.code == 0 and "the best average of earlier evaluations is discarded" in result.err
    assert load_state(tmp_path / "out").exported_step > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_split": "test"}, "keep: best chooses by the test split"),
        ({"evaluate_split": "test", "keep": "last"}, None),
        ({"split": "validation"}, "the training split"),
        ({}, None),
    ],
    ids=str,
)
def test_caveat_of_evaluations(changes: dict[str, Any], message: str | None) -> None:
    actual = caveat(config(**changes))
    assert actual is None if message is None else message in str(actual)


# The choice of the best average


def config(**changes: Any) -> RunConfig:
    return validated(RunConfig, {"candidates": "x", "task": {"name": "x"}, "output": "x", "steps": 1, **changes})


NAN = float("nan")


@pytest.mark.parametrize(
    ("higher", "values", "best"),
    [
        (False, [3.0, 2.0, 2.0, 4.0], 1),
        (True, [3.0, 2.0, 4.0, 4.0], 2),
        (False, [NAN, 5.0, NAN, float("-inf")], 1),
        (True, [float("inf"), NAN, 1.0], 2),
        (False, [NAN, NAN], None),
    ],
)
def test_first_of_equal_best_averages_is_kept(higher: bool, values: list[float], best: int | None) -> None:
    task: Any = SimpleNamespace(main_metric="score", higher_is_better=higher)
    kept = BestAverage(task, config())
    empty = torch.zeros(1, 1, dtype=torch.float64)
    average: Any = SimpleNamespace(copy_values=lambda: AverageValues(empty, empty, None, {}))
    for step, value in enumerate(values):
        kept.update(step, {"loss": 9.0, "score": value}, average)
    assert (kept.best and kept.best.step) == best


def test_unknown_main_metric_is_refused() -> None:
    task: Any = SimpleNamespace(main_metric="acuracy")
    with pytest.raises(ConfigError, match=r"'acuracy'.*accuracy, loss"):
        BestAverage(task, config()).value({"loss": 1.0, "accuracy": 0.5})
    for wrong in ({"main_metric": nn.Linear(1, 1)}, {"higher_is_better": "yes"}):
        task = SimpleNamespace(**wrong)
        with pytest.raises(ConfigError, match="main_metric"):
            BestAverage(task, config())
