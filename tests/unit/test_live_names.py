"""Candidates whose tensor names differ from those of the model."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import twa_scale
from tests.states import save_run
from twa_scale.base.notices import TwaWarning
from twa_scale.errors import CandidateError, ConfigError, StateError
from twa_scale.merge import export_run

Rename = Callable[[str], str]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


class Inside(nn.Module):
    """A model that contains another one, as in a training framework."""

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
    """Return the weights of the model at the last candidate, with the names of the export."""
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
def test_unique_prefix_is_removed_and_reported(prefix: str, tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: prefix + name)
    with pytest.warns(UserWarning, match=rf"step-0.* and 1 more: names have the prefix '{prefix}'"):
        assert is_last(last_of(paths, tmp_path / "out", net()))


def test_prefix_of_the_model_is_added_and_reported(tmp_path: Path) -> None:
    paths = saved(tmp_path, str)
    with pytest.warns(UserWarning, match=r"names of the model have the prefix 'model\.'"):
        assert is_last(last_of(paths, tmp_path / "out", Inside()), "model.")


def test_prefix_selects_one_of_two_sets_of_weights(tmp_path: Path) -> None:
    more = {f"ema.{name}": torch.zeros_like(value) for name, value in net().state_dict().items()}
    paths = saved(tmp_path, lambda name: f"net.{name}", **more)
    with pytest.raises(CandidateError, match=r"2 times, under 'ema\.', 'net\.'\. Choose one with `prefix`"):
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


def test_equal_names_are_kept(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert is_last(last_of(saved(tmp_path, str), tmp_path / "out", net()))
    assert not [warning for warning in recwarn if issubclass(warning.category, TwaWarning)]


def test_removed_prefix_must_not_repeat_names(tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: f"model.{name}", **{"1.weight": torch.full((1, 2), 77.0)})
    with pytest.raises(CandidateError, match=r"'model\.' makes '1\.weight' of both '1\.weight' and 'model\.1\.weight'"):
        twa_scale.attach(net(), paths)
    with pytest.warns(UserWarning, match=r"without the prefix 'model\.' are not read: '1\.weight'"):
        assert is_last(last_of(paths, tmp_path / "out", net(), prefix="model."))


def test_added_prefix_must_not_repeat_names(tmp_path: Path) -> None:
    paths = saved(tmp_path, str, **{"model.0.bias": torch.full((2,), 77.0)})
    with pytest.raises(
        CandidateError, match=r"makes 'model\.0\.bias' of both '0\.bias' and 'model\.0\.bias'.*`rename`"
    ):
        twa_scale.attach(Inside(), paths)
    with pytest.warns(UserWarning, match="lack: added"):
        config = {"rename": {r"^model\.": "other."}, "ignore": ["^other"]}
        assert is_last(last_of(paths, tmp_path / "out", Inside(), **config), "model.")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("error", r"'0\.weight' of the model is missing.* set `prefix: enc\.`"),
        ("keep", r"no tensor 'enc\.0\.bias'.* set `prefix: enc\.`"),
    ],
)
def test_an_error_names_the_prefix_that_most_names_have(tmp_path: Path, missing: str, message: str) -> None:
    paths = saved(tmp_path, lambda name: f"enc.{name}")
    for path in paths:
        save_file({name: value for name, value in load_file(path).items() if name != "enc.1.bias"}, path)
    with pytest.raises(CandidateError, match=message):
        twa_scale.attach(net(), paths, {"missing": missing})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class TiedInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Tied()


@pytest.mark.parametrize(("build", "before"), [(TiedInside, ""), (Tied, "net.")])
def test_a_tied_name_that_one_candidate_lacks_is_stored_as_the_others_are(
    build: Callable[[], nn.Module], before: str, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for path in paths:
        state = {f"{before}{name}": value.clone() for name, value in Tied().state_dict().items()}
        if path == paths[-1]:
            del state[f"{before}head.weight"]
        save_file(state, path)
    with pytest.warns(UserWarning, match="is not stored; it is tied"):
        twa_scale.attach(build(), paths).export(tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(paths[0]).keys()


@pytest.mark.parametrize(
    ("rewritten", "message"),
    [
        (lambda name: f"x.{name}", r"lack '0\.bias'.* and hold 'x\.0\.bias'.*Restore the candidates"),
        (lambda name: name if name != "1.bias" else "1.b", r"lack '1\.bias' and hold '1\.b'"),
    ],
)
def test_a_run_is_not_exported_from_candidates_with_other_names(
    rewritten: Rename, message: str, tmp_path: Path
) -> None:
    paths = saved(tmp_path, str)
    save_run(twa_scale.attach(net(), paths), paths, tmp_path / "run")
    for path in paths:
        save_file({rewritten(name): value for name, value in load_file(path).items()}, path)
    with pytest.raises(StateError, match=message):
        export_run(tmp_path / "run", tmp_path / "exact")
    assert not (tmp_path / "exact").exists()


def test_a_state_without_the_conversions_that_its_candidates_need_is_refused(tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: f"net.{name}")
    average = twa_scale.attach(net(), paths)
    old = average.state_dict()
    del old["conversions"]
    with patch.object(average, "state_dict", return_value=old):
        save_run(average, paths, tmp_path / "run")
    with pytest.raises(StateError, match=r"lack '0\.bias'.*written by another twa_scale"):
        export_run(tmp_path / "run", tmp_path / "exact")


def test_tensors_ignored_by_their_model_name_are_reported(tmp_path: Path) -> None:
    paths = saved(tmp_path, lambda name: f"enc.{name}", **{"1.more": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"`ignore` also matches '1\.bias', '1\.weight' of the model"):
        twa_scale.attach(net(), paths, {"ignore": ["^1"], "missing": "keep"}).close()
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        twa_scale.attach(net(), paths, {"ignore": [r"^1\.more$"]})
    assert not any("also matches" in str(item.message) for item in messages)
