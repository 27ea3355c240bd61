"""The files of a path, a directory or a glob: as loaders read them, each once, or refused as ambiguous."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from tests.slices import read
from tests.specs import found, refused
from twa_scale.candidates import directory, expand
from twa_scale.candidates.find import find_sources
from twa_scale.candidates.open import open_sources

NUMBER = {"raw": 1.0, "other": 2.0, "shards": 3.0, "torch": 4.0, "torch shards": 5.0}


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((2,), value), "b": torch.full((3,), value)}


def write(directory: Path, files: str, value: float, name: str = "model") -> None:
    """Write weights of one value: one file, or the shards of an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if not files.endswith(".index.json"):
        path, state = directory / files, tensors(value)
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        return
    stem, suffix, *_ = files.split(".")
    weight_map = {}
    for i, (key, tensor) in enumerate(tensors(value).items(), 1):
        file = f"{stem}-{i:05d}-of-00002.{suffix}"
        path, state = directory / file, {key: tensor}
        save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
        weight_map[key] = file
    (directory / files).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# Directories


ORDER = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("first", range(4))
def test_directories_are_read_as_from_pretrained_reads_them(working_directory: Path, first: int) -> None:
    utils = pytest.importorskip("transformers.modeling_utils")
    messages: list[str] = []
    for i, name in enumerate(ORDER[first:], first):
        write(working_directory / "x", name, float(i))
    (path, *_), _ = utils._get_resolved_checkpoint_files("x", None, None, None, None, False)
    (candidate,) = open_sources(find_sources(["x"], 1, messages.append))
    assert (path.startswith(f"x/{ORDER[first].split('.')[0]}")) and read(candidate, "a", 0, 1) == first


@pytest.mark.parametrize(
    ("files", "chosen", "aside"),
    [
        (["model.safetensors", "model.safetensors.index.json"], 0, ["model.safetensors.index.json"]),
        (["pytorch_model.bin", "ema.safetensors"], 0, ["ema.safetensors"]),
        (["pytorch_model.bin", "pytorch_model_ema.bin", "optimizer.pt"], 0, ["pytorch_model_ema.bin"]),
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], 0, []),
        (["model.safetensors.index.json", "ema.safetensors"], 0, ["ema.safetensors"]),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"],
            1,
            ["diffusion_pytorch_model.safetensors"],
        ),
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], 0, []),
        (["model.fp16.safetensors"], 0, []),
        (["consolidated.safetensors.index.json"], 0, []),
        (["adapter_model.bin"], 0, []),
    ],
    ids=str,
)
def test_other_files_next_to_the_weights(
    working_directory: Path, files: list[str], chosen: int, aside: list[str]
) -> None:
    for i, name in enumerate(files):
        write(working_directory / "x", name, float(i))
    messages: list[str] = []
    (candidate,) = open_sources(find_sources(["x"], 1, messages.append))
    assert read(candidate, "a", 0, 1) == chosen and str(candidate.directory) == "x"
    assert len(messages) == bool(aside) and all(
        repr(name) in messages[0] and files[chosen] in messages[0] for name in aside
    )


@pytest.mark.parametrize(
    ("files", "expected_message"),
    [
        (["model.safetensors", "adapter_model.safetensors"], ["'model.safetensors'", "'adapter_model.safetensors'"]),
        (["a.safetensors", "ema.safetensors"], ["2 *.safetensors files", "'a.safetensors', 'ema.safetensors'"]),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["'model.bf16.safetensors'"]),
        (["a.safetensors.index.json", "b.safetensors.index.json"], ["4 *.safetensors files"]),
        (["a.safetensors.index.json", "ema.safetensors"], ["'ema.safetensors'"]),
        (["shard-00001-model-00001-of-00001.safetensors", "ema.safetensors"], ["'ema.safetensors'"]),
    ],
    ids=str,
)
def test_directories_that_are_ambiguous(working_directory: Path, files: list[str], expected_message: list[str]) -> None:
    for name in files:
        write(working_directory / "x", name, 1.0)
    message = refused(["x"])
    assert (
        message.startswith("x: ") and "Name the file" in message and all(part in message for part in expected_message)
    ), message


def test_single_shard_is_refused(working_directory: Path) -> None:
    write(working_directory / "x", "model.safetensors.index.json", 1.0)
    for spec in ("x/*.safetensors", ["x/model-00001-of-00002.safetensors"]):
        assert "the directory x" in refused(spec)


def test_shards_without_their_index_are_refused(working_directory: Path) -> None:
    write(working_directory / "x", "model.safetensors.index.json", 1.0)
    (working_directory / "x/model.safetensors.index.json").unlink()
    assert "but not their index" in refused(["x"])


# Each file counts once


def linked(working_directory: Path) -> None:
    (working_directory / "run/latest").symlink_to("step-2")


def linked_first(working_directory: Path) -> None:
    (working_directory / "run/best").symlink_to(working_directory / "run/step-1", target_is_directory=True)


def hard_linked(working_directory: Path) -> None:
    shutil.copytree(working_directory / "run/step-2", working_directory / "run/step-2-kept", copy_function=os.link)


@pytest.mark.parametrize("repeated", [linked, linked_first, hard_linked])
@pytest.mark.parametrize("files", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_a_glob_counts_the_same_files_once(
    working_directory: Path, files: str, repeated: Callable[[Path], None]
) -> None:
    for i in (1, 2, 10):
        write(working_directory / f"run/step-{i}", files, float(i))
    repeated(working_directory)
    paths, messages = found("run/*")
    assert paths == ["run/step-1", "run/step-2", "run/step-10"]
    assert len(messages) == 1 and "counted once" in messages[0]
    assert found("run/*/" + files)[0] == [f"{path}/{files}" for path in paths]


def test_files_of_equal_content_are_not_the_same(working_directory: Path) -> None:
    for i in (1, 2):
        write(working_directory / f"run/step-{i}", "model.safetensors", 1.0)
    assert found("run/*") == (["run/step-1", "run/step-2"], [])


def test_shards_of_equal_indexes_may_differ(working_directory: Path) -> None:
    """As in the cache of the Hugging Face hub, where indexes of equal content are one file."""
    for i in (1, 2):
        write(working_directory / f"run/step-{i}", "model.safetensors.index.json", float(i))
    (working_directory / "run/step-2/model.safetensors.index.json").unlink()
    (working_directory / "run/step-2/model.safetensors.index.json").hardlink_to(
        working_directory / "run/step-1/model.safetensors.index.json"
    )
    assert found("run/*") == (["run/step-1", "run/step-2"], [])


@pytest.mark.parametrize(
    "twice",
    [
        ["run/step-1", "run/step-1"],
        ["run/step-1", "{working_directory}/run/step-1"],
        ["run/step-1", "run/../run/step-1"],
        ["run/step-1", "run/step-1/model.safetensors"],
        ["run/step-1", "run/latest"],
    ],
)
def test_repeated_names_count_twice_and_are_reported(working_directory: Path, twice: list[str]) -> None:
    write(working_directory / "run/step-1", "model.safetensors", 1.0)
    (working_directory / "run/latest").symlink_to("step-1")
    spec = [path.format(working_directory=working_directory) for path in twice]
    paths, messages = found(spec)
    assert paths == spec and len(messages) == 1 and "count 2 times" in messages[0] and repr(spec[0]) in messages[0]


def test_match_that_is_also_named_counts_once(working_directory: Path) -> None:
    for i in (1, 2):
        write(working_directory / f"run/step-{i}", "model.safetensors", float(i))
    paths, messages = found(["run/step-1", "run/step-*"])
    assert paths == ["run/step-1", "run/step-2"] and len(messages) == 1
    paths, messages = found(["run/step-[12]", "run/step-*"])
    assert paths == ["run/step-1", "run/step-2"] and len(messages) == 1


# Versions


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["step-1/model.safetensors", "step-1/ema.safetensors", "step-2/model.safetensors"], "*/*.safetensors"),
        (["1.pt", "1_ema.pt", "2.pt"], "*.pt"),
        (["model.safetensors", "model.fp16.safetensors"], "*"),
        (["step-1/model.safetensors", "step-1-ema/model.safetensors"], "*"),
        (["step-1/model.safetensors", "average/model.safetensors"], "*"),
        (["avg_10.pt", "10.pt"], "*"),
        (["epoch=3-avg_loss=0.1.pt", "epoch=3-avg_loss=0.1-EMA.pt"], "*"),
        (["ema=0.99.pt", "ema_decay=0.9.pt", "raw.pt"], "*"),
        (["a.fp16/model.safetensors", "a/model.safetensors"], "*"),
        (["a/EMA/model.safetensors", "a/raw/model.safetensors"], "a/*"),
    ],
    ids=str,
)
def test_a_glob_that_matches_two_versions_of_one_model(working_directory: Path, names: list[str], pattern: str) -> None:
    for name in names:
        write((working_directory / name).parent, Path(name).name, 1.0)
    message = refused(pattern)
    assert f"'{pattern}'" in message and "Narrow the pattern" in message and "versions of one model" in message
    assert len(found([str(working_directory / name) for name in names])[0]) == len(names)


@pytest.mark.parametrize(
    "names",
    [
        ["ema-1.pt", "ema-2.pt"],
        ["schema.pt", "other.pt"],
        ["a.fp.pt", "b.fp16.pt"],
        ["last.pt", "step=100-avg_loss=0.3.pt"],
        ["epoch=1-val_avg=0.25.pt", "last.pt"],
        ["first.pt", "step-3_avg-acc-0.9.pt", "step-4-val_avg_0.3.pt"],
        ["avg_reward_10.pt", "resnet_avg_pool.pt"],
    ],
    ids=str,
)
def test_a_glob_that_matches_one_version(working_directory: Path, names: list[str]) -> None:
    for name in names:
        write(working_directory, name, 1.0)
    assert found("*.pt") == (sorted(names), [])


def test_a_glob_of_many_files_is_compared_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Mock(wraps=directory.plain_names)
    monkeypatch.setattr(expand, "plain_names", names)
    assert expand.versions_or_parts([Path(f"step-{i}.fp16.pt") for i in range(300)]) is None
    assert names.call_count == 300


def test_step_names_with_unicode_digits(working_directory: Path) -> None:
    names = ["step-²", "step-1", "step-٢", "step-③"]
    for name in names:
        write(working_directory / name, "model.safetensors", 1.0)
    paths, _ = found("step-*")
    assert sorted(paths) == sorted(names) and paths.index("step-1") < paths.index("step-٢")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"weight": torch.ones(2)}, "not dict"),
        (torch.nn.Linear(2, 2), "give its state_dict()"),
        ([torch.nn.Linear(2, 2)] * 2, "give its state_dict()"),
        (3, "not int"),
        ([1, 2], "not int"),
        (None, "not NoneType"),
    ],
)
def test_invalid_lists_of_candidates_raise(spec: object, message: str) -> None:
    assert message in refused(spec)
