"""Trainings resume from an average that `--format same` wrote: Trainer, Lightning, and FSDP2 with DCP."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.integrations.train_transformers import Texts, build
from tests.pool import Pool
from twa_scale.merge import average_fixed


def copied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def environment() -> Iterator[None]:
    """Remove the variables that trainers set in the environment."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    os.environ.clear()
    os.environ.update(before)


# transformers' Trainer


class Start(TrainerCallback):
    """Keeps the first step of a training, and the weights and the optimizer state at its start."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not hasattr(self, "step"):
            self.step = state.global_step
            self.weights = copied(kwargs["model"].state_dict())
            self.moments = copied(kwargs["optimizer"].optimizer.state_dict()["state"].get(0, {}))
            self.rate = kwargs["lr_scheduler"].get_last_lr()[0]


def train(directory: Path, start: TrainerCallback, resume: str | None = None) -> None:
    args = TrainingArguments(
        str(directory), max_steps=4, save_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model=build(0), args=args, train_dataset=Texts(), callbacks=[start])
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_a_trainer_resumes_from_the_average(working_directory: Path) -> None:
    train(working_directory / "out", Start())
    average_fixed(["out/checkpoint-[1-3]"], "average", format="same")
    before = {path.name for path in Path("out/checkpoint-3").iterdir()}
    assert {path.name for path in Path("average").iterdir()} == before | {"twa_scale.json", "README.md"}
    for name in before - {"model.safetensors"}:
        assert Path("average", name).read_bytes() == Path("out/checkpoint-3", name).read_bytes()
    start = Start()
    train(working_directory / "out", start, "average")
    assert start.step == 3 and start.rate == pytest.approx(1e-2 / 4)
    assert_equal(start.weights, load_file("average/model.safetensors"))
    assert_equal(start.moments, torch.load("out/checkpoint-3/optimizer.pt")["state"][0])
    steps = [load_file(f"out/checkpoint-{step}/model.safetensors") for step in (1, 2, 3)]
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(start.weights[name], sum(state[name] for state in steps) / 3)


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Check all tensors of `wanted`. A head that is tied to an embedding is not stored."""
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# Accelerate


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_accelerate_loads_the_average(working_directory: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    torch.manual_seed(0)
    inner = nn.Linear(4, 3)
    model, optimizer = accelerator.prepare(inner, torch.optim.Adam(inner.parameters(), lr=0.1))
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1))
    states = []
    for number in (1, 2):
        accelerator.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
        scheduler.step()
        accelerator.save_state(f"states/step-{number}", safe_serialization=number == 2)
        states.append(copied(inner.state_dict()))
    moments, rate = copied(optimizer.state_dict()["state"][0]), scheduler.get_last_lr()
    optimizer.step()
    scheduler.step()
    average_fixed(["states/step-*"], "average", format="same")
    accelerator.load_state("average")
    assert_equal(optimizer.state_dict()["state"][0], moments)
    assert scheduler.get_last_lr() == rate
    torch.testing.assert_close(inner.weight.detach(), (states[0]["weight"] + states[1]["weight"]) / 2)


# Lightning


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_lightning_resumes_from_the_average(working_directory: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
            self.start: dict[str, Any] = {}

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            if not self.start:
                moments = copied(self.optimizers().optimizer.state[self.net[0].weight])
                self.start = {"step": self.global_step, "moments": moments, "weights": copied(self.state_dict())}
            loss: torch.Tensor = self.net(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.1)

    def fit(epochs: int, resume: str | None = None) -> Any:
        module = Module()
        save = lightning.pytorch.callbacks.ModelCheckpoint("ckpts", save_top_k=-1)
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, callbacks=[save], **silent)
        batches = DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4)
        trainer.fit(module, batches, ckpt_path=resume)
        return module.start

    fit(2)
    average_fixed(["ckpts/*.ckpt"], "average", format="same")
    start = fit(3, "average/epoch=1-step=8.ckpt")
    contents: list[Any] = [torch.load(path, weights_only=False) for path in sorted(Path("ckpts").glob("*"))]
    assert start["step"] == 8 and contents[2]["global_step"] == 12
    assert_equal(start["moments"], contents[1]["optimizer_states"][0]["state"][0])
    for name in ("net.0.weight", "net.1.running_mean"):
        mean = (contents[0]["state_dict"][name] + contents[1]["state_dict"][name]) / 2
        torch.testing.assert_close(start["weights"][name], mean)


# FSDP2 and torch.distributed.checkpoint


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model[0])
    fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_steps(directory: Path) -> None:
    model, optimizer = sharded(0)
    for number in (1, 2):
        step(model, optimizer)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state, "step": number}, checkpoint_id=directory / f"step-{number}")


def load(directory: Path) -> dict[str, Any]:
    """Load a checkpoint into a new model, take a step, and return the loaded tensors, gathered."""
    model, optimizer = sharded(1)
    weights, state = get_state_dict(model, optimizer)
    content = {"model": weights, "optimizer": state, "step": 0}
    dcp.load(content, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    stored: Any = state["state"]
    moments = {name: moment["exp_avg"].full_tensor() for name, moment in stored.items()}
    full = {name: tensor.full_tensor().clone() for name, tensor in model.state_dict().items()}
    step(model, optimizer)
    return {"weights": full, "moments": moments, "step": content["step"]}


@pytest.mark.slow
def test_fsdp2_resumes_from_the_average_on_another_number_of_ranks(ranks: Pool, working_directory: Path) -> None:
    ranks(save_steps, 3, directory=working_directory)
    average_fixed(["step-*"], "average", format="same")
    first, last = (ranks(load, 2, directory=working_directory / f"step-{number}")[0] for number in (1, 2))
    for actual in ranks(load, 2, directory=working_directory / "average"):
        assert actual["step"] == 2
        assert_equal(actual["moments"], last["moments"])
        for name, tensor in actual["weights"].items():
            torch.testing.assert_close(tensor, (first["weights"][name] + last["weights"][name]) / 2)
            assert not torch.equal(tensor, last["weights"][name])
