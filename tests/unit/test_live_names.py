"""Candidates whose tensors have other names than those of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import twa_scale
from tests.states import save_run
from twa_scale.errors import CandidateError, ConfigError
from twa_scale.merge import export_run

Rename = Callable[[str], str]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


class Inside(nn.Module):
    """A model that holds another one, as that of a training framework does."""

    def __init__(self) -> None:
        super().__init__()
        self.model = net()


def saved(directory: Path, rename: Rename, **more: torch.Tensor) -> list[Path]:
    paths = [directory / f"step-{i}.safetensors" for i in range(2)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        save_file({rename(name): value for name, value in net().state_dict().items()} | more, path)
    return paths


def last_of(paths: list[Path], out: Path, model: nn.Module, **config: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the model at the last candidate, whose names the export has."""
    average = twa_scale.attach(model, paths, {"center": "last", **config})
    values = {name: value.clone() for name, value in model.state_dict().items()}
    average.export(out)
    stored, exported = load_file(paths[-1]), load_file(out / "model.safetensors")
    assert exported.keys() <= stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in exported.items())
    return values


def is_last(values: dict[str, torch.Tensor], prefix: str = "") -> bool:
    torch.manual_seed(1)
    return all(torch.equal(values[prefix + name], value) for name, value in net().state_dict().items())


@pytest.mark.parametrize("prefix", ["model.", "net.", "_forward_module.", "a.b."])
def test_the_only_prefix_is_taken_off_and_said(prefix: str, tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: prefix + name)
    with pytest.warns(UserWarning, match=rf"step-0.* and 1 more: names have the prefix '{prefix}'"):
        assert is_last(last_of(paths, tmp_path / "out", net()))


def test_a_prefix_of_the_model_is_put_before_names_and_said(tmp_path: Path) -> None:
    paths = saved(tmp_path, str)
    with pytest.warns(UserWarning, match=r"names of the model have the prefix 'model\.'"):
        assert is_last(last_of(paths, tmp_path / "out", Inside()), "model.")


def test_of_two_sets_of_weights_the_prefix_says_which(tmp_path: Path) -> None:
    more = {f"ema.{name}": torch.zeros_like(value) for name, value in net().state_dict().items()}
    paths = saved(tmp_path, lambda name: f"net.{name}", **more)
    with pytest.raises(CandidateError, match=r"2 times, under 'ema\.', 'net\.'\. Say which .* `prefix`"):
        twa_scale.attach(net(), paths)
    with pytest.warns(UserWarning, match=r"without the prefix 'net\.' are not read: 'ema\.0\.bias'"):
        assert is_last(last_of(paths, tmp_path / "out", net(), prefix="net."))
    with pytest.raises(ConfigError, match=r"prefix: no tensor of .* begins with 'nett\.'"):
        twa_scale.attach(net(), paths, {"prefix": "nett."})


def test_rules_of_the_user_apply_in_their_order(tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: "enc." + name.replace("weight", "w"))
    rename = {r"^enc\.": "first.", r"^first\.(\d)": r"\1", "w$": "weight"}
    assert is_last(last_of(paths, tmp_path / "out", net(), rename=rename))
    with pytest.raises(ConfigError, match=r"rename: the pattern 'x' matches none"):
        twa_scale.attach(net(), paths, {"rename": {**rename, "x": "y"}})
    with pytest.raises(CandidateError, match=r"`rename` makes 'enc\.\.bias' of both 'enc\.0\.bias' and 'enc\.1\.bias'"):
        twa_scale.attach(net(), paths, {"rename": {r"\d": ""}})
    with pytest.raises(ConfigError, match=r"'a': .* cannot be used: invalid group reference"):
        twa_scale.attach(net(), paths, {"rename": {"a": r"\2"}})


def test_a_run_is_exported_under_the_names_of_its_candidates(tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: f"enc.{name}", **{"enc.more": torch.zeros(2)})
    average = twa_scale.attach(net(), paths, {"rename": {r"^enc\.": ""}, "groups": "tensor", "ignore": ["more$"]})
    average.export(tmp_path / "out")
    save_run(average, paths, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "exact")
    exported, exact = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "exact"))
    assert exported.keys() == exact.keys() == {f"enc.{name}" for name in net().state_dict()}
    assert all(torch.equal(value, exported[name]) for name, value in exact.items())


def test_names_that_agree_are_left_alone(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert is_last(last_of(saved(tmp_path, str), tmp_path / "out", net()))
    assert not recwarn.list
