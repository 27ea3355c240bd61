"""Packages that only some data and models need."""

from importlib import import_module
from typing import Any

from twa_scale.errors import ConfigError


def require_module(module: str, use: str, install: str) -> Any:
    """Return a module of a package that may be missing.

    Args:
        module: the import path of the module.
        use: the setting and the use of the package, for the error message.
        install: the argument for `pip install`.

    Raises:
        ConfigError: the import failed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{use}, but its import failed ({error}). Install it: pip install {install}.") from error
