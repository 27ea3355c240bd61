"""Selection of candidates by the steps in their names, by number and by order."""

from pathlib import Path
from typing import Any

import pytest
import torch

from twa_scale.candidates.find import find_sources
from twa_scale.candidates.steps import step_of
from twa_scale.config import SelectConfig
from twa_scale.errors import CandidateError, ConfigError
from twa_scale.merge import average_fixed
from twa_scale.tools.inspection import inspect


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("run-7/step-100", 100),
        ("out3/checkpoint-500", 500),
        ("out/checkpoint-500/model.safetensors", 500),
        ("global_step40", 40),
        ("global_step_40/actor/model", 40),
        ("epoch=3-step=900.ckpt", 900),
        ("epoch=3-step=900-v1.ckpt", 900),
        ("epoch=3-val_loss=0.25.ckpt", 3),
        ("iter_0001000", 1000),
        ("stage2/step1000-tokens4B", 1000),
        ("step_100k.pt", 100_000),
        ("checkpoint_12.pth.tar", 12),
        ("ema_0.9999_250000.pt", 250_000),
        ("2000", 2000),
        ("run/step-30/lr1e-4/model.safetensors", 30),
        ("checkpoint-best", None),
        ("a/b/model.safetensors", None),
        ("loss0.25-acc0.75.pt", None),
    ],
)
def test_step_of(path: str, step: int | None) -> None:
    assert step_of(Path(path)) == step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write steps 100 to 1000 and 1050. The value of the weights is the step."""
    folder = tmp_path_factory.mktemp("run")
    for step in [*range(100, 1001, 100), 1050]:
        torch.save({"w": torch.full((2,), float(step))}, folder / f"step-{step}.pt")
    return folder


def taken(run: Path, **select: Any) -> tuple[list[int | None], list[str]]:
    messages: list[str] = []
    sources = find_sources(str(run / "step-*"), 1, messages.append, SelectConfig(**select))
    return [step_of(path) for path in sources if isinstance(path, Path)], messages


@pytest.mark.parametrize(
    ("select", "steps", "line"),
    [
        ({"start_step": 900}, [900, 1000, 1050], "3 of 11 are taken (start_step: 900)"),
        ({"end_step": 250}, [100, 200], "2 of 11 are taken (end_step: 250)"),
        ({"every": 300}, [300, 600, 900], "3 of 11 are taken (every: 300)"),
        ({"every": 50, "last": 2}, [1000, 1050], "2 of 11 are taken (every: 50, last: 2)"),
        ({"start_step": 300, "end_step": 800, "every": 200, "last": 2}, [600, 800], "2 of 11"),
        ({"last": 3, "order": "reverse"}, [1050, 1000, 900], "(last: 3, order: reverse)"),
        ({"order": "shuffle", "last": 4, "seed": 0}, [1000, 800, 900, 1050], "(last: 4, order: shuffle, seed: 0)"),
    ],
)
def test_selected_candidates_are_reported(run: Path, select: dict[str, Any], steps: list[int], line: str) -> None:
    actual, messages = taken(run, **select)
    assert actual == steps and len(messages) == 1 and line in messages[0], (actual, messages)
    assert f"step-{steps[0]}.pt" in messages[0] and f"step-{steps[-1]}.pt" in messages[0]


def test_shuffles_are_those_of_the_seed(run: Path) -> None:
    first, repeated, other = (taken(run, order="shuffle", seed=seed)[0] for seed in (1, 1, 2))
    assert first == repeated != other and sorted(map(str, first)) == sorted(map(str, other))


def test_common_differences_are_not_reported(run: Path) -> None:
    assert taken(run) == ([*range(100, 1001, 100), 1050], [])


@pytest.mark.parametrize(
    ("select", "error", "message"),
    [
        ({"start_step": 2000}, ConfigError, r"none is left \(start_step: 2000\); their steps are '100', '200'"),
        ({"last": 12}, ConfigError, "there are 11 candidates to take the last 12 of"),
        ({"every": 2}, ConfigError, "it counts steps and the candidates are 50 or more steps apart"),
        ({"last": 1}, CandidateError, "an average needs at least 2"),
    ],
)
def test_invalid_selections_raise(run: Path, select: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        find_sources(str(run / "step-*"), 2, lambda _: None, SelectConfig(**select))


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="start_step 5 is after end_step 4"):
        SelectConfig(start_step=5, end_step=4)


def test_names_without_steps(run: Path) -> None:
    with pytest.raises(CandidateError, match="a state dict has no step in its name"):
        find_sources([{"w": torch.ones(1)}] * 2, 2, lambda _: None, SelectConfig(every=2))
    messages: list[str] = []
    states = [{"w": torch.full((1,), float(i))} for i in range(3)]
    assert find_sources(states, 2, messages.append, SelectConfig(last=2)) == states[1:]
    assert messages == ["candidates: 2 of 3 are taken (last: 2): 2 state dicts."]


def test_average_and_inspect_take_a_range(run: Path, tmp_path: Path) -> None:
    pattern, select = str(run / "step-*"), SelectConfig(start_step=200, end_step=600, every=200, order="reverse")
    weights = average_fixed([pattern], tmp_path / "out", "first", select=select)
    assert [(step_of(Path(label)), weight) for label, weight in weights] == [(600, 1), (400, 0), (200, 0)]
    assert [step_of(Path(label)) for label in inspect(pattern, select=select).labels] == [600, 400, 200]
    with pytest.raises(ConfigError, match="give the weights with --weights"):
        average_fixed([f"{run}/step-100.pt:0.5", f"{run}/step-200.pt:0.5"], tmp_path / "x", select=select)
