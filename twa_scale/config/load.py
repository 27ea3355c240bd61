"""From files and overrides to a validated configuration, with messages that name key, value, rule and fix."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from twa_scale.base.inputs import MAX_DEPTH, brief, parse_json, read_bounded
from twa_scale.config.deepspeed_block import BLOCK, unfolded
from twa_scale.config.explain import explain
from twa_scale.config.schema import RunConfig
from twa_scale.config.section import Section
from twa_scale.config.yaml_text import parse_yaml
from twa_scale.errors import ConfigError

M = TypeVar("M", bound=Section)


_MAX_BYTES = 256 << 10  # of a file of settings


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML or JSON file, apply dotted overrides (`optimizer.lr=3e-3`), and validate.

    Raises:
        ConfigError: an unreadable file, a malformed override, an unknown key (with the nearest valid one), a bad value.
    """
    path = Path(path)
    raw = read_bounded(path, _MAX_BYTES, ConfigError)
    try:
        # YAML takes JSON as it is, but for tabs.
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
    model: type[M], data: M | dict[str, Any] | None, where: str = "config", overrides: Sequence[str] = ()
) -> M:
    """Return `data` as a `model`, or say every wrong key and value in one ConfigError.

    Args:
        model: what `data` has to be.
        data: settings by name.
        where: where they come from.
        overrides: those of `data` that come from elsewhere, as key=value.
    """
    try:
        if isinstance(data, model):  # which may be a copy that was changed without a check, as model_copy does
            checked = type(data).model_validate(data)
            return data if repr(checked) == repr(data) else checked
        return model.model_validate({} if data is None else data)
    except ValidationError as error:
        lines: dict[str, dict[str, None]] = {}
        for found in error.errors():
            lines.setdefault(_origin(found["loc"], where, overrides), {})[explain(model, found)] = None
        raise ConfigError("; ".join(f"{origin}: {'; '.join(said)}" for origin, said in lines.items())) from None


def _origin(location: tuple[str | int, ...], where: str, overrides: Sequence[str]) -> str:
    """Return what set the value at `location`: the last override of it, or of a part of it, or else `where`."""
    path = [str(part) for part in location]
    for override in reversed(overrides):
        keys = override.partition("=")[0].split(".")
        shorter = min(len(keys), len(path))
        if shorter and keys[:shorter] == path[:shorter]:
            return f"override {brief(override)}"
    return f"{where} with {', '.join(map(brief, overrides))}" if overrides and not path else where


def dump(config: BaseModel) -> str:
    """Return the resolved configuration as JSON, every default filled in."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
