"""The optimizer of the coefficients, and checks of its settings."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from math import inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import nn

from twa_scale.average.bases import basis_class
from twa_scale.config import TwaConfig, candidate_index
from twa_scale.errors import ConfigError, StateError


def check_settings(config: TwaConfig, center_weights: Sequence[float]) -> None:
    """Check the settings that depend on the number of candidates.

    Raises:
        ConfigError: `start` or `num_components` is invalid for these candidates.
    """
    n = len(center_weights)
    if config.start != "center":
        candidate_index(config.start, n, "start")
    basis_class(config.basis).check(config, center_weights)
    if config.num_components is not None and config.num_components >= n:
        raise ConfigError(
            f"num_components: {config.num_components} is set, but {n} candidates span at most {n - 1} directions."
        )


def check_optimizer(config: TwaConfig) -> None:
    """Check the options of the optimizer before any file is opened.

    Raises:
        ConfigError: as `make_optimizer` does.
    """
    make_optimizer(config, nn.Parameter(torch.zeros(1, 1)))


def make_optimizer(config: TwaConfig, x: nn.Parameter, lr: float | None = None) -> torch.optim.Optimizer:
    """Return the optimizer of the coefficients `x`, by its name in torch.optim. `lr` is by default that of `config`.

    Raises:
        ConfigError: this version of torch does not have the class, or the class rejects an option or a value.
    """
    known: dict[str, Callable[..., torch.optim.Optimizer]] = {
        name.lower(): value for name, value in vars(torch.optim).items() if isinstance(value, type)
    }
    settings = config.optimizer
    if settings.name.lower() not in known:
        raise ConfigError(f"optimizer.name: torch {torch.__version__} has no {settings.name!r}; use adamw or sgd.")
    kind = known[settings.name.lower()]
    taken = inspect.signature(kind).parameters
    if unknown := [key for key in settings.options if key not in taken]:
        raise ConfigError(
            f"optimizer.{unknown[0]}: {settings.name} of torch {torch.__version__} has no option {unknown[0]!r}, which "
            "a later torch has; leave it out, or install a later torch."
        )
    try:
        return kind([x], lr=config.lr if lr is None else lr, **settings.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {settings.name} rejects these options: {error}.") from error


def checked_lr(lr: Any, key: str) -> float:
    """Return a learning rate as a float.

    Raises:
        ConfigError: it is not a positive, finite number.
    """
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 < float(lr) < inf:
        raise ConfigError(f"{key}: the learning rate is {lr!r}; give a positive number.")
    return float(lr)


def check_state(config: TwaConfig, x: nn.Parameter, state: Mapping[str, Any]) -> None:
    """Compare the saved state of an optimizer with the state of the optimizer of `config` after a step on `x`.

    Raises:
        StateError: a key is missing or unknown, or a value has another type or shape or is not finite.
    """
    trial = nn.Parameter(x.detach().clone())
    optimizer = make_optimizer(config, trial)
    trial.grad = torch.zeros_like(trial)
    optimizer.step()
    expected = optimizer.state_dict()
    moments, groups = state.get("state"), state.get("param_groups")
    if not isinstance(moments, Mapping) or not isinstance(groups, list) or len(groups) != 1:
        raise _differs("", "a `state` and one entry of `param_groups`")
    if not isinstance(groups[0], Mapping) or groups[0].get("params") != [0]:
        raise _differs("param_groups", "the settings of one parameter")
    _check_values("param_groups", groups[0], expected["param_groups"][0])  # other keys are those of schedulers
    if moments:  # none before the first step
        if list(moments) != [0] or not isinstance(moments[0], Mapping):
            raise _differs("state", "the moments of one parameter")
        _check_values("state", moments[0], expected["state"].get(0, {}))
        if unknown := [
            key for key, value in moments[0].items() if key not in expected["state"][0] and value is not None
        ]:
            raise _differs(f"state.{unknown[0]}", "nothing: the optimizer has no such value")


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a copy of `state`, of an optimizer of one parameter, which `check_state` has accepted."""
    load_compatible_state(optimizer, deepcopy(dict(state)))


def load_compatible_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load `state` as `load_optimizer` does, but without a copy: the optimizer uses the tensors of `state`."""
    for key, value in optimizer.param_groups[0].items():  # keys that a later version of torch has added
        state["param_groups"][0].setdefault(key, value)
    optimizer.load_state_dict(state)


def _check_values(location: str, saved: Mapping[Any, Any], expected: Mapping[str, Any]) -> None:
    for key, wanted in expected.items():
        value = saved.get(key)
        if isinstance(wanted, torch.Tensor):
            if not isinstance(value, torch.Tensor) or value.shape != wanted.shape or value.dtype != wanted.dtype:
                raise _differs(f"{location}.{key}", f"{wanted.dtype} of shape {tuple(wanted.shape)}")
            if not bool(torch.isfinite(value).all()):
                raise _differs(f"{location}.{key}", "finite values")
        elif key not in saved and key != "lr" and location == "param_groups":
            continue  # added by a later version of torch: the default is used
        elif key not in saved:
            raise _differs(f"{location}.{key}", "a value")
        elif isinstance(wanted, float) and not (isinstance(value, float | int) and isfinite(value)):
            raise _differs(f"{location}.{key}", "a finite number")


def _differs(key: str, wanted: str) -> StateError:
    return StateError(
        f"state: optimizer{'.' if key else ''}{key}: {wanted} belongs there. It is not the state of this optimizer. "
        "Give the one that was saved, or start a new run."
    )
