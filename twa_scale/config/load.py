"""Load and validate a configuration from files and overrides."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from twa_scale.base.inputs import MAX_DEPTH, brief, parse_json, read_bounded
from twa_scale.config.deepspeed_block import BLOCK, unfolded
from twa_scale.config.explain import explained
from twa_scale.config.recipes import RECIPES
from twa_scale.config.run import RunConfig
from twa_scale.config.section import Section
from twa_scale.config.yaml_text import parse_yaml
from twa_scale.errors import ConfigError

M = TypeVar("M", bound=Section)


_MAX_BYTES = 256 << 10  # of a configuration file


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML or JSON file, apply dotted overrides (`optimizer.lr=3e-3`), and validate.

    Raises:
        ConfigError: the file cannot be read, an override is malformed, a key is unknown, or a value is invalid.
    """
    path = Path(path)
    raw = read_bounded(path, _MAX_BYTES, ConfigError)
    try:
        # YAML is a superset of JSON, except for tabs.
        data = parse_json(raw) if path.suffix == ".json" else parse_yaml(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, not a mapping of keys to values.")
    settings: dict[str, Any] = unfolded(data) if BLOCK in data else data
    for override in overrides or []:
        _override(settings, override)
    return validated(RunConfig, settings, str(path), overrides or [])


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not all((*parents, key)) or len(parents) > MAX_DEPTH:
        raise ConfigError(f"override {brief(override)}: write it as key=value or section.key=value.")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {brief(override)}: {parent!r} holds {brief(node)}, which has no keys.")
    try:
        node[key] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"override {brief(override)}: its value is not valid YAML: {error}") from error


def validated(
    model: type[M], data: M | dict[str, Any] | None, source: str = "config", overrides: Sequence[str] = ()
) -> M:
    """Return `data` as an instance of `model`.

    Args:
        model: the class of the result.
        data: settings by name, or an instance.
        source: the origin of the settings, for messages.
        overrides: the overrides in `data`, as key=value, for messages.

    Raises:
        ConfigError: names every invalid key and value.
    """
    try:
        if isinstance(data, model):  # validate again, because model_copy(update=..) does not validate
            checked = type(data).model_validate(data)
            return data if repr(checked) == repr(data) else checked
        return model.model_validate({} if data is None else data)
    except ValidationError as error:
        lines: dict[str, dict[str, None]] = {}
        for location, text in explained(model, error.errors()):
            message = text + _hint(data, location)
            lines.setdefault(_origin(location, source, overrides), {})[message] = None
        raise ConfigError("; ".join(f"{origin}: {'; '.join(messages)}" for origin, messages in lines.items())) from None


def _hint(data: Any, location: Sequence[str | int]) -> str:
    """Return the note for an error about several settings, if some of them may come from a recipe."""
    recipe = data.get("recipe") if isinstance(data, dict) else None
    section = RECIPES.get(str(recipe), {}).get(str(location[0])) if len(location) == 1 else None
    if location and not isinstance(section, dict):
        return ""
    return f" (other settings are those of recipe {recipe!r})" if recipe else ""


def _origin(location: tuple[str | int, ...], source: str, overrides: Sequence[str]) -> str:
    """Return the origin of the value at `location`: the last override of it or of a part of it, or `source`."""
    path = [str(part) for part in location]
    for override in reversed(overrides):
        keys = override.partition("=")[0].split(".")
        shorter = min(len(keys), len(path))
        if shorter and keys[:shorter] == path[:shorter]:
            return f"override {brief(override)}"
    return f"{source} with {', '.join(map(brief, overrides))}" if overrides and not path else source


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration as `section.key` and value."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def dump(config: BaseModel) -> str:
    """Return the configuration as JSON, with all defaults."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
