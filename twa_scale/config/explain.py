"""One-line messages for invalid keys and values."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from twa_scale.base.inputs import brief
from twa_scale.base.names import nearest

_BRANCHES = ("str", "int", "float")
_EXPECTED = "Input should be "

Location = tuple[str | int, ...]


def explained(model: type[BaseModel], errors: Sequence[Mapping[str, Any]]) -> list[tuple[Location, str]]:
    """Return location and message of each invalid key and value: key, rule, value, and the nearest known name.

    Pydantic reports an error for each branch of a union, such as the names and the list of `groups`. They are
    replaced by one message: that of the branch whose type the value has, or otherwise one about all branches.
    """
    unions: dict[Location, list[Mapping[str, Any]]] = {}
    for error in errors:
        unions.setdefault(_key(error["loc"]), []).append(error)
    lines: dict[tuple[Location, str], None] = {}
    for group in unions.values():
        for error in _united(group):
            lines[error["loc"], _message(model, error)] = None
    return list(lines)


def first_problem(error: ValidationError) -> tuple[str, Any]:
    """Return key and message of the first invalid value of a file that this program writes, and the value."""
    first = error.errors(include_url=False)[0]
    key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message, first["input"]


def _is_branch(part: str | int) -> bool:
    """Return whether a part of a location is a branch of a union, such as `str` or `list[float]`, not a key."""
    return isinstance(part, str) and (not part.isidentifier() or part in _BRANCHES)


def _key(location: Location) -> Location:
    """Return the part of a location before the first branch of a union."""
    for i, part in enumerate(location):
        if _is_branch(part):
            return location[:i]
    return location


def _united(errors: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the errors of the branches of a union as one error, unless some belong to the branch that was meant."""
    meant = [error for error in errors if not error["msg"].startswith(_EXPECTED) or _is_inside(error["loc"])]
    if len(errors) == 1 or meant:
        return meant or errors
    rules = dict.fromkeys(error["msg"].removeprefix(_EXPECTED) for error in errors)
    first = next((error for error in errors if error["type"] == "literal_error"), errors[0])
    return [{**first, "msg": _EXPECTED + " or ".join(rules)}]


def _is_inside(location: Location) -> bool:
    """Return whether the location is an item inside a branch: the value is a list with a wrong item."""
    return len(_key(location)) < len(location) - 1


def _message(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    location: Location = error["loc"]
    key = ".".join(str(part) for part in location if not _is_branch(part))
    if error["type"] == "extra_forbidden":
        key = ".".join(map(str, location))
        known = _keys(model, location[:-1])
        for larger in model.__subclasses__():  # the configuration of a run has the keys of an average
            if len(location) == 1 and key in larger.model_fields:
                return f"{key!r} is a key of {larger.__name__}, for `twa-scale run`; {model.__name__} does not have it"
        close = get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    suffix = "" if error["type"] in ("missing", "value_error") else f" (got {brief(error['input'])})"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        suffix += nearest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
    return f"{key}: {message}{suffix}" if key else message


def _keys(model: type[BaseModel], location: Location) -> list[str]:
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
