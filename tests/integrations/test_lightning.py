"""Averages in Lightning's Trainer, in one process. One test runs the example of trainers.md."""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import EMAWeightAveraging
from transformers import Trainer, TrainingArguments

import twa_scale
from tests.integrations.examples import run_example
from tests.integrations.small import (
    DECAY,
    HALF,
    LEARN,
    STEPS,
    WINDOW,
    Weights,
    loss_of,
    network,
    require_equal,
    same,
    train_by_hand,
    weights_of,
)
from tests.integrations.train_lightning import Module, data, fit, require_results, results, trainer_with
from twa_scale import ConfigError, StateError, TwaError, TwaWarning
from twa_scale.integrations import transformers
from twa_scale.integrations.lightning import TwaCallback

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    return train_by_hand()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["automatic", "manual"])
def test_a_trainer_keeps_averages(kind: str, tmp_path: Path, by_hand: dict[str, Any]) -> None:
    """The averages equal those of a training loop. They are validated, saved, and resumed with the same bits."""
    require_results(results(kind, tmp_path), by_hand, 0.0)
    stored = torch.load(tmp_path / f"step={HALF}.ckpt", weights_only=True)
    require_equal(within_net(stored["state_dict"]), by_hand["trained half"])
    require_equal(within_net(stored["twa_scale"]["average"]), by_hand["ema half"])
    final = Module.load_from_checkpoint(tmp_path / "average" / "average.ckpt", manual=True)
    require_equal(weights_of(final.net), by_hand["ema"])  # of the second fit, which does not learn


def within_net(state: Weights) -> Weights:
    return {name.removeprefix("net."): value for name, value in state.items()}


@pytest.mark.slow
def test_coefficients_are_learned_when_training_ends(tmp_path: Path, by_hand: dict[str, Any]) -> None:
    trainer, module, callback, _ = fit("automatic", tmp_path, learn=LEARN, learn_steps=3)
    assert callback.average_path == tmp_path / "average" / "average.ckpt"
    card = ModelCard.load(tmp_path / "average" / "README.md")
    assert "pytorch-lightning" in card.data.tags and "the snapshot of step 6" in card.text
    require_equal(weights_of(Module.load_from_checkpoint(callback.average_path).net), by_hand["learned"])
    assert set(trainer.train_dataloader.sampler.epochs) == {0, 1, 2}  # of the training and of learning
    require_equal(weights_of(module.net), by_hand["trained"])
    (own,) = trainer.validate(module, data(), verbose=False)
    assert abs(own["val_loss"] - by_hand["val_loss"]) > 1e-4  # the trained weights again
    assert callback.averages is not None
    trainer.fit_loop.epoch_loop.max_steps = STEPS + 2
    trainer.fit(module, data(), data())
    assert callback.averages.num_steps == STEPS + 2  # a second fit continues


@pytest.mark.slow
def test_a_training_that_was_killed_after_its_last_checkpoint_ends_when_it_resumes(tmp_path: Path) -> None:
    """Lightning's loop takes no step in this case."""
    _, _, first, _ = fit("automatic", tmp_path, learn=LEARN, learn_steps=3)
    assert first.average_path is not None
    learned = torch.load(first.average_path, weights_only=True)["state_dict"]
    first.average_path.unlink()
    _, _, second, _ = fit("automatic", tmp_path, tmp_path / f"step={STEPS}.ckpt", learn=LEARN, learn_steps=3)
    assert second.averages is not None and second.averages.num_steps == STEPS
    assert second.average_path is not None
    assert same(torch.load(second.average_path, weights_only=True)["state_dict"], learned)


class Logged(pl.loggers.Logger):
    """Keeps the logged values."""

    name, version = "logged", 0

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, float]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.entries.append(metrics)


class Monitor(pl.Callback):
    """Keeps the metrics of each validation that a ModelCheckpoint sees."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self.found.append({key: float(value) for key, value in metrics if key.endswith("val_loss")})


@pytest.mark.slow
def test_further_averages_are_validated_with_prefixes_of_their_own(tmp_path: Path, by_hand: dict[str, Any]) -> None:
    """Callbacks see one validation with the metrics of all averages. Training is the same without them."""
    window = {**WINDOW, "start_step": HALF + 1}
    averaging = TwaCallback(
        ema=[DECAY], window=window, evaluate_also=["last", "mean", f"ema:{DECAY}"], learn=LEARN, learn_steps=3
    )
    monitor, logged, module = Monitor(), Logged(), Module()
    trainer = trainer_with("automatic", tmp_path, averaging, monitor)
    trainer.loggers = [logged]
    trainer.fit(module, data(), data())
    require_equal(weights_of(module.net), by_hand["trained"])
    ema = f"ema-{DECAY}_val_loss"
    assert [set(result) for result in monitor.found] == [
        {"val_loss", "last_val_loss", ema},
        {"val_loss", "last_val_loss", ema, "mean_val_loss"},
    ]
    actual = monitor.found[-1]
    assert actual["last_val_loss"] == pytest.approx(loss_with(by_hand["trained"]))
    assert actual["val_loss"] == actual[ema] == pytest.approx(by_hand["val_loss"])
    learned = weights_of(Module.load_from_checkpoint(averaging.average_path).net)
    assert float(trainer.callback_metrics["average_val_loss"]) == pytest.approx(loss_with(learned))
    names = [key for entry in logged.entries for key in entry if key.endswith("val_loss")]
    assert names == [
        "last_val_loss",
        ema,
        "val_loss",
        "last_val_loss",
        "mean_val_loss",
        ema,
        "val_loss",
        "average_val_loss",
    ]
    trainer.validate(module, data(), verbose=False)
    assert "last_val_loss" not in trainer.callback_metrics


def loss_with(weights: Weights) -> float:
    """Return the loss of these weights in a validation."""
    net = network()
    net.load_state_dict(weights)
    with torch.no_grad():
        return float(sum(loss_of(net, batch[0]) for batch in islice(data(), 2)) / 2)


@pytest.mark.slow
def test_checkpoint_of_other_ranks_raises_and_one_without_averages_restarts(tmp_path: Path) -> None:
    fit("automatic", tmp_path)
    path = tmp_path / f"step={HALF}.ckpt"
    stored = torch.load(path, weights_only=True)
    stored["twa_scale"]["states"] *= 2
    torch.save(stored, path)
    with pytest.raises(StateError, match="averages of 2 ranks, and there are 1"):
        fit("automatic", tmp_path, path)
    del stored["twa_scale"]
    torch.save(stored, path)
    with pytest.warns(TwaWarning, match=f"new ones start at step {HALF}"):
        fit("automatic", tmp_path, path)


@pytest.mark.slow
def test_steps_of_several_optimizers_are_counted(tmp_path: Path) -> None:
    package = pytest.importorskip("pytorch_lightning")

    class Two(package.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = network()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.net[0], self.net[2])], []

        def training_step(self, batch: Any, i: int) -> None:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(loss_of(self.net, batch[0]))
                optimizer.step()

    callback = TwaCallback(ema=[DECAY])
    last = package.callbacks.ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=100)  # only when training ends
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = package.Trainer(max_steps=STEPS, default_root_dir=tmp_path, callbacks=[callback, last], **options)
    trainer.fit(Two(), data())
    assert callback.averages is not None and callback.averages.num_steps == trainer.global_step == STEPS
    assert callback.average_path is not None
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["twa_scale"]["average"]
    assert same(stored, torch.load(callback.average_path, weights_only=True)["state_dict"])


class Fail(pl.Callback):
    """Raises an error in the first validation of an average, or saves a checkpoint in it."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.before: Weights = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.before = weights_of(pl_module.net)

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.sanity_checking:
            return
        assert not all(torch.equal(value, self.before[name]) for name, value in weights_of(pl_module.net).items())
        if self.path is None:
            raise RuntimeError("in a validation")
        trainer.save_checkpoint(self.path)


@pytest.mark.slow
def test_error_in_a_validation_restores_the_trained_weights(tmp_path: Path) -> None:
    module, callback, fail = Module(), TwaCallback(ema=[DECAY]), Fail()
    trainer = trainer_with("automatic", tmp_path, callback, fail)
    with pytest.raises(RuntimeError, match="in a validation"):
        trainer.fit(module, data(), data())
    require_equal(weights_of(module.net), fail.before)
    with pytest.raises(TwaError, match="would save the average as the trained weights"):
        trainer_with("automatic", tmp_path, TwaCallback(ema=[DECAY]), Fail(tmp_path / "x.ckpt")).fit(
            Module(), data(), data()
        )


@pytest.mark.slow
def test_example_of_the_documentation_runs(tmp_path: Path) -> None:
    names = {
        "Trainer": partial(pl.Trainer, logger=False, default_root_dir=tmp_path),
        "module": Module(),
        "Module": Module,
    }
    run_example("lightning", {**names, "train": data(), "validation": data()})
    assert (tmp_path / "checkpoints" / "average" / "average.ckpt").exists()


@pytest.mark.slow
def test_window_longer_than_the_training_is_reported_at_the_start(tmp_path: Path) -> None:
    callback = TwaCallback(ema=[DECAY], window={"every": STEPS + 1, "keep": 2})
    with pytest.warns(TwaWarning, match=f"ends at step {STEPS}.*has 0 snapshots.*no average of it") as caught:
        trainer_with("automatic", tmp_path, callback).fit(Module(), data())
    assert [warning.filename for warning in caught if warning.category is TwaWarning] == [__file__]


def test_unsupported_trainer_settings_raise(tmp_path: Path) -> None:
    """Refused: two averaging callbacks, a callback of another trainer, and learning without a loss."""
    averaging = TwaCallback(ema=[DECAY])
    learning = TwaCallback(window=WINDOW, learn=LEARN, learn_steps=3)
    other = transformers.TwaCallback(ema=[DECAY])
    twa = twa_scale.attach(network(), [network(seed).state_dict() for seed in range(2)])
    coefficients = transformers.CoefficientsCallback(twa)
    for callbacks, manual, message in (
        ((averaging, EMAWeightAveraging()), False, "EMAWeightAveraging also writes averages"),
        ((other,), False, "Lightning's Trainer needs that of twa_scale.integrations.lightning"),
        ((coefficients,), False, "CoefficientsCallback of .*Leave the callback out"),
        ((learning,), True, "training_step that returns the loss"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer_with("manual", tmp_path, *callbacks).fit(Module(manual), data())
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `TwaCallback`"):
        trainer_with("manual", tmp_path, averaging, learning)
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ConfigError, match=r"needs that of twa_scale\.integrations\.transformers"):
        Trainer(network(), args, callbacks=[averaging])


@pytest.mark.slow
def test_batchnorm_is_reported_also_with_manual_optimization(tmp_path: Path) -> None:
    module = Module(True)
    module.net.append(torch.nn.BatchNorm1d(6))
    with pytest.warns(TwaWarning, match="BatchNorm statistics"):
        trainer_with("manual", tmp_path, TwaCallback(ema=[DECAY])).fit(module, data())
