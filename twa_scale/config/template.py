"""A commented configuration file to start from, made of the schema."""

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from twa_scale.config.schema import RunConfig

_HEAD = """\
# A run of twa-scale: `twa-scale run THIS_FILE`. Keys that are commented out show their defaults.
"""
_WIDTH = 100


def template(given: Mapping[str, Any]) -> str:
    """Return YAML that sets the keys in `given` and shows all others of RunConfig as comments.

    Args:
        given: values for keys of RunConfig, in the order in which they come first in the file.
    """
    fields = RunConfig.model_fields
    own = RunConfig.__annotations__  # what a run needs beside TwaConfig comes before what that has
    order = [*given, *(key for key in own if key not in given), *(key for key in fields if key not in {*own, *given})]
    parts = [_HEAD]
    for key in order:
        default = fields[key].get_default(call_default_factory=True)
        if key in given:
            parts.append(f"{_comment(fields[key])}{_yaml(key, given[key])}")
        elif isinstance(default, BaseModel):
            parts.append(_section(key, fields[key], default))
        elif default is not PydanticUndefined:
            parts.append(f"{_comment(fields[key])}# {_yaml(key, default)}")
    return "\n".join(parts)


def _section(key: str, field: FieldInfo, default: BaseModel) -> str:
    """Return a section whose keys are all commented out."""
    inside = (
        f"{_comment(entry, '#   # ')}#   {_yaml(name, getattr(default, name))}"
        for name, entry in type(default).model_fields.items()
    )
    return f"{_comment(field)}# {key}:\n{''.join(inside)}"


def _comment(field: FieldInfo, start: str = "# ") -> str:
    lines = textwrap.wrap(field.description or "", _WIDTH - len(start), break_long_words=False)
    return "".join(f"{start}{line}\n" for line in lines)


def _yaml(key: str, value: Any) -> str:
    return yaml.safe_dump({key: value}, sort_keys=False, width=_WIDTH)
