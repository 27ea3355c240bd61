"""Averages in the Trainer of transformers, and in its subclasses such as those of TRL."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import transformers
from transformers import Trainer, TrainerCallback

from twa_scale.average.average import TrainableAverage
from twa_scale.average.coefficients import Which
from twa_scale.base.calls import running_calls
from twa_scale.base.notices import notice
from twa_scale.base.random_states import same_random_states
from twa_scale.errors import ConfigError, OutputError, StateError, TwaError
from twa_scale.integrations.averaging import LEARNED, Averaging, repeated
from twa_scale.integrations.coefficients import STATE as COEFFICIENTS
from twa_scale.integrations.coefficients import load_coefficients, save_coefficients
from twa_scale.integrations.logged_names import added_metrics_as
from twa_scale.integrations.saved_by_trainer import saves_shards, small_files_of
from twa_scale.output.overwriting import own_weight_files
from twa_scale.output.publish import check_target
from twa_scale.output.shared import require_shared

AVERAGE = "average"
"""The directory of an average, in a checkpoint and in the output directory."""
_KILLED = "If the training was killed while it wrote this checkpoint, resume from an earlier one."


class _CheckedCallback(TrainerCallback):  # type: ignore[misc]
    """The common part of the callbacks of transformers' Trainer."""

    _lightning_error: ClassVar[str]
    """The text of the error for Lightning's Trainer."""

    @property
    def state_key(self) -> NoReturn:
        """Raise an error, because only Lightning's Trainer reads this property."""
        raise ConfigError(
            f"{type(self).__name__} of twa_scale.integrations.transformers: Lightning's Trainer {self._lightning_error}"
        )

    def on_exception(self, *args: Any) -> None:
        """Do nothing. Lightning's Trainer calls this after the error."""

    def _running_trainer(self) -> tuple[Any, str | None]:
        """Return the Trainer whose loop is running, and the checkpoint from which it resumes.

        Callbacks receive its model without wrappers, and therefore not the sharded one.

        Raises:
            TwaError: no Trainer is running, or this version of transformers names the checkpoint in another way.
        """
        name = type(self).__name__
        for call in running_calls():
            if isinstance(trainer := call.f_locals.get("self"), Trainer):
                checkpoint = call.f_locals.get("resume_from_checkpoint")
                if checkpoint is None and trainer.state.global_step:
                    raise TwaError(
                        f"{name}: the Trainer resumes at step {trainer.state.global_step}, but transformers "
                        f"{transformers.__version__} does not show from which checkpoint. Use another version."
                    )
                return trainer, checkpoint
        raise TwaError(f"{name}: give it to a Trainer, as Trainer(.., callbacks=[{name}(..)]).")


class TwaCallback(Averaging, _CheckedCallback):
    """Keeps averages while a Trainer trains, with any engine.

    Evaluations use the average `evaluate_with`, so that the best checkpoint is the one with the best average. Each
    checkpoint gets the state of the averages, from which training resumes, and `average/`, which `from_pretrained`
    reads. When training ends, the average is written to `output_dir/average`: with `learn`, that of the snapshots with
    trained coefficients; with `load_best_model_at_end`, that of the best checkpoint. The Trainer keeps the trained
    weights, or with `load_best_model_at_end` those of the best checkpoint, which is reported when training starts.

    The arguments are those of `Averaging`. Metrics of the averages `evaluate_also` start with `eval_NAME`.
    """

    _trainer: Any = None
    _evaluate: Callable[..., dict[str, float]] | None = None
    _showing = False
    _lightning_error = "needs that of twa_scale.integrations.lightning."

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Create the averages of the model that the Trainer has wrapped, or load those of the checkpoint on resume."""
        self._trainer, checkpoint = self._running_trainer()
        if sum(isinstance(callback, TwaCallback) for callback in self._trainer.callback_handler.callbacks) > 1:
            raise ConfigError("TwaCallback: the Trainer has two, which would write the same files; give one.")
        averages = self._make(self._trainer.model_wrapped)
        if saves_shards(self._trainer):
            self._check_output(Path(args.output_dir), range(state.global_step + 1, state.max_steps + 1))
        if checkpoint is not None and not averages.load_state(checkpoint) and state.is_world_process_zero:
            notice(f"{checkpoint}: has no averages; new ones start at step {state.global_step}. {_KILLED}")
        self._wrap_evaluate()
        if state.is_world_process_zero:
            self._report_batchnorm(self._trainer.model_wrapped)
            self._report_window(state.max_steps - state.global_step)
            self._check_best(args)

    def _check_output(self, output: Path, steps: range) -> None:
        """Check that all ranks can write averages, and that `export` will replace those of an earlier training.

        Args:
            output: the output directory of the Trainer.
            steps: the steps of this training, which may write checkpoints.

        Raises:
            OutputError: on every rank; a directory holds an average that was not written with `export`, or ranks do not
                share a file system.
        """
        assert self.averages is not None
        pods = self.averages.pods
        require_shared(output, pods)
        with pods.agree():
            checkpoints = {path: path.name.rpartition("-")[2] for path in output.glob("checkpoint-*") if self._save}
            later = [path for path, step in checkpoints.items() if step.isdecimal() and int(step) in steps]
            for path in (directory / AVERAGE for directory in (output, *later)):
                if pods.rank == 0 and path.is_dir() and any(path.iterdir()) and not own_weight_files(path):
                    raise OutputError(
                        f"{path}: was not written by ranks together, but by a training that saved whole weights, and "
                        "is not replaced. Remove it, or choose another output_dir."
                    )
                if pods.rank == 0:
                    check_target(path, 0, overwrite=True)
        self._small_files()  # an error in them is raised now

    def _check_best(self, args: Any) -> None:
        """Report that the Trainer does not load the weights whose score selected the best checkpoint."""
        of_last = isinstance(self._which, str) and self._which == "last"
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        if not args.load_best_model_at_end or of_last or ("last" in self._also and metric.startswith("last_")):
            return
        if self._save:
            path = f"trainer.state.best_model_checkpoint + '/{AVERAGE}'"
        elif self._learn is None:
            path = f"{Path(args.output_dir) / AVERAGE}, which is written when training ends"
        else:
            path = "the checkpoint, which has it with TwaCallback(save=True)"
        notice(
            "TwaCallback: load_best_model_at_end=True chooses a checkpoint by the score of the average "
            f"{self._which!r}, but loads its trained weights into the model. Load the average from {path}."
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step of the optimizer, unless Accelerate reports that the loss scaler has skipped it."""
        assert self.averages is not None
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self.averages.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the state of the averages, and the average, to the checkpoint that the Trainer has written."""
        assert self.averages is not None
        directory = _checkpoint_of(self._trainer)
        if self._save:
            self._write(directory / AVERAGE)
        self.averages.save_state(directory)  # written last, so that a checkpoint with it is complete

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the average, with trained coefficients if `learn` is set. Later evaluations use the trained weights."""
        assert self.averages is not None
        self._unwrap_evaluate()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None  # as for the model
        if best is not None and not self.averages.load_state(best) and state.is_world_process_zero:
            notice(f"{best}: has no averages; those that are written are of the last step, not of the best checkpoint.")
        directory = Path(args.output_dir) / AVERAGE
        written = self._write(directory)
        if self._learn is not None:
            learn = partial(self._learn_and_write, directory, kwargs["train_dataloader"])
            self._learn_after(state.global_step, learn, written=written)

    def _wrap_evaluate(self) -> None:
        """Show the average in the Trainer's evaluations during training. The Trainer has no event before them."""
        trainer = self._trainer
        evaluate = self._evaluate = getattr(trainer.evaluate, "_without_average", trainer.evaluate)

        def with_average(*args: Any, **kwargs: Any) -> Any:
            if self._showing or not _is_training(trainer):
                return evaluate(*args, **kwargs)
            self._showing = True  # an evaluation on several data sets calls this again
            try:
                metrics = self._evaluated(evaluate, self._which, *args, **kwargs)
                self._evaluate_also(evaluate, *args, **kwargs)
                return metrics
            finally:
                self._showing = False

        with_average._without_average = evaluate  # type: ignore[attr-defined]  # an error leaves the wrapper in the Trainer
        trainer.evaluate = with_average

    def _evaluated(self, evaluate: Callable[..., Any], which: Which, *args: Any, **kwargs: Any) -> Any:
        """Return the metrics of an average; those of the trained weights if the average has no update yet."""
        assert self.averages is not None
        if not self.averages.has(which):
            return evaluate(*args, **kwargs)
        with self.averages.weights(which):
            return evaluate(*args, **kwargs)

    def _evaluate_also(
        self,
        evaluate: Callable[..., Any],
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> None:
        """Evaluate and log further averages with the Trainer, each with its own prefix. Training is not changed."""
        for name, label in self._further():
            prefix = f"{metric_key_prefix}_{label}"
            with added_metrics_as(self._trainer, prefix), same_random_states():
                self._evaluated(evaluate, name, eval_dataset, ignore_keys, prefix)

    def _unwrap_evaluate(self) -> None:
        self._trainer.evaluate = self._evaluate

    def _write(self, directory: Path) -> bool:
        """Save the average with the Trainer, as it saves its model. Return whether weights were written.

        If the Trainer saves its model in shards, each rank writes its part of the average.
        """
        assert self.averages is not None
        if not self.averages.has(self._which):
            return False
        if saves_shards(self._trainer):
            self.averages.export(directory, self._which, files=self._small_files(), overwrite=True)
            return True
        with self.averages.weights(self._which):
            written = self._save_model(directory)
        self._describe(directory, self.averages.origin(self._which), written=written)
        return written

    def _save_model(self, directory: Path) -> bool:
        """Save the weights in the model with the Trainer, and return whether it has written them."""
        self._trainer.save_model(str(directory), _internal_call=True)
        files = {path.name for path in directory.rglob("*")} - {"training_args.bin"}
        written = any(name.endswith((".safetensors", ".bin")) for name in files)
        if self._trainer.args.should_save and not written:
            notice(
                f"{directory}: the Trainer has written no weights of the average there. Look at what its save_model "
                "writes."
            )
        return written

    def _small_files(self) -> dict[str, bytes]:
        """Return the files that the Trainer saves next to weights, on the first rank. Collective."""
        assert self.averages is not None
        with self.averages.pods.agree():
            return small_files_of(self._trainer) if self.averages.pods.rank == 0 else {}

    def _learn_and_write(self, directory: Path, batches: Any, begin_writing: Callable[[], None]) -> None:
        """Train the coefficients of the window on training batches, and write the result after `begin_writing()`."""
        assert self.averages is not None and self._evaluate is not None
        trainer = self._trainer
        files = self._small_files() if saves_shards(trainer) else None
        with self.averages.learning(self._learn, files=files) as twa:
            self._steps(twa, batches)
            if trainer.eval_dataset is not None:
                with added_metrics_as(trainer, "eval_average"):
                    self._evaluate(metric_key_prefix="eval_average")
            begin_writing()
            if saves_shards(trainer):
                twa.export(directory, overwrite=True)
            else:
                written = self._save_model(directory)
                self._describe(directory, twa.origin(LEARNED), written=written)

    def _steps(self, twa: TrainableAverage, batches: Any) -> None:
        trainer, args = self._trainer, self._trainer.args
        model = trainer.model_wrapped
        model.train()

        def loss(batch: Any) -> Any:
            inputs = trainer._prepare_inputs(batch)
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, inputs)

        with added_metrics_as(trainer, "twa"):
            self._train_coefficients(
                twa,
                model,
                repeated(batches, getattr(batches, "set_epoch", lambda _: None)),
                loss,
                accumulate=args.gradient_accumulation_steps,
                scaler=getattr(trainer.accelerator, "scaler", None),
                log_every=int(trainer.state.logging_steps),  # in the arguments, it may be a fraction of the steps
                log=trainer.log,
            )


class CoefficientsCallback(_CheckedCallback):
    """Saves the coefficients that a Trainer trains as its optimizer in its checkpoints, and resumes from them.

    Without it, they are in the state of the optimizer, and `load_best_model_at_end` loads weights without their
    coefficients, so that an export has none. It is required with `groups: tensor+row` on several ranks,
    because the Trainer saves the state of the optimizer of one rank only. With it, each rank writes its own rows.

    Args:
        twa: the average whose `as_optimizer()` is the optimizer of the Trainer.
    """

    _lightning_error = "asks every rank for the state of its optimizers. Leave the callback out."

    def __init__(self, twa: TrainableAverage) -> None:
        self._twa = twa
        self.saves = twa.optimizer
        """The optimizer whose state is saved by this callback."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On resume, continue from the coefficients in the checkpoint.

        Raises:
            StateError: on every rank; the checkpoint has no coefficients, only some ranks see them, or they belong to
                another average.
        """
        self._trainer, checkpoint = self._running_trainer()
        if checkpoint is not None and not load_coefficients(self._twa, Path(checkpoint)):
            raise StateError(
                f"{checkpoint}: has no {COEFFICIENTS}, which CoefficientsCallback writes. Resume from a checkpoint "
                f"that was written with it, or leave the callback out if this one was written without it. {_KILLED}"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the coefficients to the checkpoint."""
        save_coefficients(self._twa, _checkpoint_of(self._trainer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With `load_best_model_at_end`, load the coefficients of the best checkpoint, as the Trainer its weights."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            load_coefficients(self._twa, Path(state.best_model_checkpoint))


def _checkpoint_of(trainer: Any) -> Path:
    """Return the directory of the checkpoint that a Trainer has just written."""
    return (
        Path(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))
        / f"checkpoint-{trainer.state.global_step}"
    )


def _is_training(trainer: Any) -> bool:
    """Return whether `trainer.train()` is running. The Trainer has no event for an error in it."""
    return any(call.f_code.co_name == "train" and call.f_locals.get("self") is trainer for call in running_calls())
