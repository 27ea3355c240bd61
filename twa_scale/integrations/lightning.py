"""Averages in Lightning's Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from inspect import signature
from math import inf
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.hooks import RemovableHandle

try:
    from lightning.fabric.utilities.data import _set_sampler_epoch
    from lightning.pytorch import Callback
except ImportError:  # the same classes in separate packages
    from lightning_fabric.utilities.data import _set_sampler_epoch
    from pytorch_lightning import Callback

from twa_scale.average.coefficients import Which
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError, StateError, TwaError
from twa_scale.integrations.averaging import LEARNED, Averaging, repeated
from twa_scale.integrations.counting import count_steps
from twa_scale.integrations.lightning_checkpoint import FILE, copied, directory_for_average, directory_of, states_of_all
from twa_scale.integrations.lightning_validation import validate_once_more
from twa_scale.running import RunningAverages

KEY = "twa_scale"
"""The key of the averages in a checkpoint: the "states" of all ranks, and the "average", a state dict of the model."""


class TwaCallback(Averaging, Callback):  # type: ignore[misc]
    """Keeps averages while Lightning's Trainer trains, with any strategy.

    Validations evaluate the average `evaluate_with`, so that a `ModelCheckpoint` that monitors them keeps the
    checkpoint with the best average. Each checkpoint holds the trained weights, the state of the averages, from which
    training resumes, and the average. When training ends, `average_path` is a checkpoint of the average, which
    `load_from_checkpoint` reads. With `learn`, it is the average of the snapshots with trained coefficients. The model
    keeps the trained weights.

    The arguments are those of `Averaging`. Metrics of the averages `evaluate_also`, which are evaluated before
    `evaluate_with`, start with `NAME_`, and those of the learned average with `average_`. Each step of an optimizer
    counts, as in Trainer's `global_step`.
    """

    _trainer: Any = None
    _resumed: Any = None
    _shown: AbstractContextManager[None] | None = None
    _validates: Which | None = None
    _validate: Callable[[], Any] | None = None
    _has_begun = False
    _is_training = False
    _counts: Sequence[RemovableHandle] = ()
    average_path: Path | None = None
    """The checkpoint of the average after the end of training."""

    def on_init_end(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise an error, because only transformers' Trainer calls this method."""
        raise ConfigError(
            "TwaCallback of twa_scale.integrations.lightning: transformers' Trainer needs that of "
            "twa_scale.integrations.transformers."
        )

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Check the settings before training starts. Lightning itself refuses two callbacks of this class."""
        if stage != "fit":
            return
        for callback in trainer.callbacks:
            names = {cls.__name__ for cls in type(callback).__mro__}
            if names & {"WeightAveraging", "StochasticWeightAveraging"}:
                raise ConfigError(
                    f"TwaCallback: {type(callback).__name__} also writes averages into the model, so that both would "
                    "overwrite each other; give only one of them."
                )
        if self._learn is not None:
            self._require_loss(pl_module)
        self._wrap_fit(trainer, pl_module)

    def _require_loss(self, pl_module: Any) -> None:
        if not pl_module.automatic_optimization or "dataloader_iter" in signature(pl_module.training_step).parameters:
            raise ConfigError(
                "TwaCallback: learn needs a training_step that returns the loss of a batch. With manual optimization, "
                "or dataloader_iter, it takes the optimizers' steps itself. Leave learn out, and call "
                "callback.averages.learn(..) in your own loop."
            )

    def _wrap_fit(self, trainer: Any, pl_module: Any) -> None:
        """End a training that resumes from the checkpoint of its last step, for which Lightning's loop does nothing."""
        loop = trainer.fit_loop
        fit = getattr(loop.run, "_of_trainer", loop.run)

        def fit_and_end() -> None:
            self._has_begun = False
            fit()
            resumed = self._resumed is not None or (trainer.ckpt_path and Path(trainer.ckpt_path).is_dir())
            if resumed and not self._has_begun and trainer.limit_train_batches:
                self.on_train_start(trainer, pl_module)
                self.on_train_end(trainer, pl_module)

        fit_and_end._of_trainer = fit  # type: ignore[attr-defined]  # for the next `fit`
        loop.run = fit_and_end

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the averages of the model that the strategy has wrapped, or load those of the checkpoint on resume."""
        self._has_begun = True
        before = self.averages if trainer is self._trainer else None
        self._trainer = trainer
        averages = self._make(trainer.strategy.model)
        if trainer.global_step and not self._continued(averages, before) and trainer.is_global_zero:
            notice(f"TwaCallback: the checkpoint has no averages; new ones start at step {trainer.global_step}.")
        self._counts = count_steps(averages.step, trainer.optimizers)
        self._is_training = True
        self._wrap_validation()
        total = trainer.estimated_stepping_batches  # on each rank, because it may set up data
        if trainer.is_global_zero and not trainer.fast_dev_run:
            self._report_batchnorm(trainer.strategy.model)
            if pl_module.automatic_optimization and total < inf:
                self._report_window(int(total) - trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Count a step if the optimizers do not. DeepSpeed has its own count."""
        assert self.averages is not None
        if not self._counts:
            self.averages.step()

    @torch.inference_mode(False)
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Show the average in validations during training."""
        if not self._is_training or trainer.sanity_checking or self._validates is None:
            return
        assert self.averages is not None
        if self.averages.has(self._validates):
            self._shown = self.averages.weights(self._validates)
            self._shown.__enter__()

    @torch.inference_mode(False)
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Restore the trained weights."""
        context, self._shown = self._shown, None
        if context is not None:
            context.__exit__(None, None, None)

    def _wrap_validation(self) -> None:
        """Validate further averages before the Trainer validates, so that callbacks can monitor all metrics."""
        loop = self._trainer.fit_loop.epoch_loop.val_loop
        validate = self._validate = getattr(loop.run, "_of_trainer", loop.run)
        self._validates = self._which

        def with_further() -> Any:
            if self._is_training and not self._trainer.sanity_checking:
                metrics: dict[str, Any] = {}
                for name, label in self._further():
                    metrics |= self._validated(name, label)
                self._trainer.callback_metrics.update(metrics)
            return validate()

        with_further._of_trainer = validate  # type: ignore[attr-defined]  # an error leaves the wrapper in the loop
        loop.run = with_further

    def _unwrap_validation(self) -> None:
        if self._validate is not None:
            self._trainer.fit_loop.epoch_loop.val_loop.run = self._validate

    def _validated(self, which: Which | None, label: str) -> dict[str, Any]:
        """Return the metrics of one average, or of the weights in the model, with the prefix."""
        assert self._validate is not None
        self._validates, before = which, self._validates
        try:
            return validate_once_more(self._trainer, self, self._validate, label)
        finally:
            self._validates = before

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps. With it, Lightning reports if a resumed training lacks this callback."""
        return {"steps": self.averages.num_steps if self.averages else 0}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the state of the averages, and the average, to the checkpoint."""
        if self.averages is None:
            return
        if self._shown is not None:
            raise TwaError(
                "save_checkpoint() in a validation would save the average as the trained weights. Save it afterwards, "
                "or with a ModelCheckpoint."
            )
        if self.averages.lost:
            raise TwaError(f"save_checkpoint(): {self.averages.lost}")
        save = self._save and self._is_training and self.averages.has(self._which)
        directory = directory_of(trainer)
        if directory is not None:
            self.averages.save_state(directory)
            if save:
                with self.averages.weights(self._which):
                    trainer.save_checkpoint(directory / FILE, weights_only=True)
            return
        saved: dict[str, Any] = {"states": states_of_all(self.averages.state_dict())}
        if save:
            with self.averages.weights(self._which):
                state_dict = trainer.strategy.lightning_module_state_dict()
                if trainer.is_global_zero:
                    saved["average"] = copied(state_dict)
        checkpoint[KEY] = saved

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the state of this rank until the averages are created."""
        if trainer.state.fn != "fit" or KEY not in checkpoint:
            return
        states = checkpoint[KEY]["states"]
        if len(states) != trainer.world_size:
            raise StateError(
                f"{trainer.ckpt_path}: holds the averages of {len(states)} ranks, and there are {trainer.world_size}. "
                f"Resume with the same number, or remove {KEY!r} from the checkpoint to start new averages."
            )
        self._resumed = states[trainer.global_rank]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the average, with trained coefficients if `learn` is set."""
        averages = self.averages
        assert averages is not None
        self._stop_counting()
        self._unwrap_validation()
        if trainer.fast_dev_run:  # nothing is written
            return
        path = directory_for_average(trainer) / FILE
        if written := averages.has(self._which):
            with averages.weights(self._which):
                self._save_average(path, averages.origin(self._which))
        if self._learn is not None:
            learn = partial(self._learn_and_write, trainer, pl_module, path)
            self._learn_after(trainer.global_step, learn, written=written)

    def _learn_and_write(self, trainer: Any, pl_module: Any, path: Path, begin_writing: Callable[[], None]) -> None:
        """Train the coefficients of the window on training batches, and write the result after `begin_writing()`."""
        assert self.averages is not None and self._learn is not None
        with self.averages.learning(self._learn) as twa:
            with _not_logging(pl_module):
                self._train_coefficients(
                    twa,
                    trainer.strategy.model,
                    enumerate(_batches(trainer)),
                    _loss(trainer, pl_module),
                    accumulate=trainer.accumulate_grad_batches,
                    scaler=getattr(trainer.precision_plugin, "scaler", None),
                    log_every=trainer.log_every_n_steps,
                    log=self._log,
                )
            if trainer.enable_validation:
                trainer.callback_metrics.update(self._validated(None, "average"))
            begin_writing()
            self._save_average(path, twa.origin(LEARNED))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Restore the trained weights, and count no more steps.

        A checkpoint that is written now gets no average, because writing it may raise the same error again.
        """
        self._stop_counting()
        self._is_training = False
        context, self._shown = self._shown, None
        if context is not None:
            with suppress(type(exception), TwaError), torch.inference_mode(False):  # Lightning raises the first error
                context.__exit__(type(exception), exception, exception.__traceback__)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Use only the trained weights in later validations and checkpoints."""
        self._is_training = False
        self._unwrap_validation()

    def _stop_counting(self) -> None:
        for handle in self._counts:
            handle.remove()
        self._counts = ()

    def _save_average(self, path: Path, origin: Mapping[str, Any]) -> None:
        """Save the weights in the model with the Trainer, and write their description."""
        self._trainer.save_checkpoint(path, weights_only=True)
        self._describe(path.parent, origin, ["pytorch-lightning"])
        self.average_path = path

    def _log(self, values: dict[str, float]) -> None:
        step = self._trainer.global_step + int(values["twa_step"])
        for logger in self._trainer.loggers:
            logger.log_metrics(values, step=step)

    def _continued(self, averages: RunningAverages, before: RunningAverages | None) -> bool:
        """Continue from a checkpoint, or from the averages of an earlier `fit`, and return whether there were any."""
        state, self._resumed = self._resumed, None
        path = self._trainer.ckpt_path
        if state is None and path and Path(path).is_dir():
            return averages.load_state(path)
        if state is None and before is not None and not path:
            state = before.state_dict()
        if state is not None:
            averages.load_state_dict(state)
        return state is not None


def _batches(trainer: Any) -> Iterator[Any]:
    """Return the batches of the epochs after those of the training."""
    loader = trainer.fit_loop._combined_loader
    # It also counts the epoch in which a checkpoint was written.
    has_started = trainer.fit_loop.epoch_progress.current.started

    def set_epoch(epoch: int) -> None:
        for dataloader in loader.flattened:
            _set_sampler_epoch(dataloader, has_started + epoch)

    return repeated(loader, set_epoch)


def _loss(trainer: Any, pl_module: Any) -> Callable[[Any], torch.Tensor]:
    """Return a function of a numbered batch that returns the loss as the Trainer's loop computes it."""
    takes_index = len(signature(pl_module.training_step).parameters) > 1

    def loss(numbered: Any) -> torch.Tensor:
        i, (batch, *_) = numbered
        batch = trainer.precision_plugin.convert_input(batch)
        batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        output = trainer.strategy.training_step(*((batch, i) if takes_index else (batch,)))
        value = output["loss"] if isinstance(output, Mapping) else output
        if not isinstance(value, torch.Tensor):
            raise TwaError("TwaCallback: training_step has returned no loss, which the training of coefficients needs.")
        return value

    return loss


@contextmanager
def _not_logging(pl_module: Any) -> Iterator[None]:
    """Disable `self.log` in training_step, because Lightning raises an error for it after the end of training."""
    pl_module.log = lambda *_, **__: None
    try:
        yield
    finally:
        del pl_module.log
