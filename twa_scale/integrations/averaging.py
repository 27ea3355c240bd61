"""The common part of the callbacks of all trainers: settings, averages, and the training of coefficients."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from twa_scale.average.average import TrainableAverage
from twa_scale.average.batchnorm import batchnorm_layers
from twa_scale.average.coefficients import Which
from twa_scale.average.measures import DISTANCE
from twa_scale.base.notices import notice
from twa_scale.config import TwaConfig, validated
from twa_scale.errors import ConfigError, TwaError
from twa_scale.output.add_provenance import add_provenance
from twa_scale.running import RunningAverages
from twa_scale.running.settings import EmaOption, WindowOption, ema_settings, window_settings

LEARNED = "the learned average of a window of snapshots"
"""The name in the provenance of an average that a callback has trained with `learn`."""


class Averaging:
    """The settings of a callback, and its averages.

    Args:
        ema: as for `RunningAverages`.
        window: as for `RunningAverages`.
        device: as for `RunningAverages`.
        evaluate_with: the average that is evaluated, as for `RunningAverages.weights`. "auto" is the first exponential
            average, or the mean of the window without one; "last" are the trained weights.
        evaluate_also: further averages that are evaluated as soon as they exist. Their metrics have the name as a
            prefix, with hyphens instead of colons.
        learn: the settings of the trainable average over the window, as for `attach`, which is trained when training
            ends.
        learn_steps: the number of its steps, each on as many batches as a step of the optimizer.
        save: whether to save the average with each checkpoint.

    Raises:
        ConfigError: names the setting.
    """

    def __init__(
        self,
        *,
        ema: EmaOption | None = None,
        window: WindowOption | None = None,
        device: str = "auto",
        evaluate_with: Which = "auto",
        evaluate_also: Sequence[str] = (),
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
        if isinstance(evaluate_also, str) or not all(isinstance(name, str) for name in evaluate_also):
            raise ConfigError(f"evaluate_also: {evaluate_also!r}; give a list of names, such as ['last', 'mean'].")
        self._also = list(evaluate_also)
        self._save = save
        self.averages: RunningAverages | None = None
        """The averages, created when training starts."""

    def _make(self, model: Any) -> RunningAverages:
        """Create the averages of a model that the trainer has wrapped. Collective.

        Raises:
            ConfigError, EngineError: on every rank, also for settings that `learn` would refuse when training ends.
        """
        averages = RunningAverages(model, ema=self._ema, window=self._window, device=self._device)
        if self._learn is not None:
            averages.check_learn(self._learn)
        for which in (self._which, *self._also):
            averages.has(which)  # raises an error for an unknown name now, not at the first evaluation
        self.averages = averages
        return averages

    def _describe(
        self, directory: Path, origin: Mapping[str, Any], tags: Sequence[str] = (), *, written: bool = True
    ) -> None:
        """Write the provenance and a model card next to an average, if the first rank has written it. Collective."""
        assert self.averages is not None
        with self.averages.pods.agree():
            if self.averages.pods.rank == 0 and written:
                add_provenance(directory, origin, tags)

    def _further(self) -> Iterator[tuple[str, str]]:
        """Yield the further averages that exist, each with its prefix."""
        assert self.averages is not None
        for name in self._also:
            if self.averages.has(name):
                yield name, name.replace(":", "-")

    def _report_batchnorm(self, model: Any) -> None:
        """Report BatchNorm statistics that do not belong to the averages. Call it on one rank."""
        if batchnorm_layers(model) and not (self._ema and self._ema.use_buffers):
            notice(
                "TwaCallback: averages of this model are evaluated and saved with the BatchNorm statistics of the "
                "trained weights, which can make them look worse. Set ema={'decays': [..], 'use_buffers': True}, or "
                "call torch.optim.swa_utils.update_bn on a saved average."
            )

    def _report_window(self, remaining: int) -> None:
        """Report a window that will have too few snapshots when training ends. Call it on one rank.

        Args:
            remaining: the number of steps of the optimizer until training ends.
        """
        assert self.averages is not None
        if self._window is None:
            return
        steps = self.averages.num_steps + remaining
        count = self._window.taken_by(steps)
        if count < (1 if self._learn is None else 2):
            lost = (
                "there will be no average of it"
                if self._learn is None
                else "learning needs two: nothing will be learned"
            )
            notice(
                f"TwaCallback: training ends at step {steps}, when the window has {count} snapshots of "
                f"{{'every': {self._window.every}}}, and {lost}. Make `every` or `start_step` smaller."
            )

    def _learn_after(self, steps: int, learn: Callable[[Callable[[], None]], None], *, written: bool) -> None:
        """Call `learn` if the window has enough snapshots. An error in it does not end a training that has succeeded.

        Args:
            steps: the steps of the training.
            learn: trains the coefficients, calls its argument, and writes the average.
            written: whether this rank has written an average, which `learn` replaces.

        Raises:
            Exception: an error of `learn` while it writes, or after which the trained weights are lost.
        """
        assert self.averages is not None
        count = len(self.averages.snapshot_steps)
        is_writing = False

        def begin_writing() -> None:
            nonlocal is_writing
            is_writing = True

        if count < 2:
            why = (
                f"the window has {count} snapshots after {steps} steps, and learning needs two: nothing is learned. "
                "Make window={'every': ..} smaller."
            )
        else:
            try:
                learn(begin_writing)
                return
            except Exception as error:
                if is_writing or not self.averages.has_trained_weights:
                    raise
                text = str(error) if isinstance(error, TwaError) else traceback.format_exc()
                why = f"no learned average was written, because of an error. {text}"
        if self.averages.pods.rank == 0:
            before = f" The average {self._which!r} was written before." if written else ""
            notice(f"TwaCallback: {why}{before}")

    def _train_coefficients(
        self,
        twa: TrainableAverage,
        model: Any,
        batches: Iterator[Any],
        loss: Callable[[Any], torch.Tensor],
        *,
        accumulate: int,
        scaler: torch.amp.GradScaler | None,
        log_every: int,
        log: Callable[[dict[str, float]], None],
    ) -> None:
        """Take the steps of the coefficients. Collective.

        Args:
            twa: the average.
            model: the model that the trainer has wrapped. DeepSpeed's engine has its own `backward`.
            batches: the batches from `repeated`.
            loss: returns the loss of a batch.
            accumulate: the number of batches of a step.
            scaler: the scaler of the loss.
            log_every: the number of steps between two calls of `log`. The last step is also logged.
            log: called with the loss, the step, the learning rate, and measures of the coefficients.

        Raises:
            TwaError: the batches of a rank have ended; on every rank.
        """
        for step in range(1, self._learn_steps + 1):
            step_batches = list(islice(batches, accumulate))  # collective, if a rank reads for the others
            with twa.pods.agree():  # ranks may hold different numbers of batches
                _require_all(step_batches, accumulate)
            if hasattr(model, "set_gradient_accumulation_boundary"):
                total = _deepspeed_step(twa, model, step_batches, loss)
            else:
                total = _step(twa, step_batches, loss, scaler)
            if step == self._learn_steps or step % max(log_every, 1) == 0:
                values = {"twa_loss": total, "twa_step": step, "twa_lr": twa.optimizer.param_groups[0]["lr"]}
                of_average = {**twa.described(), DISTANCE: twa.distance()}
                log(values | {f"twa_{name}": value for name, value in of_average.items()})


def _step(
    twa: TrainableAverage,
    batches: Sequence[Any],
    loss: Callable[[Any], torch.Tensor],
    scaler: torch.amp.GradScaler | None,
) -> float:
    """Take a step with the mean of the losses of `batches`, and return this mean. Collective."""
    total = 0.0
    for batch in batches:
        value = loss(batch)
        total += float(value.detach()) / len(batches)
        scaled = value / len(batches)
        (scaler.scale(scaled) if scaler else scaled).backward()
    twa.step(scaler)
    twa.zero_grad()
    if scaler:
        scaler.update()
    return total


def _deepspeed_step(
    twa: TrainableAverage, model: Any, batches: Sequence[Any], loss: Callable[[Any], torch.Tensor]
) -> float:
    """Take a step as `_step` does with DeepSpeed's engine, which divides the losses and counts micro-batches itself."""
    total = 0.0
    for i, batch in enumerate(batches):
        # Trainers may have set another boundary of the accumulation, which is restored with the trained weights.
        model.set_gradient_accumulation_boundary(i == len(batches) - 1)
        value = loss(batch)
        total += float(value.detach()) / len(batches)
        model.backward(value)
        twa.step()
        twa.zero_grad()
    return total


def repeated(batches: Iterable[Any], set_epoch: Callable[[int], None]) -> Iterator[Any]:
    """Yield the batches of one epoch after another, until an epoch has none.

    Args:
        batches: the batches of an epoch.
        set_epoch: called with the number of each epoch, from 0, before its batches.
    """
    for epoch in count():
        set_epoch(epoch)
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty:
            return


def _require_all(batches: list[Any], accumulate: int) -> None:
    """Check that there are enough batches for a step.

    Raises:
        TwaError: there are not enough batches.
    """
    if len(batches) < accumulate:
        raise TwaError(
            "TwaCallback: the training data yields no more batches, and learning goes through it again. Give a data "
            "set whose __iter__ starts at its beginning each time, or leave learn out, and call "
            "callback.averages.learn(..) in your own loop."
        )
