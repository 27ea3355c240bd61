"""`optimizer.lr: auto` and `choose_rate` try three rates from the same start and choose by held-out data."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import twa_scale
from tests.commands.conftest import TrainedCandidates
from tests.commands.small_runs import Scores, run_here, settings, state_of
from tests.commands.test_stopping import run_with_handlers
from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.test_running import same_bits
from tests.states import values_of_rows
from twa_scale.average.state import load_state
from twa_scale.base.notices import TwaWarning
from twa_scale.run.rate_search import position, trial_steps

ROWS = {"groups": "tensor+row", "optimizer": {"name": "adamw", "lr": 0.03, "betas": [0.5, 0.9]}}

lowest = partial(twa_scale.choose_rate, higher_is_better=False)


def taken(model: nn.Module, twa: Any, first: int, steps: int = 3) -> float:
    """Take steps, and return a score that is the same on all ranks."""
    for step in range(first, first + steps):
        cases.one_step(model, twa, step)
    score = twa.coefficients.square().sum() + sum(c.square().sum() for c in twa.row_corrections().values())
    return float(score)


def after(engine: str, lr: float) -> tuple[float, dict[str, Any]]:
    """Return the score of three steps with a rate after two others, and the state before the three."""
    model, twa = cases.attach(engine, cases.Run(ROWS))
    taken(model, twa, 0, 2)
    twa.set_lr(lr)
    state = twa.state_dict()
    score = taken(model, twa, 2)
    twa.close()
    return score, state


def choose(engine: str) -> tuple[Any, list[float], dict[str, Any], list[dict[str, Any]], bool]:
    """Choose among rates, the last of which diverges. Also return the start and the result of separate trainings."""
    model, twa = cases.attach(engine, cases.Run(ROWS))
    taken(model, twa, 0, 2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    scores: list[float] = []
    rates = [0.01, 0.09, 3e38]
    chosen = lowest(twa, lambda: scores.append(taken(model, twa, 2)), lambda: scores[-1], rates)
    same = all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    state = twa.state_dict()
    twa.close()
    expected, states = zip(*(after(engine, lr) for lr in rates[:-1]), strict=True)
    return chosen, list(expected), state, list(states), same


@pytest.mark.parametrize(
    ("engine", "size"), [("plain", 1), ("fsdp2", 2), pytest.param("zero2", 2, marks=pytest.mark.slow)]
)
def test_each_trial_is_a_training_from_the_same_start(ranks: Pool, engine: str, size: int) -> None:
    for chosen, expected, state, states, same_buffers in ranks(choose, size, engine=engine):
        *finite, diverged = chosen.tried
        assert [trial.score for trial in finite] == expected and not diverged.score < float("inf")
        assert chosen.best == min(finite, key=lambda trial: trial.score) and same_buffers
        assert same_bits(state, states[finite.index(chosen.best)])  # coefficients, rows, moments and the rate
        assert state["config"]["optimizer"]["lr"] == state["optimizer"]["param_groups"][0]["lr"] == chosen.best.lr


def small(lr: float = 0.1, **config: Any) -> tuple[nn.Linear, Any]:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(nn.Linear(3, 2).state_dict())
    model = nn.Linear(3, 2)
    return model, twa_scale.attach(model, states, {"optimizer": {"name": "sgd", "lr": lr}} | config)


def test_default_rates_surround_the_present_one() -> None:
    model, twa = small()
    actual = twa_scale.choose_rate(twa, lambda: one(model, twa), lambda: twa.config.lr, higher_is_better=True)
    assert [trial.lr for trial in actual.tried] == [trial.score for trial in actual.tried]
    assert [trial.lr for trial in actual.tried] == pytest.approx([0.1 / 3, 0.1, 0.3])
    assert actual.best.lr == twa.config.lr == twa.optimizer.param_groups[0]["lr"] == pytest.approx(0.3)


@pytest.mark.parametrize("groups", ["global", "tensor+row"])
def test_the_script_that_saved_a_chosen_rate_continues_with_it(groups: str) -> None:
    model, twa = small(groups=groups)
    twa.set_lr(0.3)
    one(model, twa)
    state = twa.state_dict()
    model, twa = small(groups=groups)
    with pytest.warns(TwaWarning, match="0.3, that of the loaded state"):
        twa.load_state_dict(state)
    assert same_bits(twa.state_dict(), state)
    assert twa.config.lr == twa.optimizer.param_groups[0]["lr"] == 0.3
    assert [group["lr"] for group in twa.optimizer.param_groups[1:]] in ([], [0.03])
    state["config"]["optimizer"]["momentum"] = 0.5
    with pytest.raises(twa_scale.StateError, match="optimizer: the state was trained with"):
        twa.load_state_dict(state)


def test_present_rate_is_kept_for_equal_scores() -> None:
    model, twa = small(0.2)
    with pytest.warns(TwaWarning, match="0.1, 0.2, 0.4 have the same score, 1: 0.2 is chosen"):
        actual = lowest(twa, lambda: one(model, twa), lambda: 1.0, [0.1, 0.2, 0.4])
    assert actual.best.lr == twa.config.lr == 0.2


def test_trials_without_a_step_and_errors_leave_the_average_as_it_was() -> None:
    model, twa = small()
    one(model, twa)
    before = twa.state_dict()

    def fails() -> None:
        one(model, twa)
        raise ValueError("no more data")

    with pytest.raises(twa_scale.ConfigError, match="no step of `train` changed"):
        lowest(twa, lambda: None, lambda: 1.0)
    with pytest.raises(ValueError, match="no more data"):
        lowest(twa, fails, lambda: 1.0)
    with pytest.raises(twa_scale.ConfigError, match="return a number"):
        lowest(twa, lambda: one(model, twa), lambda: None)  # type: ignore[arg-type, return-value]
    assert same_bits(twa.state_dict(), before) and twa.config.lr == 0.1


def test_schedulers_of_a_trial_end_with_it_and_others_are_refused() -> None:
    model, twa = small()

    def train() -> None:
        scheduler = torch.optim.lr_scheduler.LambdaLR(twa.optimizer, lambda step: 1 / (1 + step))
        one(model, twa)
        scheduler.step()
        rates.append(twa.optimizer.param_groups[0]["lr"])

    rates: list[float] = []
    lowest(twa, train, lambda: rates[-1], [0.2, 0.4])
    assert rates == [0.1, 0.2] and twa.optimizer.param_groups[0]["lr"] == 0.2
    torch.optim.lr_scheduler.LambdaLR(twa.optimizer, lambda step: 1 / (2 + step))
    restore = twa.save_in_memory()
    twa.set_lr(0.5)
    assert twa.optimizer.param_groups[0]["initial_lr"] == 0.5
    restore()
    group = twa.optimizer.param_groups[0]
    assert (twa.config.lr, group["initial_lr"], group["lr"]) == (0.2, 0.2, 0.1)
    with pytest.raises(twa_scale.ConfigError, match="has a scheduler"):
        lowest(twa, train, lambda: 0.0)


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), True, "0.1", None])
def test_rates_that_are_not_positive_raise(lr: Any) -> None:
    _, twa = small()
    with pytest.raises(twa_scale.ConfigError, match="set_lr: the learning rate is"):
        twa.set_lr(lr)
    twa.set_lr(np.float32(0.5))
    assert type(twa.config.lr) is float and json.dumps(twa.state_dict()["config"])


@pytest.mark.parametrize("rates", [[], [0.0], [-1.0], [float("inf")], ["fast"]])
def test_invalid_rates_raise(rates: list[Any]) -> None:
    with pytest.raises(twa_scale.ConfigError, match="rates"):
        lowest(small()[1], lambda: None, lambda: 0.0, rates)


def test_all_rates_diverge() -> None:
    model, twa = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(twa_scale.NotFiniteError, match=r"1e\+300, 1e\+305"):
        lowest(twa, lambda: one(model, twa), lambda: 0.0, [1e300, 1e305])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert twa.config.lr == 0.1


def one(model: nn.Module, twa: Any) -> None:
    model(torch.ones(1, 3)).sum().backward()
    twa.step()
    twa.zero_grad()


def test_trial_steps_cover_the_schedule_of_the_run() -> None:
    assert [trial_steps(n) for n in (2, 40, 100, 1000)] == [2, 5, 10, 20]
    assert [position(i, 5, 100) for i in range(5)] == [10, 30, 50, 70, 90]
    assert [position(i, 7, 7) for i in range(7)] == list(range(7))


def auto(trained_candidates: TrainedCandidates, output: Path, **changes: Any) -> dict[str, Any]:
    usual: dict[str, Any] = {"groups": "tensor+row", "optimizer": {"lr": "auto"}, "start": "best", "steps": 6}
    return settings(trained_candidates.candidates, trained_candidates.task, output, **usual | changes)


def ended(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    return summary


@pytest.mark.parametrize(
    ("engine", "size", "pods"), [("fsdp2", 2, 1), pytest.param("plain", 2, 2, marks=pytest.mark.slow)]
)
def test_a_run_trains_with_the_best_rate(
    ranks: Pool, scores: TrainedCandidates, tmp_path: Path, engine: str, size: int, pods: int
) -> None:
    """The weights are those of a run with this rate, and the scores those of runs with the length of a trial."""
    ranks(run_here, size, data=auto(scores, tmp_path / "auto", engine=engine, pods=pods))
    rate = ended(tmp_path / "auto")["rate"]
    assert rate["tried"] == pytest.approx([0.01 / 3, 0.01, 0.03]) and rate["steps"] == 5
    assert (
        rate["lr"] == rate["tried"][rate["values"].index(min(rate["values"]))] and rate["metric"] == "validation/loss"
    )
    inputs = {"optimizer": {"lr": rate["lr"]}}
    ranks(run_here, size, data=auto(scores, tmp_path / "given", engine=engine, pods=pods, **inputs))
    first, second = (state_of(tmp_path / name)["twa"] for name in ("auto", "given"))
    for state in (first, second):
        del state["rows"]["stored"]["directory"]  # the name is new each time; the checksum of the file is compared
    assert same_bits(first, second)
    provenance = json.loads((tmp_path / "auto/average/twa_scale.json").read_text())
    assert provenance["config"]["optimizer"]["lr"] == rate["lr"]


def test_a_continued_run_does_not_search_again(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(auto(scores, tmp_path / "out")))
    result = shell("run", config)
    assert result.code == 0 and "15 steps and 3 evaluations" in result.err, result.err
    rate = ended(tmp_path / "out")["rate"]
    assert f"optimizer.lr: {rate['lr']:g} has the best validation/loss after 5 steps with each rate" in result.err
    assert "nothing was done" in shell("run", config).err
    result = shell("run", config, "steps=8")
    assert result.code == 0 and "rates are not tried again" in result.err and "15 steps" not in result.err
    assert ended(tmp_path / "out")["rate"] == rate and ended(tmp_path / "out")["steps"] == 8
    result = shell("run", config, "steps=9", "optimizer.lr=5")
    assert result.code == 2 and "optimizer" in result.err


def test_a_signal_during_the_search(scores: TrainedCandidates, tmp_path: Path) -> None:
    """The signal arrives in the second trial. The state has neither its steps nor its rate."""
    task = {"name": "tests.commands.interrupted:scores"}
    run_with_handlers(auto(TrainedCandidates({**task, "method": "loss", "call": 7}, scores.candidates), tmp_path))
    state = state_of(tmp_path)
    assert state["step"] == 0 and state["rate"] is None and not state["twa"]["optimizer"]["state"]
    assert state["twa"]["config"]["optimizer"]["lr"] == 0.01
    run_with_handlers(auto(TrainedCandidates({**task, "method": "loss", "call": 16}, scores.candidates), tmp_path))
    state = state_of(tmp_path)
    assert state["step"] == 1 and state["rate"]


class DecreasingMetric(Scores):
    """The first evaluations are better: the last of three trials, then step 0 and the end of the run."""

    def __init__(self) -> None:
        super().__init__()
        self._evaluations = [3.0, 2.0, 1.0, 4.0, 5.0]

    def metrics(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, int]]:
        return {"loss": (torch.tensor(self._evaluations.pop(0)), 1)}


def test_end_of_a_trial_is_exported_if_it_is_the_best(scores: TrainedCandidates, tmp_path: Path, shell: Any) -> None:
    """A run with as many steps as a trial ends at the same weights."""
    config = tmp_path / "run.json"
    task = TrainedCandidates({"name": f"{__name__}:DecreasingMetric"}, scores.candidates)
    changes = {"steps": 5, "start": "center", "evaluate_batches": 1, "compare": False}
    config.write_text(json.dumps(auto(task, tmp_path / "out", **changes)))
    result = shell("run", config)
    assert "exported: the trial of optimizer.lr 0.03, the lowest" in result.err, result.err
    assert "exported, the trial of optimizer.lr 0.03" in result.err
    state = load_state(tmp_path / "out")
    assert state.kept and state.kept.trial_lr == pytest.approx(0.03)
    assert torch.equal(state.kept.x, state.twa.x)
    last, best = (values_of_rows(item, tmp_path / "out") for item in (state.twa, state.exported))
    assert last and all(torch.equal(best[name], y) for name, y in last.items())
    assert ended(tmp_path / "out")["evaluation"] == {"validation/loss": 1.0}
    merged = shell("export", tmp_path / "out", "--out", tmp_path / "merged")
    assert "coefficients of the trial of optimizer.lr 0.03, the best of the evaluations" in merged.out, merged


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluate_split": "train"}, ["held-out", "evaluate_split 'train'"]),
        ({"optimizer": {"name": "sgd", "lr": "auto"}}, ["sgd with units delta", "adamw with units delta"]),
        ({"optimizer": {"lr": "auto"}, "units": "weight"}, ["adamw with units weight", "give a number"]),
    ],
)
def test_invalid_rate_searches_are_refused(
    scores: TrainedCandidates, tmp_path: Path, shell: Any, changes: dict[str, Any], words: list[str]
) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps(auto(scores, tmp_path / "out", **changes)))
    result = shell("run", config)
    assert result.code == 2 and all(word in result.err for word in words), result.err
    assert not (tmp_path / "out").exists()


def test_attach_has_no_held_out_data() -> None:
    with pytest.raises(twa_scale.ConfigError, match="choose_rate"):
        twa_scale.attach(nn.Linear(3, 2), [nn.Linear(3, 2).state_dict()] * 2, {"optimizer": {"lr": "auto"}})


def scored_by_rank() -> str:
    model, twa = small()
    with pytest.raises(twa_scale.ConfigError, match="choose_rate: the score is") as refused:
        lowest(twa, lambda: one(model, twa), lambda: float(dist.get_rank()))
    return str(refused.value)


def failing_on_a_rank() -> tuple[list[float], bool]:
    """One rank sees that the second trial diverges. Another one has an error in the score of the last trial."""
    model, twa = small()
    before = twa.state_dict()

    def train() -> None:
        one(model, twa)
        if twa.config.lr == 0.1 and dist.get_rank() == 1:
            raise twa_scale.NotFiniteError("the loss is not finite")

    def score() -> float:
        total = torch.tensor(twa.config.lr, dtype=torch.float64)
        dist.all_reduce(total)
        if twa.config.lr == 0.3 and dist.get_rank() == 0:
            raise ValueError("the file of the scores is full")
        return float(total)

    scores = [trial.score for trial in lowest(twa, train, score, [0.2, 0.1]).tried]
    with pytest.raises((ValueError, RuntimeError), match="scores is full"):
        lowest(twa, train, score, [0.2, 0.3])
    twa.set_lr(0.1)
    return scores, same_bits(twa.state_dict(), before)


def test_errors_that_one_rank_sees(ranks: Pool) -> None:
    """The errors are raised on all ranks and do not change the average."""
    for (finite, diverged), same in ranks(failing_on_a_rank, 2):
        assert finite == 0.4 and diverged != diverged and same


def test_a_score_that_differs_between_ranks(ranks: Pool) -> None:
    assert len(set(ranks(scored_by_rank, 2))) == 1
