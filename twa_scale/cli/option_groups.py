"""Groups of options that several commands share. Each is a dataclass."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def with_options(**groups: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of dataclasses to a command, which receives each of them as the keyword argument of that name.

    Every field of a dataclass is annotated like an option of typer.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        shared = {name: inspect.signature(group).parameters for name, group in groups.items()}
        others = [parameter for parameter in signature.parameters.values() if parameter.name not in groups]
        # Keyword-only parameters come last. typer reads the order and the types of options from the signature.
        added = [parameter for parameters in shared.values() for parameter in parameters.values()]
        parameters = sorted([*others, *added], key=lambda parameter: parameter.kind)

        @wraps(command)
        def run(**given: Any) -> None:
            built = {name: group(**{key: given.pop(key) for key in shared[name]}) for name, group in groups.items()}
            command(**given, **built)

        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorated
