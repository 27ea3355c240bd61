"""Generate a commented configuration file from the schema."""

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
    """Return YAML that sets the keys of `given`, with all other keys of RunConfig as comments.

    Args:
        given: values of keys of RunConfig, which come first in the file, in this order.
    """
    fields = RunConfig.model_fields
    own = RunConfig.__annotations__  # the keys of a run come before those of TwaConfig
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
    """Return a section with all keys commented out."""
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
