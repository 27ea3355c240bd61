"""Outputs have the tensor names that the candidates' own loaders expect."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import twa_scale
from twa_scale.merge import average_fixed
from twa_scale.output.snapshots import Snapshots


class Holder(nn.Module):
    """A model whose only attribute is called "module"."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(x)
        return out


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "AveragedModel": lambda: AveragedModel(net(), use_buffers=True),
    "attribute": lambda: Holder(net()),
    "deeper attribute": lambda: nn.Sequential(Holder(net()), nn.Linear(3, 1)),
    "AveragedModel of a holder": lambda: AveragedModel(Holder(net())),
    "compiled": lambda: torch.compile(net()),  # type: ignore[dict-item,return-value]
    "compiled holder": lambda: torch.compile(Holder(net())),  # type: ignore[dict-item,return-value]
}


def saved(build: Callable[[], nn.Module], directory: Path, prefix: str = "") -> list[Path]:
    paths = [directory / f"step-{i}.safetensors" for i in range(2)]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        save_file({f"{prefix}{name}": value for name, value in build().state_dict().items()}, path)
    return paths


def mean(paths: list[Path]) -> dict[str, torch.Tensor]:
    first, last = map(load_file, paths)
    return {n: (first[n] + v) / 2 if v.is_floating_point() else v for n, v in last.items()}


def loaded_by(model: nn.Module, file: Path) -> dict[str, torch.Tensor]:
    model.load_state_dict(load_file(file))
    return model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_loads_its_own_average(tmp_path: Path, kind: str) -> None:
    build = KINDS[kind]
    paths = saved(build, tmp_path)
    model = build()
    twa = twa_scale.attach(model, paths, {"buffers": "mean"})
    twa.export(tmp_path / "exported")
    average_fixed(list(map(str, paths)), tmp_path / "averaged")
    for out in ("exported", "averaged"):
        actual = loaded_by(build(), tmp_path / out / "model.safetensors")
        torch.testing.assert_close(actual, mean(paths))
    snapshot = Snapshots(tmp_path / "snapshots", every_n_steps=1).save(model, 1)
    inner = getattr(model, "_orig_mod", model)
    torch.testing.assert_close(load_file(snapshot / "model.safetensors"), inner.state_dict())


@pytest.mark.parametrize("kind", ["AveragedModel", "attribute"])
def test_names_of_wrappers_are_those_of_the_candidates(tmp_path: Path, kind: str) -> None:
    """Code that reads DDP's state dicts reads candidates that DDP has saved and their average."""
    paths = saved(KINDS[kind], tmp_path, "module.")
    twa = twa_scale.attach(KINDS[kind](), paths)
    twa.export(tmp_path / "exported", max_shard_size=40)
    average_fixed(list(map(str, paths)), tmp_path / "averaged")
    shards = (tmp_path / "exported").glob("*.safetensors")
    actual = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert load_file(tmp_path / "averaged/model.safetensors").keys() == actual.keys() == load_file(paths[0]).keys()


def test_a_tied_name_that_one_candidate_lacks_has_the_wrapper_of_the_others(tmp_path: Path) -> None:
    weight = torch.arange(4.0).view(2, 2)
    tied = {"module.embed.weight": weight, "module.head.weight": weight.clone()}
    states = [tied, {"module.embed.weight": weight}]
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    average_fixed([str(tmp_path / f"{i}.safetensors") for i in range(2)], tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == tied.keys()


def test_candidates_with_and_without_a_wrapper(tmp_path: Path) -> None:
    plain = saved(net, tmp_path)[:1]
    (tmp_path / "ddp").mkdir()
    wrapped = saved(net, tmp_path / "ddp", "module.")[1:]
    average_fixed(list(map(str, plain + wrapped)), tmp_path / "out")
    assert load_file(tmp_path / "out/model.safetensors").keys() == load_file(wrapped[0]).keys()


def test_an_averaged_model_is_read_into_the_model_that_it_averages(tmp_path: Path) -> None:
    paths = saved(KINDS["AveragedModel"], tmp_path)
    model = net()
    twa_scale.attach(model, paths, {"ignore": ["^n_averaged$"]})
    torch.testing.assert_close(
        {f"module.{name}": value for name, value in model.state_dict().items()},
        {name: value for name, value in mean(paths).items() if name != "n_averaged"},
    )
