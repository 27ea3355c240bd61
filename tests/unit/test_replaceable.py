"""An output replaces a whole earlier output, and no other files."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import twa_scale
from twa_scale import OutputError, Snapshots, TwaWarning
from twa_scale.base.spans import whole_tensor
from twa_scale.merge import average_fixed
from twa_scale.output import TensorSpec, writing
from twa_scale.output.provenance import provenance, with_provenance
from twa_scale.ranks import Group

STATES = [{"a": torch.full((4,), float(i)), "b": torch.full((4,), float(i))} for i in range(2)]

SPEC = TensorSpec("a", (1,), torch.float32)


def model() -> nn.Module:
    return nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in STATES[0].items()})


def candidates(directory: Path) -> list[str]:
    for i, state in enumerate(STATES):
        path = directory / f"candidates/step-{i}"
        (path / "folder").mkdir(parents=True, exist_ok=True)
        save_file(state, path / "model.safetensors")
        (path / "config.json").write_text("{}")
        (path / "folder/vocab.json").write_text("[]")
    return sorted(map(str, (directory / "candidates").iterdir()))


def average(directory: Path, out: Path) -> None:
    average_fixed(candidates(directory), out, overwrite=True, max_shard_size=16)


def export(directory: Path, out: Path) -> None:
    twa_scale.attach(model(), candidates(directory)).export(out, overwrite=True, max_shard_size=16)


def snapshot(directory: Path, out: Path, asynchronous: bool = False) -> None:
    files = {"config.json": b"{}", "folder/vocab.json": b"[]"}
    options = {"every_n_steps": 1, "files": files, "max_shard_size": 16, "asynchronous": asynchronous}
    with Snapshots(out, **options) as snapshots:  # type: ignore[arg-type]
        snapshots.save(model(), 1)


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "average": average,
    "export": export,
    "snapshot": snapshot,
    "asynchronous": lambda directory, out: snapshot(directory, out, asynchronous=True),
}


def contents(out: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(out)): path.read_bytes() if path.is_file() else None for path in out.rglob("*")}


def touch(name: str) -> Callable[[Path], object]:
    def make(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"precious")

    return make


def train_on(out: Path) -> None:
    """Save as save_pretrained of another program does, in the directory from which it was loaded."""
    for path in out.glob("model*"):
        path.unlink()
    save_file(STATES[0], out / "model.safetensors", {"format": "pt"})


def keep_an_index(out: Path) -> None:
    shutil.copy(out / "model.safetensors.index.json", out / "old.safetensors.index.json")
    for path in out.glob("model*"):
        path.unlink()
    with writing(
        out.parent / "x", [TensorSpec("a", (1,), torch.float32)], Group.alone(), **with_provenance({}, {})
    ) as writer:
        writer.write(whole_tensor("a", (1,)), torch.ones(1))
    (out.parent / "x/model.safetensors").rename(out / "model.safetensors")
    shutil.rmtree(out.parent / "x")


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "optimizer": (touch("optimizer.pt"), "'optimizer.pt'"),
    "random numbers": (touch("rng_state_0.pth"), "'rng_state_0.pth'"),
    "scheduler": (touch("scheduler.pt"), "'scheduler.pt'"),
    "state of DeepSpeed": (touch("global_step10/mp_rank_00_model_states.pt"), "the directory 'global_step10'"),
    "in a folder of the output": (touch("folder/notes.txt"), "'folder/notes.txt'"),
    "hidden file": (touch(".notes"), "'.notes'"),
    "empty folder": (lambda out: (out / "logs").mkdir(), "the directory 'logs'"),
    "link": (lambda out: (out / "latest").symlink_to(out.parent), "'latest'"),
    "other weights": (touch("ema.safetensors"), "'ema.safetensors'"),
    "weights of another program": (train_on, "'model.safetensors' and holds no weights that twa_scale has written"),
    "index of other weights": (keep_an_index, "'old.safetensors.index.json'"),
    "damaged provenance": (touch("twa_scale.json"), "'config.json', the directory 'folder', 'twa_scale.json'"),
    "many": (lambda out: [touch(f"rng_state_{i}.pth")(out) for i in range(8)], "'rng_state_3.pth' and 4 more"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_foreign_files_are_kept(tmp_path: Path, foreign: str) -> None:
    make, messages = FOREIGN[foreign]
    out = tmp_path / "out"
    average(tmp_path, out)
    make(out)
    before = contents(out)
    with pytest.raises(OutputError, match="would be lost") as error:
        average(tmp_path, out)
    assert messages in str(error.value) and str(out) in str(error.value)
    assert contents(out) == before and sorted(os.listdir(tmp_path)) == ["candidates", "out"]  # noqa: PTH208


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_replaces_only_its_own_outputs(tmp_path: Path, writer: str) -> None:
    write, out = WRITERS[writer], tmp_path / "out"
    step = out / "step-00000001" if writer in ("snapshot", "asynchronous") else out
    write(tmp_path, out)
    (step / "config.json").unlink()  # the remains of an output are still one
    write(tmp_path, out)
    assert (step / "config.json").exists() and (step / "folder/vocab.json").exists()
    (step / "optimizer.pt").write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"optimizer\.pt"):
        write(tmp_path, out)
    assert (step / "optimizer.pt").read_bytes() == b"precious"
    assert [path.name for path in step.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_appear_during_writing_are_kept(tmp_path: Path, overwrite: bool) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match="would be lost" if overwrite else "not empty"),
        writing(
            out, [SPEC], Group.alone(), overwrite=overwrite, **with_provenance(provenance("a test", []), {})
        ) as writer,
    ):
        writer.write(whole_tensor("a", (1,)), torch.ones(1))
        touch("optimizer.pt")(out)
    assert contents(out) == {"optimizer.pt": b"precious"} and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_keep_last_deletes_only_snapshots(tmp_path: Path, asynchronous: bool) -> None:
    """Of five steps the second has a user's file. Before them are a step of another program and an average."""
    touch("step-00000001/model.safetensors")(tmp_path)
    with writing(
        tmp_path / "step-00000000", [SPEC], Group.alone(), **with_provenance(provenance("an average", []), {})
    ) as writer:
        writer.write(whole_tensor("a", (1,)), torch.ones(1))
    with (
        pytest.warns(TwaWarning, match="keep_last does not delete it") as messages,
        Snapshots(tmp_path, every_n_steps=1, keep_last=1, asynchronous=asynchronous) as snapshots,
    ):
        for step in range(2, 6):
            snapshots.save(model(), step)
            snapshots.wait()
            if step == 2:
                touch("step-00000002/optimizer.pt")(tmp_path)
    assert {str(warning.message).split(": ")[0] for warning in messages} == {
        str(tmp_path / f"step-0000000{step}") for step in (0, 1, 2)
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (0, 1, 2, 5)]
    assert (tmp_path / "step-00000002/optimizer.pt").exists()
