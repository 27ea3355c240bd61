"""Decorators of public methods: an error after the object is closed, and no inference mode."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from twa_scale.errors import TwaError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Any)


def in_normal_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function leave `torch.inference_mode`, whose tensors could not be trained or written afterwards.

    It also leaves a default device of the user (`torch.set_default_device`): small tensors are made on the CPU.
    """

    @wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as modes:
            if torch.is_inference_mode_enabled():
                modes.enter_context(torch.inference_mode(False))
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            return function(*args, **kwargs)

    return outside


def while_open(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method raise TwaError when its object has `closed` set, or a reason in `lost` why it cannot be used."""

    @wraps(method)
    def checked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        name = method.__name__.removeprefix("_take_")
        if self.closed:
            raise TwaError(f"{name}: this {type(self).__name__} is closed; attach again.")
        if self.lost:
            raise TwaError(f"{name}: {self.lost}")
        return in_normal_mode(method)(self, *args, **kwargs)

    return checked  # type: ignore[return-value]  # mypy wants the first parameter to have the name of the method's
