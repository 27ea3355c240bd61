"""Averages in the Trainer of transformers, and in those that are made from it, as TRL's are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from transformers import Trainer, TrainerCallback

from twa_scale.average.average import TrainableAverage
from twa_scale.average.coefficients import Which
from twa_scale.base.calls import running_calls
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError, StateError, TwaError
from twa_scale.integrations.averaging import LEARNED, Averaging, repeated
from twa_scale.integrations.coefficients import STATE as COEFFICIENTS
from twa_scale.integrations.coefficients import load_coefficients, save_coefficients
from twa_scale.integrations.logged_names import added_metrics_as

AVERAGE = "average"
"""The directory of an average, in a checkpoint and in the output directory."""
_KILLED = "If the training was killed while it wrote this checkpoint, resume from an earlier one."


class _OfTrainer(TrainerCallback):  # type: ignore[misc]
    """What callbacks of transformers' Trainer share."""

    _in_lightning: ClassVar[str]
    """What Lightning's Trainer needs."""

    @property
    def state_key(self) -> NoReturn:
        """Refuse Lightning's Trainer, which asks for this first."""
        raise ConfigError(
            f"{type(self).__name__} of twa_scale.integrations.transformers: Lightning's Trainer {self._in_lightning}"
        )

    def on_exception(self, *args: Any) -> None:
        """Do nothing: Lightning's Trainer calls this after the error."""

    def _caller(self) -> tuple[Any, str | None]:
        """Return the Trainer whose loop is running, and the checkpoint that it resumes from.

        Callbacks are given its model without wrappers, which hides what shards it.
        """
        for call in running_calls():
            if isinstance(trainer := call.f_locals.get("self"), Trainer):
                return trainer, call.f_locals.get("resume_from_checkpoint")
        name = type(self).__name__
        raise TwaError(f"{name}: give it to a Trainer, as Trainer(.., callbacks=[{name}(..)]).")


class TwaCallback(Averaging, _OfTrainer):
    """Keeps averages while a Trainer trains, with whatever engine it has chosen.

    Evaluations are of the average `evaluate_with`, so that the best checkpoint is the one with the best average. Each
    checkpoint gets the state of the averages, from which training resumes, and `average/`, which `from_pretrained`
    reads. When training ends, `output_dir/average` is the average: with `learn`, of the snapshots with learned
    coefficients; of the best checkpoint with `load_best_model_at_end`. The Trainer keeps the trained weights; with
    `load_best_model_at_end` those of the best checkpoint, which is reported when training begins.

    The arguments are those of `Averaging`. Metrics of the averages `evaluate_also` begin with `eval_NAME`.
    """

    _trainer: Any = None
    _evaluate: Callable[..., dict[str, float]] | None = None
    _showing = False
    _in_lightning = "needs the one of twa_scale.integrations.lightning."

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the averages of the model as the Trainer has wrapped it; on resume, go on from the checkpoint's."""
        self._trainer, checkpoint = self._caller()
        if sum(isinstance(callback, TwaCallback) for callback in self._trainer.callback_handler.callbacks) > 1:
            raise ConfigError("TwaCallback: the Trainer has two, which would write the same files; give one.")
        averages = self._make(self._trainer.model_wrapped)
        if checkpoint is not None and not averages.load_state(checkpoint) and state.is_world_process_zero:
            notice(f"{checkpoint}: has no averages; they begin anew at step {state.global_step}. {_KILLED}")
        self._wrap_evaluate()
        if state.is_world_process_zero:
            self._check_window(state.max_steps - state.global_step)
            self._check_best(args)

    def _check_best(self, args: Any) -> None:
        """Report that the Trainer loads other weights than those whose score has chosen the best checkpoint."""
        of_last = isinstance(self._which, str) and self._which == "last"
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        if not args.load_best_model_at_end or of_last or ("last" in self._also and metric.startswith("last_")):
            return
        if self._save:
            where = f"trainer.state.best_model_checkpoint + '/{AVERAGE}'"
        elif self._learn is None:
            where = f"{Path(args.output_dir) / AVERAGE}, which is written when training ends"
        else:
            where = "the checkpoint, which has it with TwaCallback(save=True)"
        notice(
            "TwaCallback: load_best_model_at_end=True chooses a checkpoint by the score of the average "
            f"{self._which!r}, but loads its trained weights into the model. Load the average from {where}."
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step of the optimizer, unless Accelerate knows that the loss scaler has skipped it."""
        assert self.averages is not None
        if not self._trainer.accelerator.optimizer_step_was_skipped:
            self.averages.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state of the averages, and the average, into the checkpoint that the Trainer has written."""
        assert self.averages is not None
        directory = _checkpoint_of(self._trainer)
        if self._save:
            self._write(directory / AVERAGE)
        self.averages.save_state(directory)  # last: a checkpoint that has it is whole

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
        elif self._can_learn(state.global_step):
            self._learn_and_write(directory, kwargs["train_dataloader"])

    def _wrap_evaluate(self) -> None:
        """Show the average in the Trainer's evaluations while it trains: it has no event before them."""
        trainer = self._trainer
        evaluate = self._evaluate = getattr(trainer.evaluate, "_of_trainer", trainer.evaluate)

        def with_average(*args: Any, **kwargs: Any) -> Any:
            if self._showing or not _is_training(trainer):
                return evaluate(*args, **kwargs)
            self._showing = True  # evaluations of several data sets call this again
            try:
                metrics = self._evaluated(evaluate, self._which, *args, **kwargs)
                self._evaluate_also(evaluate, *args, **kwargs)
                return metrics
            finally:
                self._showing = False

        with_average._of_trainer = evaluate  # type: ignore[attr-defined]  # an error leaves the wrapper in the Trainer
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
        """Let the Trainer evaluate and log further averages, each with a prefix of its own."""
        for name, label in self._further():
            prefix = f"{metric_key_prefix}_{label}"
            with added_metrics_as(self._trainer, prefix):
                self._evaluated(evaluate, name, eval_dataset, ignore_keys, prefix)

    def _unwrap_evaluate(self) -> None:
        self._trainer.evaluate = self._evaluate

    def _write(self, directory: Path) -> None:
        """Let the Trainer save the average as it saves its model."""
        assert self.averages is not None
        if self.averages.has(self._which):
            with self.averages.weights(self._which):
                written = self._save_model(directory)
            self._describe(directory, self.averages.origin(self._which), written=written)

    def _save_model(self, directory: Path) -> bool:
        """Let the Trainer save what the model holds, and return whether it has.

        It writes nothing of FSDP's sharded state dicts.
        """
        self._trainer.save_model(str(directory), _internal_call=True)
        files = {path.name for path in directory.glob("*")} - {"training_args.bin"}
        written = any(name.endswith((".safetensors", ".bin")) for name in files)
        if self._trainer.args.should_save and not written:
            notice(
                f"{directory}: the Trainer has written no weights of the average there. With FSDP set "
                "fsdp_state_dict_type: FULL_STATE_DICT; with ZeRO-3 stage3_gather_16bit_weights_on_model_save: true."
            )
        return written

    def _learn_and_write(self, directory: Path, batches: Any) -> None:
        """Learn the coefficients of the window on batches of the training, and write the result."""
        assert self.averages is not None and self._evaluate is not None
        trainer = self._trainer
        with self.averages.learning(self._learn) as twa:
            self._steps(twa, batches)
            written = self._save_model(directory)
            self._describe(directory, twa.origin(LEARNED), written=written)
            if trainer.eval_dataset is not None:
                with added_metrics_as(trainer, "eval_average"):
                    self._evaluate(metric_key_prefix="eval_average")

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
                log_every=int(trainer.state.logging_steps),  # of the arguments it may be a fraction of the steps
                log=trainer.log,
            )


class CoefficientsCallback(_OfTrainer):
    """Puts the coefficients that a Trainer trains as its optimizer into its checkpoints, and resumes from them.

    Without it the state of the optimizer has them. It is needed with `groups: tensor+row` on several ranks: the Trainer
    asks only one of them for the state of its optimizer. With it each rank writes the rows that it owns.

    Args:
        twa: the average, whose `as_optimizer()` the Trainer has.
    """

    _in_lightning = "asks every rank for the state of its optimizers. Leave the callback out."

    def __init__(self, twa: TrainableAverage) -> None:
        self._twa = twa
        self.saves = twa.optimizer
        """The optimizer, which leaves its state to a callback that the Trainer has."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On resume, continue from the coefficients in the checkpoint.

        Raises:
            StateError: on every rank; it has none, only some ranks see them, or they are those of another average.
        """
        self._trainer, checkpoint = self._caller()
        if checkpoint is not None and not load_coefficients(self._twa, Path(checkpoint)):
            raise StateError(
                f"{checkpoint}: has no {COEFFICIENTS}, which CoefficientsCallback writes. Resume from a checkpoint "
                f"that was written with it, or leave the callback out if this one was written without it. {_KILLED}"
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the coefficients into the checkpoint."""
        save_coefficients(self._twa, _checkpoint_of(self._trainer))


def _checkpoint_of(trainer: Any) -> Path:
    """Return the directory of the checkpoint that a Trainer has just written."""
    return (
        Path(trainer._get_output_dir(trial=getattr(trainer, "_trial", None)))
        / f"checkpoint-{trainer.state.global_step}"
    )


def _is_training(trainer: Any) -> bool:
    """Whether `trainer.train()` is running. An error that leaves it has no event."""
    return any(call.f_code.co_name == "train" and call.f_locals.get("self") is trainer for call in running_calls())
