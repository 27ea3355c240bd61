"""What engines rely on that other libraries do not promise to keep: checked when a model is attached."""

import sys
from collections.abc import Iterable

from twa_scale.errors import EngineError

_TESTED = {"torch": "2.6 to 2.13", "deepspeed": "0.19", "fairscale": "0.4.13"}


def require(library: str, thing: object, names: Iterable[str]) -> None:
    """Refuse a `thing` of a library that has changed inside.

    Attributes that are set later count as there when the class annotates them.

    Raises:
        EngineError: names the attribute that is missing, the version that was found, and those that were tested.
    """
    promised = {name for kind in type(thing).__mro__ for name in vars(kind).get("__annotations__", ())}
    for name in names:
        if not hasattr(thing, name) and name not in promised:
            raise EngineError(
                f"{type(thing).__name__} of {library} {version(library)} has no {name!r}, which this version of "
                f"twa_scale needs; use {library} {_TESTED[library]}."
            )


def version(library: str) -> str:
    """Return the version of a library that is loaded: who has a model of it has imported it."""
    return str(getattr(sys.modules.get(library), "__version__", "of unknown version"))
