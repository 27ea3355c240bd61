"""A torch optimizer whose step is the step of an average."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NoReturn, Protocol

import torch

from twa_scale.average.gradients import clipping
from twa_scale.average.in_trainer import saved_by_callback
from twa_scale.average.optimizer import load_compatible_state, load_optimizer
from twa_scale.average.rows import RowCorrections
from twa_scale.errors import StateError, TwaError
from twa_scale.ranks import Pods

_AVERAGE = "twa_scale"
"""The key of the average in the state dict of its optimizer."""


class Average(Protocol):
    """The part of `TrainableAverage` that the optimizer uses."""

    pods: Pods

    def zero_grad(self) -> None:
        """Clear the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the average, with that of the inner optimizer under "optimizer"."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""


class AverageOptimizer(torch.optim.Optimizer):
    """A torch optimizer for schedulers, GradScaler and trainers of other libraries.

    `step()` is the step of the average: it reduces the gradient of the coefficients, calls the step of the inner
    optimizer of torch.optim, and writes the weights. Parameter groups and state are shared with the inner optimizer,
    so a scheduler changes both learning rates. The coefficients have no gradient before the step.

    Args:
        inner: the inner optimizer; the coefficients are its only parameter.
        rows: the corrections of rows, if there are any. Their optimizer takes its step with the inner one.
        average: the average.
        take_step: takes the step of the average, and calls `update`.
    """

    # With it, GradScaler.step leaves unscaling and overflow checks to `step`, and passes itself as `grad_scaler`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        rows: RowCorrections | None,
        average: Average,
        take_step: Callable[[torch.amp.GradScaler | None], None],
    ) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], inner.defaults)
        self._average = average
        self._take_step = take_step
        self.inner = inner
        self._rows = rows
        self._share()

    def _share(self) -> None:
        """Share the groups and the state of the inner optimizer; `load_state_dict` replaces them."""
        rows = [] if self._rows is None else self._rows.optimizer.param_groups
        self.param_groups = [*self.inner.param_groups, *rows]
        self.state = self.inner.state

    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: torch.amp.GradScaler | None = None) -> Any:
        """Take a step of the average. Collective.

        Args:
            closure: runs forward and backward, before the step; its result is returned.
            grad_scaler: the scaler of the loss; `GradScaler.step(optimizer)` passes itself.

        Raises:
            TwaError: as `TrainableAverage.step` does; transformers' Trainer could not save the rows.
        """
        self._refuse_unsaved_rows()
        if grad_scaler is None and hasattr(self, "found_inf"):
            raise TwaError(
                "GradScaler.step(optimizer) did not pass itself to this optimizer, because optimizer.step was replaced "
                "by a function without the argument grad_scaler. Call twa.step(scaler), or train in "
                "bfloat16, which needs no scaler."
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._take_step(grad_scaler)
        return result

    def update(self, gradient: torch.Tensor, scaler: torch.amp.GradScaler | None, max_norm: float | None) -> None:
        """Take a step of the inner optimizers; a scaler skips it if the gradient is not finite. Collective with rows.

        The gradients of rows are already unscaled and summed, if those of the coefficients are finite.

        Args:
            gradient: the reduced gradient of the coefficients, (k, G), scaled like the loss.
            scaler: the scaler of the loss.
            max_norm: the norm to clip the gradient to.
        """
        (x,) = self.param_groups[0]["params"]
        x.grad = gradient
        if scaler:
            scaler.unscale_(self.inner)
        finite = bool(torch.isfinite(gradient).all())
        rows = self._rows if finite else None
        if max_norm is not None and finite:
            squares = float(gradient.square().sum()) + (rows.squared_norm() if rows else 0.0)
            factor = clipping(math.sqrt(squares), max_norm)
            gradient *= factor
            if rows:
                rows.scale(factor)
        if scaler:
            scaler.step(self.inner)
        else:
            self.inner.step()
        if rows is not None:
            rows.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `TrainableAverage.zero_grad` does."""
        self._average.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the inner optimizer and of the average. Collective with `groups: tensor+row`.

        In a Trainer with `CoefficientsCallback`, which saves the average, it is the state of the inner optimizer.

        Raises:
            TwaError: transformers' Trainer could not save the rows.
        """
        if saved_by_callback(self):
            return self.inner.state_dict()
        self._refuse_unsaved_rows()
        average = {key: value for key, value in self._average.state_dict().items() if key != "optimizer"}
        return {**self.inner.state_dict(), _AVERAGE: average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load coefficients and moments from `state_dict()`, and write the weights. Collective.

        In a Trainer with `CoefficientsCallback`, which loads the average, this does nothing.

        Raises:
            StateError: the state is from another optimizer, or `TrainableAverage.load_state_dict` refuses it.
        """
        if saved_by_callback(self):
            return
        with self._average.pods.agree():
            if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(_AVERAGE), Mapping):
                raise StateError(
                    f"the state dict has no {_AVERAGE!r}, so it is not from the optimizer of an average; give the "
                    "state_dict() of twa.optimizer. To resume from a checkpoint of a Trainer with "
                    "CoefficientsCallback(twa), give the Trainer this callback again."
                )
        inner = {key: value for key, value in state_dict.items() if key != _AVERAGE}
        self._average.load_state_dict({**state_dict[_AVERAGE], "optimizer": inner})

    def _refuse_unsaved_rows(self) -> None:
        """Raise an error on every rank, before the first checkpoint, if a Trainer would save the rows of one rank only.

        Raises:
            TwaError: names the callback that saves them.
        """
        if self._rows is None or self._average.pods.size == 1:
            return
        if saved_by_callback(self) is False:
            raise TwaError(
                "transformers' Trainer asks only the first rank for the state of its optimizer, and with groups "
                "'tensor+row' each rank holds its own rows. Use a callback to save them: "
                "callbacks=[CoefficientsCallback(twa)] of twa_scale.integrations.transformers."
            )

    def inner_states(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return copies of the states of the inner optimizer and of this rank's rows, for `load_inner`."""
        rows = None if self._rows is None else {"optimizer": deepcopy(self._rows.optimizer.state_dict())}
        return deepcopy(self.inner.state_dict()), rows

    def load_inner(self, state: dict[str, Any], rows: dict[str, Any] | None) -> None:
        """Load a copy of the state of the inner optimizer. The state of the rows, which may be large, is not copied."""
        load_optimizer(self.inner, state)
        if self._rows and rows:
            load_compatible_state(self._rows.optimizer, rows["optimizer"])
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise an error, because only the coefficients are trained.

        Raises:
            TwaError: always, except in the constructor.
        """
        if hasattr(self, "inner"):
            raise TwaError(
                "add_param_group: the optimizer of an average trains its coefficients only; give other parameters to "
                "an optimizer of their own."
            )
        super().add_param_group(param_group)

    def __iter__(self) -> NoReturn:
        refuse_unpacking()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copies("the optimizer of an average")


def refuse_unpacking() -> NoReturn:
    """Raise the TwaError of an object that a trainer unpacks as the pair of an optimizer and a scheduler."""
    raise TwaError(
        "an average and its optimizer are not iterable. transformers' Trainer takes a pair of an optimizer and a "
        "scheduler: Trainer(.., optimizers=(twa.as_optimizer(), None))."
    )


def refuse_copies(description: str) -> NoReturn:
    """Raise the TwaError of an object that cannot be pickled or copied: it holds hooks and open files."""
    raise TwaError(
        f"{description} cannot be pickled or copied: it holds the hooks of the model and the open candidates. Save its "
        "state_dict(); attach again and load_state_dict() continue from it."
    )
