"""A decorator for methods that raise an error after the object is closed."""

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from twa_scale.base.normal_mode import in_normal_mode
from twa_scale.errors import TwaError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Any)


def while_open(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Make a method raise TwaError when its object has `closed` set, or a reason in `lost` why it cannot be used."""
    normally = in_normal_mode(method)

    @wraps(method)
    def checked(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        name = method.__name__.removeprefix("_take_")
        if self.closed:
            raise TwaError(f"{name}: this {type(self).__name__} is closed; attach again.")
        if self.lost:
            raise TwaError(f"{name}: {self.lost}")
        return normally(self, *args, **kwargs)

    return checked  # type: ignore[return-value]  # mypy wants the first parameter to have the name of the method's
