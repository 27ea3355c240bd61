"""Checks that the private attributes of other libraries exist, when a model is attached."""

import inspect
import sys
from collections.abc import Iterable

from twa_scale.errors import EngineError
from twa_scale.version import TESTED_TORCH

_TESTED = {"torch": TESTED_TORCH, "deepspeed": "0.19", "fairscale": "0.4.13", "peft": "0.21"}


def require(library: str, instance: object, names: Iterable[str]) -> None:
    """Check that an object of a library has these attributes.

    An attribute that is set later counts as present if the class annotates it.

    Raises:
        EngineError: names the missing attribute, the installed version, and the tested versions.
    """
    annotated = {name for kind in type(instance).__mro__ for name in inspect.get_annotations(kind)}
    for name in names:
        if not hasattr(instance, name) and name not in annotated:
            raise EngineError(
                f"{type(instance).__name__} of {library} {version(library)} has no {name!r}, which this version of "
                f"twa_scale needs; use {library} {_TESTED[library]}."
            )


def version(library: str) -> str:
    """Return the version of a library that is already imported."""
    return str(getattr(sys.modules.get(library), "__version__", "of unknown version"))
