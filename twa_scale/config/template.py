"""Write settings as YAML: a commented template, and the settings that apply to a run."""

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from twa_scale.config.load import validated
from twa_scale.config.recipes import settings_of_recipe
from twa_scale.config.run import RunConfig

_HEAD = """\
# A run of twa-scale: `twa-scale run THIS_FILE`. Keys that are commented out show their defaults.
"""
_WIDTH = 100


def template(settings: Mapping[str, Any]) -> str:
    """Return YAML that sets the keys of `settings`, with all other keys of RunConfig as comments.

    Args:
        settings: values of keys of RunConfig, which come first in the file, in this order. Defaults are those of their
            recipe.

    Raises:
        ConfigError: a value is invalid.
    """
    config = validated(RunConfig, dict(settings), "init")
    fields, marks = RunConfig.model_fields, _marks(config)
    parts = [_HEAD]
    for key in _order(settings):
        value = getattr(config, key)
        if key in settings:
            parts.append(f"{_comment(fields[key])}{_yaml(key, settings[key])}")
        elif isinstance(value, BaseModel):
            parts.append(_section(key, fields[key], value, marks))
        else:
            parts.append(f"{_comment(fields[key])}# {_yaml(key, value, marks.get(key))}")
    return "\n".join(parts)


def resolved(config: RunConfig) -> str:
    """Return YAML of all settings of a run: given ones, those of the recipe, which are marked, and defaults."""
    marks = _marks(config)
    lines = []
    for key in _order(()):
        value = getattr(config, key)
        if isinstance(value, BaseModel):
            lines.append(f"{key}:\n")
            lines += (f"  {_yaml(name, item, marks.get(f'{key}.{name}'))}" for name, item in _items(value))
        else:
            lines.append(_yaml(key, value, marks.get(key)))
    return "".join(lines)


def _order(first: Mapping[str, Any] | tuple[()]) -> list[str]:
    """Return the keys of RunConfig: `first`, then those of a run, then those of TwaConfig."""
    fields, first_keys = (
        RunConfig.model_fields,
        [key for key in RunConfig.__annotations__ if key in RunConfig.model_fields],
    )
    return list(dict.fromkeys([*first, *first_keys, *fields]))


def _marks(config: RunConfig) -> dict[str, str]:
    """Return the comment of each dotted key whose value is that of the recipe."""
    return dict.fromkeys(settings_of_recipe(config), f"recipe {config.recipe}")


def _items(section: BaseModel) -> list[tuple[str, Any]]:
    """Return the keys and values of a section, including options that it passes on."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    return [*values.items(), *(section.model_extra or {}).items()]


def _section(key: str, field: FieldInfo, value: BaseModel, marks: Mapping[str, str]) -> str:
    """Return a section with all keys commented out."""
    fields = type(value).model_fields
    items = (
        f"{_comment(fields[name], '#   # ') if name in fields else ''}"
        f"#   {_yaml(name, item, marks.get(f'{key}.{name}'))}"
        for name, item in _items(value)
    )
    return f"{_comment(field)}# {key}:\n{''.join(items)}"


def _comment(field: FieldInfo, start: str = "# ") -> str:
    lines = textwrap.wrap(field.description or "", _WIDTH - len(start), break_long_words=False)
    return "".join(f"{start}{line}\n" for line in lines)


def _yaml(key: str, value: Any, mark: str | None = None) -> str:
    inline = isinstance(value, list) and len(value) <= 8  # longer lists have a line for each entry
    text = yaml.safe_dump({key: value}, sort_keys=False, width=_WIDTH, default_flow_style=None if inline else False)
    return f"{text.rstrip()}  # {mark}\n" if mark else text
