"""`start: best` starts a run at the best average that needs no training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import twa_scale
from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import as_launched, run_here, settings
from tests.commands.test_keep import candidates, measured_by_hand, records
from tests.pool import Pool
from tests.sums import averaged
from twa_scale.config import RunConfig, center_weights, parse_center, validated
from twa_scale.ranks import World
from twa_scale.run.attached import AttachedRun
from twa_scale.run.best_start import averages
from twa_scale.run.loop import Run
from twa_scale.run.progress import Report


def test_averages_that_start_best_tries() -> None:
    assert averages(1, "mean") == ["center"]
    assert averages(9, "first") == [
        "center", "last", "mean", "lawa:2", "lawa:4", "lawa:8", "ema:0.8", "ema:0.9", "ema:0.95", "minus-sqrt",
    ]  # fmt: skip
    assert "lawa:8" not in averages(8, "first")  # the mean
    assert averages(3, "mean") == [name for name in averages(3, "first") if name != "mean"]


@pytest.mark.parametrize(("engine", "size"), [("plain", 1), ("fsdp2", 2)])
def test_run_starts_at_the_best_average(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, size: int
) -> None:
    """The center is a candidate far from the others, so another average is better."""
    changes: dict[str, Any] = {"engine": engine, "center": "first", "evaluate_batches": None, "steps": 1}
    data = settings(scores.candidates, scores.task, tmp_path, **changes, start="best")
    ranks(run_here, size, data=data)
    stored = candidates(scores)
    losses = {}
    for name in averages(len(stored), "first"):
        weights = center_weights(parse_center("first" if name == "center" else name), len(stored))
        losses[name] = measured_by_hand(scores, averaged(weights, stored))
    assert records(tmp_path)[0] == pytest.approx(min(losses.values()), rel=1e-5)
    assert min(losses.values()) < losses["center"] - 1e-3


class LogRecorder(Report):
    """Keeps the lines that a run reports."""

    def __init__(self) -> None:
        super().__init__(active=False)
        self.said: list[str] = []

    def log(self, text: str) -> None:
        self.said.append(text)


def test_the_best_three_of_a_part_of_the_batches_are_evaluated_on_all(
    scores: TrainedCandidates, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"center": "first", "evaluate_batches": 8, "start": "best", "batch_size": 4}
    config = validated(RunConfig, settings(scores.candidates, scores.task, tmp_path, **changes))
    report, parts, wholes = LogRecorder(), dict[str, float](), dict[str, float]()

    def start() -> dict[str, Any]:
        world = World.from_environment()
        with world.joined(world.device(config.device), config.output, config.timeout):
            run = AttachedRun(config, world, world.device(config.device), report)
            run.attach(config)
            for name in averages(run.twa.num_candidates, "first"):
                with run.twa.weights(name):
                    parts[name], wholes[name] = run.measure(every=4)["loss"], run.measure()["loss"]
            report.said.clear()
            return {"said": run.start_at_best(), "found": run.measure()}

    losses = as_launched(start)
    finalists = sorted(parts, key=parts.__getitem__)[:3]
    best = min(finalists, key=wholes.__getitem__)
    assert losses["said"]["loss"] == wholes[best] == pytest.approx(losses["found"]["loss"], rel=1e-6)
    assert report.said[0].startswith(f"center on 2 of 8 batches: loss {parts['center']:.4f}")
    assert {line.partition(":")[0] for line in report.said[len(parts) : -1]} == set(finalists)
    assert report.said[-1] == f"start: {best}, the best of {len(parts)} averages that need no training"


class TimeRecorder(Report):
    """Reads the times that a run measured before its first step."""

    run: Run
    timed: dict[str, float] | None = None

    def steps(self, description: str, total: int, done: int) -> Any:
        self.timed = self.run.twa.clock.read()
        return super().steps(description, total, done)


@pytest.mark.parametrize("changes", [{"start": "best"}, {"steps": 6}])
def test_cost_of_a_step_excludes_other_work(scores: TrainedCandidates, tmp_path: Path, changes: dict[str, Any]) -> None:
    data = settings(scores.candidates, scores.task, tmp_path, evaluate_batches=1, compare=False)
    if "steps" in changes:
        run_here(data)  # a continued run loads a state and writes its weights
    report = TimeRecorder(active=False)

    def train() -> dict[str, Any]:
        config, world = validated(RunConfig, data | changes), World.from_environment()
        device = world.device(config.device)
        with world.joined(device, config.output, config.timeout):
            report.run = Run(config, world, device, report)
            report.run.report = report
            return report.run.train()

    as_launched(train)
    assert report.timed == {}


def states(n: int) -> list[dict[str, torch.Tensor]]:
    actual = []
    for i in range(n):
        torch.manual_seed(i)
        actual.append(nn.Linear(3, 2).state_dict())
    return actual


def test_start_from_is_exact_and_training_continues() -> None:
    model = nn.Linear(3, 2)
    twa = twa_scale.attach(model, states(4), {"basis": "orthonormal"})
    twa.start_from("lawa:2")
    expected = (states(4)[2]["weight"] + states(4)[3]["weight"]) / 2
    torch.testing.assert_close(model.weight.detach(), expected)
    torch.testing.assert_close(twa.coefficients[:, 0], torch.tensor([0, 0, 0.5, 0.5]).double(), rtol=0, atol=1e-6)
    model(torch.ones(1, 3)).sum().backward()
    twa.step()
    assert not torch.allclose(model.weight.detach(), expected)


def test_simplex_starts_need_positive_coefficients() -> None:
    twa = twa_scale.attach(nn.Linear(3, 2), states(3), {"basis": "simplex"})
    assert twa.can_start_from("ema:0.5") and not twa.can_start_from("last")
    with pytest.raises(twa_scale.ConfigError, match="simplex"):
        twa.start_from("last")
    twa.start_from("ema:0.5")
    torch.testing.assert_close(twa.coefficients[:, 0], torch.tensor([1 / 7, 2 / 7, 4 / 7]).double())


def test_attach_has_no_evaluations() -> None:
    with pytest.raises(twa_scale.ConfigError, match="start_from"):
        twa_scale.attach(nn.Linear(3, 2), states(3), {"start": "best"})


@pytest.mark.parametrize("which", ["lawa:0", "lawa:5", "lawa:x", "lawa"])
def test_invalid_windows_raise(which: str) -> None:
    twa = twa_scale.attach(nn.Linear(3, 2), states(4))
    with pytest.raises(twa_scale.ConfigError, match="weights"), twa.weights(which):
        pass
