"""Averages in loops with Accelerate, in one process. One test runs the example of trainers.md."""

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


def test_what_would_count_wrongly_is_refused(tmp_path: Path) -> None:
    one = Training("plain")
    averages = prepare(one.accelerator, one.model, ema=[DECAY], window=WINDOW)
    with pytest.raises(TwaError, match="counts the steps of the optimizer itself"):
        averages.step()
    with pytest.raises(ConfigError, match="averages named 'averages' already"):
        prepare(one.accelerator, one.model, ema=[0.9])
    with pytest.raises(ConfigError, match=r"not one that accelerator\.prepare has returned"):
        prepare(one.accelerator, torch.nn.Linear(2, 2), ema=[0.9])
    other = one.accelerator.prepare(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no optimizer that the accelerator has prepared"):
        prepare(one.accelerator, other, ema=[0.9], name="b")
    one.accelerator.save_state(str(tmp_path))
    (tmp_path / "averages" / "averages-00000-of-00001.pt").unlink()
    with pytest.warns(TwaWarning, match="has no averages"):
        one.accelerator.load_state(str(tmp_path))
    foreign = SimpleNamespace(param_groups=[{"params": list(other.parameters())}])
    one.accelerator.prepare_optimizer(foreign, device_placement=False)
    with pytest.raises(ConfigError, match=r"not a torch\.optim\.Optimizer"):
        prepare(one.accelerator, other, ema=[0.9], name="b")


def test_a_closed_average_is_not_saved(tmp_path: Path) -> None:
    one = Training("plain")
    averages = prepare(one.accelerator, one.model, window=WINDOW)
    one.epoch()
    with averages.learning(LEARN) as twa:
        one.epoch(optimizer_of(one.accelerator, twa))
    one.accelerator.save_state(str(tmp_path))
    other = Training("plain")
    resumed = prepare(other.accelerator, other.model, window=WINDOW)
    other.accelerator.load_state(str(tmp_path))
    assert resumed.num_steps == averages.num_steps


def test_rows_are_in_the_state_where_each_node_saves(tmp_path: Path) -> None:
    candidates = [network(seed).state_dict() for seed in range(3)]
    found: list[dict[str, Any]] = []
    for _ in range(2):
        one = Training("plain", given=True)
        one.accelerator.project_configuration.save_on_each_node = True
        with closing(twa_scale.attach(one.model, candidates, ROWS)) as twa:
            optimizer = optimizer_of(one.accelerator, twa)
            if not found:
                one.epoch(optimizer)
                one.accelerator.save_state(str(tmp_path))
            else:
                one.accelerator.load_state(str(tmp_path))
            found.append({**one.weights(), "coefficients": twa.coefficients})
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)["rows"]["values"]
    assert not list(tmp_path.glob("*_rows"))


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = Training("plain")
    names = {"accelerator": one.accelerator, "model": one.model, "optimizer": one.optimizer, "loader": one.loader}
    names |= {"loss_of": lambda model, batch: (model(batch) - batch).square().mean(), "evaluate": lambda model: 0.0}
    run_example("accelerate", names)
    found = load_file(tmp_path / "out" / "average" / "model.safetensors")
    assert not torch.equal(found["0.weight"], one.weights()["0.weight"])  # the trained weights are there again
