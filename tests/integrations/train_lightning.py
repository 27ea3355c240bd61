"""Train with Lightning's Trainer."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import twa_scale
from tests.integrations.small import (
    ACCUMULATE,
    DECAY,
    HALF,
    LEARN,
    ROWS,
    SIZE,
    STEPS,
    WINDOW,
    coefficients_by_hand,
    loss_of,
    network,
    require_equal,
    rows,
    same,
    weights_of,
)
from twa_scale import TwaError
from twa_scale.integrations.lightning import TwaCallback
from twa_scale.running.state_file import plain


def data(rank: int = 0, ranks: int = 1) -> torch.utils.data.DataLoader[Any]:
    """Return the batches of three steps, which are an epoch. The ranks share the rows of a batch."""
    x = rows()
    part = torch.arange(len(x)).reshape(-1, ranks, SIZE // ranks)[:, rank].reshape(-1)
    own = torch.utils.data.TensorDataset(x[part])
    return torch.utils.data.DataLoader(own, SIZE // ranks, sampler=InOrder(own))


class InOrder(torch.utils.data.SequentialSampler):
    """Keeps the epochs that were set."""

    def __init__(self, source: Any) -> None:
        super().__init__(source)
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


KINDS = ("ddp", "fsdp2")


class Module(pl.LightningModule):
    """A small network."""

    sharded = False

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.net = network()

    def configure_model(self) -> None:
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh)
            fully_shard(self.net, mesh=mesh)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def loss(self, batch: Any) -> torch.Tensor:
        return loss_of(self.net, batch[0])

    def training_step(self, batch: Any, i: int) -> torch.Tensor | None:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / ACCUMULATE)
        if (i + 1) % ACCUMULATE == 0:
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch: Any, i: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True, batch_size=len(batch[0]))


def strategy_of(kind: str) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return "auto"


def trainer_with(kind: str, directory: Path, *callbacks: pl.Callback, max_steps: int = STEPS) -> pl.Trainer:
    """Return a Trainer of six steps of two batches, with a checkpoint at each step."""
    saving = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    return pl.Trainer(
        max_steps=max_steps,
        default_root_dir=directory,
        accelerator="cpu",
        devices=2 if kind in ("ddp", "fsdp2") else 1,
        strategy=strategy_of(kind),
        accumulate_grad_batches=1 if kind == "manual" else ACCUMULATE,
        limit_val_batches=2,
        callbacks=[*callbacks, saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


class Halfway(pl.Callback):
    """Keeps the state of the averages at the start of the second epoch."""

    state: Any = None

    def __init__(self, averaging: TwaCallback) -> None:
        self.averaging = averaging

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == HALF and self.state is None:
            assert self.averaging.averages is not None
            self.state = deepcopy(plain(self.averaging.averages.state_dict()))


def fit(
    kind: str, directory: Path, resume: Path | None = None, **options: Any
) -> tuple[pl.Trainer, Module, TwaCallback, Any]:
    """Train a small network. The last result is the state of the averages between the epochs."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    callback = TwaCallback(**{"ema": [DECAY], "window": WINDOW, **options})
    module = Module(manual=kind == "manual")
    module.sharded = kind == "fsdp2"
    halfway = Halfway(callback)
    trainer = trainer_with(kind, directory, callback, halfway)
    trainer.fit(module, data(rank, ranks), data(rank, ranks), ckpt_path=resume)
    return trainer, module, callback, halfway.state


def results(kind: str, directory: Path) -> dict[str, Any]:
    """Return the results of a training, and of its second half resumed from the checkpoint."""
    learn: dict[str, Any] = {} if kind == "manual" else {"learn": LEARN, "learn_steps": 3}
    trainer, module, callback, before = fit(kind, directory, **learn)
    assert callback.averages is not None
    if callback.average_path and trainer.is_global_zero:
        callback.average_path.rename(directory.parent / f"{kind}-learned.ckpt")
    actual = {
        "steps": (callback.averages.num_steps, trainer.global_step),
        "val_loss": float(trainer.callback_metrics["val_loss"]),
        "trained": weights_of(module.net),
    }
    _, module, callback, after = fit(kind, directory, directory / f"step={HALF}.ckpt")
    assert callback.averages is not None
    actual["trained again"] = weights_of(module.net)
    actual["same"] = same(before, after)
    with callback.averages.weights("ema"):
        actual["ema"] = weights_of(module.net)
    return actual if kind in ("manual", "fsdp2") else actual | coefficients(kind, directory / "coefficients")


class Averaged(Module):
    """Trains the coefficients of three networks with its own optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        states = [{f"net.{name}": value for name, value in network(seed).state_dict().items()} for seed in range(3)]
        self.twa = twa_scale.attach(self.trainer.strategy.model, states, ROWS)
        return self.twa.as_optimizer()


def coefficients(kind: str, directory: Path) -> dict[str, Any]:
    """Return the coefficients and the weights after a training, and after its resumed second half."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    actual = []
    for resume in (None, directory / f"step={HALF}.ckpt"):
        module = Averaged()
        trainer_with(kind, directory).fit(module, data(rank, ranks), ckpt_path=resume)
        module.twa.close()
        actual.append((module.twa.coefficients, weights_of(module.net)))
    return {"averaged": actual[0], "averaged again": actual[1]}


class Interrupt(pl.Callback):
    """Interrupts the first validation of an average, on all ranks."""

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            raise KeyboardInterrupt


def interrupted(kind: str, directory: Path) -> dict[str, Any]:
    """Return the error of a Trainer that is interrupted in a validation, and its checkpoints."""
    saving = ModelCheckpoint(directory, save_on_exception=True, every_n_epochs=100)
    trainer = trainer_with(kind, directory / "steps", TwaCallback(ema=[DECAY]), Interrupt(), saving)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with pytest.raises(TwaError) as messages:
        trainer.fit(Module(), data(rank, ranks), data(rank, ranks))
    return {"told": str(messages.value), "left": [path.name for path in directory.glob("*.ckpt")]}


def require_results(found: dict[str, Any], by_hand: dict[str, Any], tolerance: float) -> None:
    assert found["steps"] == (STEPS, STEPS) and found["same"]
    assert found["val_loss"] == pytest.approx(by_hand["val_loss"], abs=1e-6)
    require_equal(found["trained"], by_hand["trained"], tolerance)
    require_equal(found["trained again"], by_hand["trained"], tolerance)
    require_equal(found["ema"], by_hand["ema"], tolerance)
    if "averaged" in found:
        torch.testing.assert_close(found["averaged"], coefficients_by_hand(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found["averaged again"], found["averaged"], rtol=0, atol=0)
