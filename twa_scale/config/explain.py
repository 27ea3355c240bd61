"""One-line messages for invalid keys and values."""

from collections.abc import Mapping
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from twa_scale.base.inputs import brief

_BRANCHES = ("str", "int", "float")


def explain(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    """Return the message of an error of pydantic: key, rule and value, or the nearest key for an unknown one."""
    location: tuple[str | int, ...] = error["loc"]
    # The location also has the branches of unions, such as `str` and `list[float]`.
    parts = [part for part in location if isinstance(part, int) or (part.isidentifier() and part not in _BRANCHES)]
    key = ".".join(map(str, parts))
    if error["type"] == "extra_forbidden":
        key = ".".join(map(str, location))
        known = _keys(model, location[:-1])
        nearest = get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f" (got {brief(error['input'])})"
    return f"{key}: {message}{given}" if key else message


def _keys(model: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None:
            return []
        nested = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]
