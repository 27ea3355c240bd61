"""Snapshots of every engine at every number of ranks hold the weights of the model."""

import os
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import models
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from twa_scale.candidates import open_candidates
from twa_scale.errors import ConfigError, EngineError, OutputError
from twa_scale.output.snapshots import Snapshots
from twa_scale.ranks import Group

Tensors = dict[str, torch.Tensor]


def expected(step: int) -> Tensors:
    """Return the state dict after a step, with the tied tensor only under its first name."""
    return {name: value for name, value in models.build(step).state_dict().items() if name != "head.weight"}


def snap(directory: Path, engine: str, steps: list[int], forward: bool = False, **options: Any) -> list[str | None]:
    snapshots = Snapshots(directory, **options)
    written: list[str | None] = []
    for step in steps:
        model = models.wrap(models.build(step), engine)
        if forward:  # FSDP2 may leave whole weights in the module after it
            group = Group.world()
            model.eval()
            models.loss(model, models.part(models.batch(0), group.rank, group.size))
        path = snapshots.step(model, step)
        written.append(path.name if path else None)
    return written


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("forward", "size", "engine"),
    rest_slow(
        product([False, True], [1, 2, 3], ["plain", "ddp", "fsdp2"]),
        lambda forward, size, engine: size == (2 if engine == "ddp" else 3) or (size == 1 and not forward),
    ),
)
def test_files_hold_the_weights_of_the_model(
    ranks: Pool, tmp_path: Path, engine: str, size: int, forward: bool
) -> None:
    options = {"every_n_steps": 4, "start_step": 2}
    written = ranks(snap, size, directory=tmp_path, engine=engine, steps=list(range(8)), forward=forward, **options)
    assert written == [[None, None, "step-00000002", None, None, None, "step-00000006", None]] * size
    assert left(tmp_path) == ["step-00000002", "step-00000006"]
    for step in (2, 6):
        assert_same(load_file(tmp_path / f"step-{step:08d}/model.safetensors"), expected(step))
    assert [c.label[-1] for c in open_candidates(str(tmp_path / "step-*"))] == ["2", "6"]


@pytest.mark.parametrize("size", [1, 2])
def test_keep_last(ranks: Pool, tmp_path: Path, size: int) -> None:
    (tmp_path / "step-notes").mkdir()
    ranks(snap, size, directory=tmp_path, engine="fsdp2", steps=[1, 2, 3, 4, 5], every_n_steps=1, keep_last=2)
    assert left(tmp_path) == ["step-00000004", "step-00000005", "step-notes"]


def test_dtype_files_and_shards(ranks: Pool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "files": {"config.json": b"{}"}, "max_shard_size": 500}
    ranks(snap, 2, directory=tmp_path, engine="fsdp2", steps=[3], every_n_steps=3, **options)
    out = tmp_path / "step-00000003"
    assert (out / "config.json").read_bytes() == b"{}" and (out / "model.safetensors.index.json").exists()
    actual: Tensors = {}
    for file in out.glob("*.safetensors"):
        actual |= load_file(file)
    wanted = expected(3)
    assert_same(actual, {n: t.bfloat16() if t.is_floating_point() else t for n, t in wanted.items()})


def test_same_step_is_replaced(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, every_n_steps=10)
    assert snapshots.save(models.build(1), 7) == snapshots.save(models.build(2), 7)
    assert_same(load_file(tmp_path / "step-00000007/model.safetensors"), expected(2))
    assert left(tmp_path) == ["step-00000007"]


@pytest.mark.parametrize("engine", ["plain", "ddp", "fsdp2"])
def test_directory_that_cannot_be_created(ranks: Pool, tmp_path: Path, engine: str) -> None:
    (tmp_path / "file").touch()
    error = ranks.error(snap, 2, directory=tmp_path / "file", engine=engine, steps=[1], every_n_steps=1)
    assert isinstance(error, OutputError) and str(tmp_path / "file") in str(error)


@pytest.mark.parametrize(
    "options",
    [{"every_n_steps": 0}, {"keep_last": 0}, {"every_n_steps": "10"}, {"start_step": 0.5}, {"keep_last": True}],
)
def test_invalid_numbers(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="every_n_steps="):
        Snapshots(tmp_path, **{"every_n_steps": 1, **options})


@pytest.mark.parametrize("step", [-1, 1.0, "1", None, True])
def test_invalid_steps(tmp_path: Path, step: Any) -> None:
    snapshots = Snapshots(tmp_path, every_n_steps=1)
    for method in (snapshots.step, snapshots.save):
        with pytest.raises(ConfigError, match="step="):
            method(models.build(0), step)
    assert snapshots.step(models.build(0), np.int64(1)) == tmp_path / "step-00000001"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, torch.complex64, float])
def test_invalid_dtypes(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ConfigError, match="not a floating point type"):
        Snapshots(tmp_path, every_n_steps=1, dtype=dtype)
    twa = cases.attach("plain", cases.Run({}))[1]
    with pytest.raises(ConfigError, match="not a floating point type"):
        twa.export(tmp_path / "out", dtype=dtype)
    assert left(tmp_path) == []


def test_invalid_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size"):
        Snapshots(tmp_path, every_n_steps=1, max_shard_size="5")


@pytest.mark.parametrize("name", ["../config.json", "/config.json", "", "a\0b", "\ud800", 3])
def test_file_names_outside_the_candidate(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="is not the name of a file"):
        Snapshots(tmp_path, every_n_steps=1, files={name: b""})


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "./Model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "model.safetensors/below",
        "twa_scale.json",
    ],
)
def test_reserved_file_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"is taken.*model\.safetensors.*twa_scale\.json"):
        Snapshots(tmp_path, every_n_steps=1, files={name: b""})


def test_invalid_file_content(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'config\.json' is a str.*bytes.*Path"):
        Snapshots(tmp_path, every_n_steps=1, files={"config.json": "{}"})  # type: ignore[dict-item]


def test_unreadable_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("pipe", "not a regular file"), ("missing", "missing")):
        snapshots = Snapshots(tmp_path / "out", every_n_steps=1, files={"config.json": tmp_path / name})
        with pytest.raises(OutputError, match=message):
            snapshots.save(models.build(0), 1)
    assert not (tmp_path / "out").exists()


def test_invalid_model(tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        Snapshots(tmp_path, every_n_steps=1).step({}, 1)  # type: ignore[arg-type]
