"""Directories of training frameworks: the Trainer and Accelerate under FSDP, and Lightning."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.old_torch import ALONE
from tests.slices import opened, read
from tests.specs import found, refused
from twa_scale import TwaWarning, attach
from twa_scale.candidates import Wanted, open_candidates
from twa_scale.merge import average_fixed


def state(value: float) -> dict[str, torch.Tensor]:
    return {"lin.weight": torch.full((3, 2), value), "lin.bias": torch.full((3,), value)}


def dcp_folder(folder: Path, value: float, key: str = "model") -> None:
    """Write what `accelerate.utils.save_fsdp_model` writes with SHARDED_STATE_DICT."""
    folder.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a process without a group
        dcp.save({key: state(value)}, storage_writer=dcp.FileSystemWriter(folder), **ALONE)


@pytest.fixture
def out(working_directory: Path) -> Path:
    """Write checkpoints of the Trainer under FSDP, with a copy of the best, a link, and further files."""
    for step in (50, 100, 1000):
        dcp_folder(working_directory / f"out/checkpoint-{step}/pytorch_model_fsdp_0", float(step))
        dcp_folder(working_directory / f"out/checkpoint-{step}/optimizer_0", 0.0, "optimizer")
        (working_directory / f"out/checkpoint-{step}/config.json").write_text("{}")
        (working_directory / f"out/checkpoint-{step}/trainer_state.json").write_text("{}")
    shutil.copytree(working_directory / "out/checkpoint-100", working_directory / "out/checkpoint-best")
    (working_directory / "out/checkpoint-last").symlink_to("checkpoint-1000")
    (working_directory / "out/config.json").write_text("{}")
    (working_directory / "out/runs").mkdir()
    return working_directory / "out"


def test_pattern_of_checkpoints_leaves_out_copies_and_links(out: Path) -> None:
    paths, messages = found("out/checkpoint-*")
    assert paths == ["out/checkpoint-50", "out/checkpoint-100", "out/checkpoint-1000"]
    link, copy = messages
    assert "counted once, as the same files under another path: 'out/checkpoint-last'" in link
    assert "left out by their names, as copies or later steps: 'out/checkpoint-best'" in copy
    assert found(["out/checkpoint-50", "out/checkpoint-best"]) == (["out/checkpoint-50", "out/checkpoint-best"], [])
    assert found("out/checkpoint-b*")[0] == ["out/checkpoint-best"]
    weights = average_fixed(["out/checkpoint-*"], "merged", "last")
    assert weights[-1] == ("out/checkpoint-1000", 1.0) and Path("merged/config.json").exists()
    assert torch.equal(read(opened(Path("merged")), "lin.weight", 0, 6), torch.full((6,), 1000.0))
    average_fixed(["out/checkpoint-*"], "same", "first", format="same")
    assert {path.name for path in Path("same").iterdir()} == {
        *(path.name for path in Path("out/checkpoint-1000").iterdir()),
        "twa_scale.json",
        "README.md",
    }
    assert torch.equal(read(opened(Path("same")), "lin.weight", 0, 6), torch.full((6,), 50.0))
    for name in ("optimizer_0/.metadata", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"):
        assert Path("same", name).read_bytes() == Path("out/checkpoint-1000", name).read_bytes()


def test_other_layouts_of_accelerate(working_directory: Path) -> None:
    (working_directory / "full").mkdir()
    torch.save(state(1.0), "full/pytorch_model_fsdp.bin")
    torch.save({"state": {}}, "full/optimizer.bin")
    assert read(opened(Path("full")), "lin.bias", 0, 1) == 1
    dcp_folder(working_directory / "old/pytorch_model_0", 2.0)
    assert read(opened(Path("old")), "lin.bias", 0, 1) == 2
    assert "There are weights in 'full', 'old'" in refused(["."])
    dcp_folder(working_directory / "two/pytorch_model_fsdp_0", 3.0)
    dcp_folder(working_directory / "two/pytorch_model_fsdp_1", 4.0)
    assert "holds 'pytorch_model_fsdp_0', 'pytorch_model_fsdp_1', one folder for each model" in refused(["two"])
    (working_directory / "local").mkdir()
    torch.save(state(1.0), "local/pytorch_model_fsdp_rank0.bin")
    assert "SHARDED_STATE_DICT or FULL_STATE_DICT" in refused(["local"])
    (working_directory / "second").mkdir()
    save_file(state(1.0), "second/model.safetensors")
    torch.save(state(2.0), "second/pytorch_model_1.bin")
    assert "'pytorch_model_1.bin' next to it is not read" in found(["second"])[1][0]


@pytest.mark.parametrize("names", [["last.ckpt"], ["last-v1.ckpt", "best.ckpt"], ["model_best.ckpt"]])
def test_copies_of_steps_are_distinguished(working_directory: Path, names: list[str]) -> None:
    steps = ["epoch=0-step=9.ckpt", "epoch=1-step=10.ckpt", "epoch=1-step=10-v1.ckpt"]
    for i, name in enumerate([*steps, *names]):
        torch.save(state(float(i)), name)
    paths, messages = found("*.ckpt")
    assert sorted(paths) == sorted(steps) and len(messages) == 1 and all(f"'{name}'" in messages[0] for name in names)


@pytest.mark.parametrize(
    ("steps", "names"),
    [
        (["checkpoint-0.pth.tar", "checkpoint-1.pth.tar"], ["last.pth.tar", "model_best.pth.tar"]),  # timm
        (["epoch_1.pt", "epoch_2.pt"], ["epoch_latest.pt"]),  # open_clip with --save-most-recent
        (["checkpoint1.pt", "checkpoint2.pt"], ["checkpoint_best.pt", "checkpoint_last.pt"]),  # fairseq
    ],
)
def test_torch_files_that_are_copies_are_left_out(working_directory: Path, steps: list[str], names: list[str]) -> None:
    for i, name in enumerate([*steps, *names]):
        torch.save(state(float(i)), name)
    paths, messages = found("*.p*")
    assert sorted(paths) == steps and len(messages) == 1 and all(f"'{name}'" in messages[0] for name in names)
    assert sorted(found([*steps, *names])[0]) == sorted([*steps, *names])  # explicitly named ones are used


# Lightning


def train(folder: Path, callbacks: list[Any]) -> nn.Module:
    """Train with Lightning for two epochs of 4 steps, with a checkpoint after each epoch, and return the module."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
            self.save_hyperparameters()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    module: nn.Module = Module()
    save = lightning.pytorch.callbacks.ModelCheckpoint(folder, save_top_k=-1, save_last=True, every_n_epochs=1)
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", devices=1, callbacks=[save, *callbacks], **silent)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4))
    return module


@pytest.fixture(scope="module")
def lightning_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    root = tmp_path_factory.mktemp("lightning")
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(root / "plain", [])
        train(root / "ema", [callbacks.EMAWeightAveraging(decay=0.5)])
        train(root / "swa", [callbacks.StochasticWeightAveraging(0.1, swa_epoch_start=1)])
    os.environ.clear()
    os.environ.update(before)
    return root


def lines(spec: str, key: str | None = None) -> tuple[Any, list[str]]:
    messages: list[str] = []
    return open_candidates(spec, 2, Wanted(weights_key=key), messages.append), messages


def content(path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(path, weights_only=False)
    return loaded


@pytest.mark.slow
def test_lightning_files(lightning_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lightning_files)
    candidates, messages = lines("plain/*.ckpt")
    names = ["plain/epoch=0-step=4.ckpt", "plain/epoch=1-step=8.ckpt"]
    assert [candidate.label for candidate in candidates] == names
    assert len(messages) == 1 and "left out by their names, as copies or later steps: 'plain/last.ckpt'" in messages[0]
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    attach(model, "plain/*.ckpt", {"center": "last"}).close()  # the prefix "net." is found
    for name, value in content(names[-1])["state_dict"].items():
        assert torch.equal(model.state_dict()[name.removeprefix("net.")], value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "key", "line"),
    [
        ("ema", "current_model_state", "'state_dict', the averages that Lightning's WeightAveraging keeps;"),
        ("swa", "callbacks.StochasticWeightAveraging.average_model_state", "those under 'state_dict';"),
    ],
)
def test_averages_of_lightning(
    lightning_files: Path, working_directory: Path, monkeypatch: pytest.MonkeyPatch, folder: str, key: str, line: str
) -> None:
    monkeypatch.chdir(lightning_files)
    path = f"{folder}/epoch=1-step=8.ckpt"
    stored: Any = content(path)
    others = stored
    for part in key.split("."):
        others = others[part]
    messages: list[str] = []
    (candidate,) = open_candidates([path], 1, Wanted(), messages.append)
    (chosen,) = open_candidates([path], 1, Wanted(weights_key=key))
    assert line in messages[0] and f"'{key}'" in messages[0]
    if folder == "ema":  # training resumes from the other set
        with pytest.warns(TwaWarning, match="resumes from 'current_model_state', which stays that of the last"):
            average_fixed([path], str(working_directory / "out"), format="same")
    name = "net.0.weight"
    assert torch.equal(read(candidate, name, 0, 12), stored["state_dict"][name].flatten())
    assert torch.equal(read(chosen, name, 0, 12), others[name].flatten())
    assert not torch.equal(others[name], stored["state_dict"][name])


@pytest.mark.slow
def test_distributed_directories_of_lightning(lightning_files: Path, working_directory: Path) -> None:
    fsdp = pytest.importorskip("lightning.fabric.strategies.fsdp")
    weights = content(str(lightning_files / "plain/last.ckpt"))["state_dict"]
    for step, key in ((2, "model"), (10, "state_dict")):  # FSDPStrategy and ModelParallelStrategy
        folder = working_directory / f"epoch=0-step={step}.ckpt"
        folder.mkdir()
        optimizer = {"state": {name: {"exp_avg": torch.zeros_like(value)} for name, value in weights.items()}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fsdp._distributed_checkpoint_save({key: weights, "optimizer_0": optimizer}, folder)
        torch.save({"epoch": 0, "global_step": step, "callbacks": {}}, folder / "meta.pt")
    candidates, messages = lines("*.ckpt")
    assert [candidate.label for candidate in candidates] == ["epoch=0-step=2.ckpt", "epoch=0-step=10.ckpt"]
    assert messages == []
    for candidate in candidates:
        assert candidate.names() == sorted(weights)
        assert torch.equal(read(candidate, "net.0.weight", 1, 9), weights["net.0.weight"].flatten()[1:9])
