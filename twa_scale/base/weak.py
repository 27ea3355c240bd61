"""References to methods from objects that Python's garbage collector does not look into."""

from collections.abc import Callable
from typing import ParamSpec
from weakref import WeakMethod

P = ParamSpec("P")


def weak_method(method: Callable[P, None]) -> Callable[P, None]:
    """Return a function that calls a bound method as long as its object exists, and then does nothing."""
    reference = WeakMethod(method)

    def call(*arguments: P.args, **keywords: P.kwargs) -> None:
        if (found := reference()) is not None:
            found(*arguments, **keywords)

    return call
