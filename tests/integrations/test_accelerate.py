"""Averages in training loops with Accelerate, in one process. One test runs the example of trainers.md."""

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import twa_scale
from tests.integrations.examples import run_example
from tests.integrations.small import (
    DECAY,
    LEARN,
    ROWS,
    WINDOW,
    network,
    train_by_hand,
)
from tests.integrations.train_accelerate import Training, require_results, results
from twa_scale import ConfigError, TwaError, TwaWarning
from twa_scale.integrations.accelerate import optimizer_of, prepare


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    return train_by_hand()


@pytest.fixture(autouse=True)
def fresh() -> Any:
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.slow
def test_a_loop_keeps_averages(tmp_path: Path, by_hand: dict[str, Any]) -> None:
    require_results(results("plain", tmp_path), by_hand, 0.0)


def test_arguments_that_count_steps_wrongly_raise(tmp_path: Path) -> None:
    first = Training("plain")
    averages = prepare(first.accelerator, first.model, ema=[DECAY], window=WINDOW)
    with pytest.raises(TwaError, match="counts the steps of the optimizer itself"):
        averages.step()
    with pytest.raises(ConfigError, match="averages named 'averages' already"):
        prepare(first.accelerator, first.model, ema=[0.9])
    with pytest.raises(ConfigError, match=r"not one that accelerator\.prepare has returned"):
        prepare(first.accelerator, torch.nn.Linear(2, 2), ema=[0.9])
    second = first.accelerator.prepare(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no optimizer that the accelerator has prepared"):
        prepare(first.accelerator, second, ema=[0.9], name="b")
    first.accelerator.save_state(str(tmp_path))
    (tmp_path / "averages" / "averages-00000-of-00001.pt").unlink()
    with pytest.warns(TwaWarning, match="has no averages"):
        first.accelerator.load_state(str(tmp_path))
    foreign = SimpleNamespace(param_groups=[{"params": list(second.parameters())}])
    first.accelerator.prepare_optimizer(foreign, device_placement=False)
    with pytest.raises(ConfigError, match=r"not a torch\.optim\.Optimizer"):
        prepare(first.accelerator, second, ema=[0.9], name="b")


def test_closed_average_is_not_saved(tmp_path: Path) -> None:
    first = Training("plain")
    averages = prepare(first.accelerator, first.model, window=WINDOW)
    first.epoch()
    with averages.learning(LEARN) as twa:
        first.epoch(optimizer_of(first.accelerator, twa))
    first.accelerator.save_state(str(tmp_path))
    second = Training("plain")
    resumed = prepare(second.accelerator, second.model, window=WINDOW)
    second.accelerator.load_state(str(tmp_path))
    assert resumed.num_steps == averages.num_steps


def test_state_has_the_rows_if_each_node_saves(tmp_path: Path) -> None:
    candidates = [network(seed).state_dict() for seed in range(3)]
    actual: list[dict[str, Any]] = []
    for _ in range(2):
        first = Training("plain", given=True)
        first.accelerator.project_configuration.save_on_each_node = True
        with closing(twa_scale.attach(first.model, candidates, ROWS)) as twa:
            optimizer = optimizer_of(first.accelerator, twa)
            if not actual:
                first.epoch(optimizer)
                first.accelerator.save_state(str(tmp_path))
            else:
                first.accelerator.load_state(str(tmp_path))
            actual.append({**first.weights(), "coefficients": twa.coefficients})
    torch.testing.assert_close(actual[1], actual[0], rtol=0, atol=0)
    assert torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)["rows"]["values"]
    assert not list(tmp_path.glob("*_rows"))


def test_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = Training("plain")
    names = {
        "accelerator": first.accelerator,
        "model": first.model,
        "optimizer": first.optimizer,
        "loader": first.loader,
    }
    names |= {"loss_of": lambda model, batch: (model(batch) - batch).square().mean(), "evaluate": lambda model: 0.0}
    run_example("accelerate", names)
    actual = load_file(tmp_path / "out" / "average" / "model.safetensors")
    assert not torch.equal(actual["0.weight"], first.weights()["0.weight"])  # the trained weights are restored
