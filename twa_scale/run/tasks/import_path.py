"""Functions that a configuration names by import path."""

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from twa_scale.base.names import nearest
from twa_scale.errors import ConfigError


def import_function(path: str, key: str) -> Callable[..., Any]:
    """Return the function with the import path `package.module:function`.

    Exceptions that the code of the module raises are passed on.

    Args:
        path: the import path.
        key: the setting in error messages.

    Raises:
        ConfigError: the path is malformed, or the module or the function does not exist.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{key}: {path!r} is not an import path. Write package.module:function.")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        fix = f"Install it, or add its folder to PYTHONPATH, so that {path!r} can be imported."
        raise ConfigError(f"{key}: there is no module {error.name!r}. {fix}") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ConfigError(f"{key}: the module {module_name!r} has no function {name!r}{nearest(name, public) or '.'}")
    return function  # type: ignore[no-any-return]


def call(function: Callable[..., Any], options: dict[str, Any], key: str, path: str) -> Any:
    """Return function(**options).

    Raises:
        ConfigError: the function does not accept the options, or requires further ones.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(**options)
    except TypeError as error:
        valid = [p.name for p in signature.parameters.values() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        wrong = next((name for name in options if name not in valid), "")
        hint = (nearest(wrong, valid) if wrong else "") or "."
        known = f"It accepts {', '.join(valid)}." if valid else "It accepts no options."
        raise ConfigError(f"{key}: {path!r} cannot be called with these options: {error}{hint} {known}") from error
    return function(**options)


def model_from(function: Callable[..., Any], options: dict[str, Any], path: str) -> nn.Module:
    """Return the model of the function that `task.model` names by `path`.

    Raises:
        ConfigError: the function does not accept `task.model_options`, or does not return a module.
    """
    model = call(function, options, "task.model_options", path)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"task.model: {path!r} returned {type(model).__name__}, not a torch.nn.Module.")
    return model
