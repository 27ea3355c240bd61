"""The optimizer that users get: its step is the step of the average."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any, NoReturn, Protocol

import torch

from twa_scale.errors import StateError, TwaError
from twa_scale.ranks import Pods

_AVERAGE = "twa_scale"
"""The key of the average in the state dict of its optimizer."""


class Average(Protocol):
    """What the optimizer needs of a `TrainableAverage`."""

    pods: Pods

    def zero_grad(self) -> None:
        """Forget gradients."""

    def state_dict(self) -> dict[str, Any]:
        """Return all that continues the run, the state of the optimizer inside under "optimizer"."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from it."""


class AverageOptimizer(torch.optim.Optimizer):
    """A torch optimizer for whatever calls optimizers: schedulers, GradScaler, a trainer of another library.

    `step()` is that of the average: it reduces the gradient of the coefficients, lets the optimizer inside, one of
    torch.optim, step on them, and writes the weights. Parameter groups and state are those of the optimizer inside, so
    that what changes a learning rate here changes it there. The coefficients have no gradient before the step.

    Args:
        inside: steps on the coefficients, its only parameter.
        average: whose optimizer this is.
        take_step: the step of the average; it ends in `update`.
    """

    # GradScaler.step then leaves unscaling and overflows to `step`, and hands itself over as `grad_scaler`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        inside: torch.optim.Optimizer,
        average: Average,
        take_step: Callable[[torch.amp.GradScaler | None], None],
    ) -> None:
        super().__init__([p for group in inside.param_groups for p in group["params"]], inside.defaults)
        self._average = average
        self._take_step = take_step
        self.inside = inside
        self._share()

    def _share(self) -> None:
        """Show the groups and the state of the optimizer inside, which loads new ones with a state dict."""
        self.param_groups = self.inside.param_groups
        self.state = self.inside.state

    def step(self, closure: Callable[[], Any] | None = None, *, grad_scaler: torch.amp.GradScaler | None = None) -> Any:
        """Take a step of the average. Collective.

        Args:
            closure: runs forward and backward, before the step; its result is returned.
            grad_scaler: what scaled the loss; `GradScaler.step(optimizer)` gives itself.

        Raises:
            TwaError: as `TrainableAverage.step` does.
        """
        if grad_scaler is None and hasattr(self, "found_inf"):
            raise TwaError(
                "GradScaler.step(optimizer) has not handed itself to this optimizer, because something has replaced "
                "optimizer.step by a function without the argument grad_scaler. Call twa.step(scaler), or train in "
                "bfloat16, which needs no scaler."
            )
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._take_step(grad_scaler)
        return result

    def update(self, gradient: torch.Tensor, scaler: torch.amp.GradScaler | None, max_norm: float | None) -> None:
        """Let the optimizer inside step on the coefficients; with a scaler, unless the gradient is not finite.

        Args:
            gradient: of the coefficients, reduced, and scaled as the loss was.
            scaler: what scaled the loss.
            max_norm: clip the gradient to it.
        """
        (x,) = self.param_groups[0]["params"]
        x.grad = gradient
        if scaler:
            scaler.unscale_(self.inside)
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_([x], max_norm)
        if scaler:
            scaler.step(self.inside)
        else:
            self.inside.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as `TrainableAverage.zero_grad` does."""
        self._average.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer inside and that of the average: all that `load_state_dict` needs."""
        average = {key: value for key, value in self._average.state_dict().items() if key != "optimizer"}
        return {**super().state_dict(), _AVERAGE: average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict()`: coefficients, moments and weights. Collective.

        Raises:
            StateError: the state of another optimizer, or one that `TrainableAverage.load_state_dict` refuses.
        """
        with self._average.pods.agree():
            if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(_AVERAGE), Mapping):
                raise StateError(
                    f"the state dict has no {_AVERAGE!r}, so it is not from the optimizer of an average; give the "
                    "state_dict() of twa.optimizer."
                )
        inside = {key: value for key, value in state_dict.items() if key != _AVERAGE}
        self._average.load_state_dict({**state_dict[_AVERAGE], "optimizer": inside})

    def load_inside(self, state: dict[str, Any]) -> None:
        """Load the state of the optimizer inside alone; `state` is not shared with it."""
        loaded = deepcopy(state)
        for key, value in self.inside.param_groups[0].items():  # keys of a later version of torch than the state's
            loaded["param_groups"][0].setdefault(key, value)
        self.inside.load_state_dict(loaded)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the coefficients are all that is trained.

        Raises:
            TwaError: always, but in the constructor.
        """
        if hasattr(self, "inside"):
            raise TwaError(
                "add_param_group: the optimizer of an average trains its coefficients only; give other parameters to "
                "an optimizer of their own."
            )
        super().add_param_group(param_group)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_copies("the optimizer of an average")


def refuse_copies(what: str) -> NoReturn:
    """Raise the TwaError of what can be neither pickled nor copied, because it holds hooks, files and live weights."""
    raise TwaError(
        f"{what} cannot be pickled or copied: it holds the hooks of the model and the open candidates. Save its "
        "state_dict(); attach anew and load_state_dict() continue from it."
    )
