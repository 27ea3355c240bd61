"""Averages in the Trainer of transformers, and in those that are made from it, as TRL's are."""

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from twa_scale.average.average import TrainableAverage
from twa_scale.average.coefficients import Which
from twa_scale.base.notices import notice
from twa_scale.config import TwaConfig, validated
from twa_scale.errors import ConfigError, TwaError
from twa_scale.running import RunningAverages
from twa_scale.running.settings import Ema, Window, ema_settings, window_settings

AVERAGE = "average"
"""The directory of an average, in a checkpoint and in the output directory."""


class TwaCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps averages while a Trainer trains, with whatever engine it has chosen.

    Evaluations are of the average `evaluate_with`, so that the best checkpoint is the one with the best average. Each
    checkpoint gets the state of the averages, from which training resumes, and `average/`, which `from_pretrained`
    reads. When training ends, `output_dir/average` is the average: with `learn`, of the snapshots with learned
    coefficients; of the best checkpoint with `load_best_model_at_end`. The Trainer keeps the trained weights.

    Args:
        ema: as for `RunningAverages`.
        window: as for `RunningAverages`.
        device: as for `RunningAverages`.
        evaluate_with: what evaluations and checkpoints show, as `RunningAverages.weights` takes it; "auto" is the first
            exponential average, or the mean of the window where there is none; "last" the trained weights.
        learn: settings of the trainable average over the window, as for `attach`: learned when training ends.
        learn_steps: its steps, each on as many batches as an optimizer step of the Trainer.
        save: write `average/` with each checkpoint.

    Raises:
        ConfigError: names the setting.
    """

    def __init__(
        self,
        *,
        ema: Ema | None = None,
        window: Window | None = None,
        device: str = "auto",
        evaluate_with: Which = "auto",
        learn: TwaConfig | Mapping[str, Any] | None = None,
        learn_steps: int = 0,
        save: bool = True,
    ) -> None:
        self._ema, self._window, self._device = ema_settings(ema), window_settings(window), device
        if self._ema is None and self._window is None:
            raise ConfigError("TwaCallback: give ema=[0.999], window={'every': 100, 'keep': 40}, or both.")
        if (learn is None) != (not learn_steps):
            raise ConfigError("TwaCallback: give learn={..} and learn_steps=200 together, or neither.")
        if learn is not None and self._window is None:
            raise ConfigError("TwaCallback: learn needs window={'every': .., 'keep': ..}, whose snapshots it averages.")
        self._learn = validated(TwaConfig, dict(learn)) if isinstance(learn, Mapping) else learn
        self._learn_steps = learn_steps
        default = next(iter(self._ema.names())) if self._ema else "mean"
        self._which: Which = default if isinstance(evaluate_with, str) and evaluate_with == "auto" else evaluate_with
        self._save = save
        self._trainer: Any = None
        self._evaluate: Callable[..., dict[str, float]] | None = None
        self._showing = False
        self.averages: RunningAverages | None = None
        """Made when training begins."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the averages of the model as the Trainer has wrapped it; on resume, go on from the checkpoint's."""
        self._trainer, checkpoint = _caller()
        if sum(isinstance(callback, TwaCallback) for callback in self._trainer.callback_handler.callbacks) > 1:
            raise ConfigError("TwaCallback: the Trainer has two, which would write the same files; give one.")
        self.averages = RunningAverages(
            self._trainer.model_wrapped, ema=self._ema, window=self._window, device=self._device
        )
        self.averages.has(self._which)  # a name that is wrong is an error now, not at the first evaluation
        if checkpoint is not None and not self.averages.load_state(checkpoint) and state.is_world_process_zero:
            notice(f"{checkpoint}: has no averages; they begin anew at step {state.global_step}.")
        self._wrap_evaluate()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step of the optimizer."""
        assert self.averages is not None
        self.averages.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state of the averages, and the average, into the checkpoint that the Trainer has written."""
        assert self.averages is not None
        trial = getattr(self._trainer, "_trial", None)
        directory = Path(self._trainer._get_output_dir(trial=trial)) / f"checkpoint-{state.global_step}"
        self.averages.save_state(directory)
        if self._save:
            self._write(directory / AVERAGE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average, learned if it shall be, and let the Trainer evaluate its own weights again."""
        assert self.averages is not None
        self._unwrap_evaluate()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None  # as of the model
        if best is not None and not self.averages.load_state(best) and state.is_world_process_zero:
            notice(f"{best}: has no averages; those that are written are of the last step, not of the best checkpoint.")
        directory = Path(args.output_dir) / AVERAGE
        if self._learn is None:
            self._write(directory)
        elif len(self.averages.snapshot_steps) < 2:
            notice(
                f"TwaCallback: the window has {len(self.averages.snapshot_steps)} snapshots after {state.global_step} "
                "steps, and learning needs two: nothing is learned. Make window={'every': ..} smaller."
            )
        else:
            self._learn_and_write(directory, kwargs["train_dataloader"])

    def _wrap_evaluate(self) -> None:
        """Show the average in the Trainer's evaluations while it trains: it has no event before them."""
        trainer = self._trainer
        evaluate = self._evaluate = getattr(trainer.evaluate, "_of_trainer", trainer.evaluate)

        def with_average(*args: Any, **kwargs: Any) -> Any:
            assert self.averages is not None
            if self._showing or not _is_training(trainer) or not self.averages.has(self._which):
                return evaluate(*args, **kwargs)
            self._showing = True  # evaluations of several data sets call this again
            try:
                with self.averages.weights(self._which):
                    return evaluate(*args, **kwargs)
            finally:
                self._showing = False

        with_average._of_trainer = evaluate  # type: ignore[attr-defined]  # an error leaves the wrapper in the Trainer
        trainer.evaluate = with_average

    def _unwrap_evaluate(self) -> None:
        self._trainer.evaluate = self._evaluate

    def _write(self, directory: Path) -> None:
        """Let the Trainer save the average as it saves its model."""
        assert self.averages is not None
        if self.averages.has(self._which):
            with self.averages.weights(self._which):
                self._save_model(directory)

    def _save_model(self, directory: Path) -> None:
        """Let the Trainer save what the model holds; it writes nothing of FSDP's sharded state dicts."""
        self._trainer.save_model(str(directory), _internal_call=True)
        files = {path.name for path in directory.glob("*")} - {"training_args.bin"}
        written = any(name.endswith((".safetensors", ".bin")) for name in files)
        if self._trainer.args.should_save and not written:
            notice(
                f"{directory}: the Trainer has written no weights of the average there. With FSDP set "
                "fsdp_state_dict_type: FULL_STATE_DICT; with ZeRO-3 stage3_gather_16bit_weights_on_model_save: true."
            )

    def _learn_and_write(self, directory: Path, batches: Any) -> None:
        """Learn the coefficients of the window on batches of the training, and write the result."""
        assert self.averages is not None and self._evaluate is not None
        trainer = self._trainer
        with self.averages.learning(self._learn) as twa:
            self._steps(twa, _endless(batches))
            self._save_model(directory)
            if trainer.eval_dataset is not None:
                self._evaluate(metric_key_prefix="eval_average")

    def _steps(self, twa: TrainableAverage, batches: Iterator[Any]) -> None:
        trainer, args = self._trainer, self._trainer.args
        model, scaler = trainer.model_wrapped, getattr(trainer.accelerator, "scaler", None)
        deepspeed = hasattr(model, "backward")
        model.train()
        for step in range(1, self._learn_steps + 1):
            total = 0.0
            for _ in range(args.gradient_accumulation_steps):
                inputs = trainer._prepare_inputs(next(batches))
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(model, inputs)
                total += float(loss.detach()) / args.gradient_accumulation_steps
                if deepspeed:  # divides by itself, and counts micro-batches in each step
                    model.backward(loss)
                    twa.step()
                    twa.zero_grad()
                else:
                    scaled = loss / args.gradient_accumulation_steps
                    (scaler.scale(scaled) if scaler else scaled).backward()
            if not deepspeed:
                twa.step(scaler)
                twa.zero_grad()
                if scaler:
                    scaler.update()
            if step == self._learn_steps or step % max(int(args.logging_steps), 1) == 0:
                trainer.log({"twa_loss": total, "twa_step": step, "twa_lr": twa.optimizer.param_groups[0]["lr"]})


def _caller() -> tuple[Any, str | None]:
    """Return the Trainer whose loop is running, and the checkpoint that it resumes from.

    Callbacks are given its model without wrappers, which hides what shards it.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
    raise TwaError("TwaCallback: give it to a Trainer, as Trainer(.., callbacks=[TwaCallback(..)]).")


def _is_training(trainer: Any) -> bool:
    """Whether `trainer.train()` is running. An error that leaves it has no event."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == "train" and frame.f_locals.get("self") is trainer:
            return True
    return False


def _endless(batches: Any) -> Iterator[Any]:
    for epoch in count():
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(epoch)
        yield from batches
