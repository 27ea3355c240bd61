"""Averages in training loops with Accelerate."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DeepSpeedEngineWrapper, DeepSpeedOptimizerWrapper
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from twa_scale.average.average import TrainableAverage
from twa_scale.average.state.rows_file import remove_rows
from twa_scale.base.notices import notice
from twa_scale.errors import ConfigError, StateError, TwaError
from twa_scale.integrations.coefficients import named_rows, read_state
from twa_scale.integrations.counting import count_steps
from twa_scale.running import RunningAverages
from twa_scale.running.settings import EmaOption, WindowOption


def prepare(
    accelerator: Accelerator,
    model: Any,
    *,
    ema: EmaOption | None = None,
    window: WindowOption | None = None,
    device: str = "auto",
    name: str = "averages",
) -> RunningAverages:
    """Return averages that count the steps of the model's optimizer automatically. Collective.

    `accelerator.save_state` also saves them, and `load_state` continues from them.

    Args:
        accelerator: the accelerator that has prepared the model and its optimizer.
        model: the model that `accelerator.prepare` has returned.
        ema: as for `RunningAverages`.
        window: as for `RunningAverages`.
        device: as for `RunningAverages`.
        name: the directory of the state inside that of `save_state`. Give a different one for each model.

    Raises:
        ConfigError, EngineError: on every rank.
    """
    _require_prepared(accelerator, model)
    saved = [hook for hook in accelerator._save_model_state_pre_hook.values() if isinstance(hook, _Saving)]
    if any(hook.name == name for hook in saved):
        raise ConfigError(f"prepare: the accelerator has averages named {name!r} already; give another name=.")
    engine = _deepspeed_engine(accelerator, model)
    optimizers = [] if engine else _optimizers_of(accelerator, model)
    averages = _Averages(model, ema=ema, window=window, device=device)
    if engine:
        _steps_of(accelerator).then.append(averages.count)
    else:
        count_steps(averages.count, optimizers)
    hook = _Saving(averages, name, accelerator.is_main_process)
    accelerator.register_save_state_pre_hook(hook)
    accelerator.register_load_state_pre_hook(hook.load)
    return averages


def optimizer_of(accelerator: Accelerator, twa: TrainableAverage, *, save: bool = True) -> AcceleratedOptimizer:
    """Return the optimizer of an average as a replacement for a prepared one.

    Its `step` and `zero_grad` may be called after each micro-batch. With DeepSpeed, Accelerate steps in
    `accelerator.backward`, and these steps are those of the average until it is closed.

    Args:
        accelerator: the accelerator that has prepared the model.
        twa: the average in the model.
        save: whether `accelerator.save_state` saves the coefficients and the optimizer, and `load_state` continues from
            them, until the average is closed.

    Raises:
        ConfigError: the loss is scaled for float16 by a scaler that Accelerate does not pass to the optimizer.
    """
    if accelerator.scaler is not None:
        raise ConfigError(
            "optimizer_of: Accelerate does not pass its scaler to the optimizer of an average. Train the coefficients "
            "with mixed_precision='bf16', or call twa.step(accelerator.scaler) and accelerator.scaler.update()."
        )
    if save:
        _Coefficients(accelerator, twa)
    if getattr(accelerator, "deepspeed_engine_wrapped", None) is None:
        return AcceleratedOptimizer(twa.as_optimizer(), device_placement=False)
    _steps_of(accelerator).average = twa
    return DeepSpeedOptimizerWrapper(twa.as_optimizer())


class _Averages(RunningAverages):
    """Averages whose steps are counted automatically."""

    def step(self) -> NoReturn:
        """Raise an error, because the steps are counted automatically.

        Raises:
            TwaError: always.
        """
        raise TwaError(
            "averages.step(): prepare() of twa_scale.integrations.accelerate counts the steps of the optimizer itself. "
            "Remove the call."
        )

    def count(self) -> None:
        """Count a step of the optimizer."""
        super().step()


class _Saving:
    """Saves averages in the directories of `save_state`."""

    def __init__(self, averages: RunningAverages, name: str, reports: bool) -> None:
        self.name = name
        self._averages = averages
        self._reports = reports

    def __call__(self, models: object, weights: object, directory: str) -> None:
        self._averages.save_state(Path(directory) / self.name)

    def load(self, models: object, directory: str) -> None:
        if not self._averages.load_state(Path(directory) / self.name) and self._reports:
            notice(f"{directory}: has no {self.name}; they continue unchanged.")


class _DeepSpeedSteps(DeepSpeedEngineWrapper):  # type: ignore[misc]
    """Replaces the steps of DeepSpeed by those of an average, or reports when DeepSpeed has taken a step."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.average: TrainableAverage | None = None
        self.then: list[Callable[[], None]] = []

    def backward(self, loss: Any, sync_gradients: bool = True, **kwargs: Any) -> None:
        if self.average is None or self.average.closed:
            super().backward(loss, sync_gradients, **kwargs)
            for call in self.then:
                call()
            return
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        self.average.step()  # within an accumulation it does nothing
        self.average.zero_grad()


class _Coefficients:
    """The state of an average in the checkpoints of Accelerate, until the average is closed.

    With the state of a closed average, a resumed training would need this average. Each rank writes the rows of
    `groups: tensor+row` that it owns into a directory next to the file that Accelerate writes.
    """

    def __init__(self, accelerator: Accelerator, twa: TrainableAverage) -> None:
        self._accelerator = accelerator
        self._twa = twa
        self._checkpoint = Path()
        accelerator.register_for_checkpointing(self)
        accelerator.register_save_state_pre_hook(lambda models, weights, directory: self._begin(directory))
        accelerator.register_load_state_pre_hook(lambda models, directory: self._begin(directory))

    def _begin(self, checkpoint: str) -> None:
        self._checkpoint = Path(checkpoint).absolute()
        if self._twa.closed:
            self._accelerator._custom_objects = [kept for kept in self._accelerator._custom_objects if kept is not self]

    def state_dict(self) -> dict[str, Any]:
        """Return the state, which names the directory of the rows. Collective."""
        if self._accelerator.project_configuration.save_on_each_node:
            return self._twa.state_dict()  # there is no directory that all ranks see
        number = self._number()
        rows = self._rows(number)
        state = self._twa.state_dict(rows)
        before = self._checkpoint / f"custom_checkpoint_{number}.pkl"  # Accelerate replaces it afterwards

        def used() -> set[str] | None:
            try:
                return named_rows(state, read_state(before))
            except StateError:
                return None

        with self._twa.pods.agree():
            if self._twa.pods.rank == 0:
                remove_rows(rows, used)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Collective."""
        self._twa.load_state_dict(state, self._rows(self._number()))

    def _number(self) -> int:
        return next(i for i, kept in enumerate(self._accelerator._custom_objects) if kept is self)

    def _rows(self, number: int) -> Path:
        return self._checkpoint / f"custom_checkpoint_{number}_rows"


def _steps_of(accelerator: Accelerator) -> _DeepSpeedSteps:
    """Return the object that takes the steps of DeepSpeed's engine. It is put into the accelerator once."""
    wrapped = accelerator.deepspeed_engine_wrapped
    if not isinstance(wrapped, _DeepSpeedSteps):
        wrapped = accelerator.deepspeed_engine_wrapped = _DeepSpeedSteps(wrapped.engine)
    return wrapped


def _require_prepared(accelerator: Accelerator, model: Any) -> None:
    """Check that a model is a result of `accelerator.prepare`.

    Raises:
        ConfigError: the model has not been prepared.
    """
    layers = list(_layers(model))
    known = any(
        inner_layer is layer
        for prepared in accelerator._models
        for inner_layer in _layers(prepared)
        for layer in layers
    )
    needs_ddp = "MULTI_" in str(accelerator.distributed_type)
    if not known or (needs_ddp and not any(isinstance(layer, DistributedDataParallel) for layer in layers)):
        raise ConfigError(
            "prepare: the model is not one that accelerator.prepare has returned. Prepare it with its optimizer first: "
            "model, optimizer = accelerator.prepare(model, optimizer)."
        )


def _layers(model: Any) -> Iterator[nn.Module]:
    """Yield a model and the modules inside its wrappers. Accelerate's `unwrap_model` would import DeepSpeed."""
    while isinstance(model, nn.Module):
        yield model
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)


def _deepspeed_engine(accelerator: Accelerator, model: Any) -> bool:
    wrapped = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return wrapped is not None and wrapped.engine is model


def _optimizers_of(accelerator: Accelerator, model: Any) -> list[Any]:
    """Return the prepared optimizers that hold a parameter of the model.

    Raises:
        ConfigError: there is no such optimizer, or its steps cannot be counted.
    """
    parameter_ids = {id(p) for p in model.parameters()}
    optimizers = [optimizer.optimizer for optimizer in accelerator._optimizers]
    result = [o for o in optimizers if any(id(p) in parameter_ids for group in o.param_groups for p in group["params"])]
    uncounted = any(not isinstance(optimizer, torch.optim.Optimizer) for optimizer in result)
    if uncounted or getattr(accelerator, "deepspeed_engine_wrapped", None) is not None:
        raise ConfigError(
            "prepare: the steps of the model cannot be counted: its optimizer is not a torch.optim.Optimizer, or the "
            "accelerator has another DeepSpeed engine. Create RunningAverages(model, ..), and call averages.step() "
            "after each step of its optimizer."
        )
    if not result:
        raise ConfigError(
            "prepare: no optimizer that the accelerator has prepared holds a parameter of the model, so that no step "
            "would be counted. Prepare it with the model: model, optimizer = accelerator.prepare(model, optimizer)."
        )
    return result
