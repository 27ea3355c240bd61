"""From files and overrides to a validated configuration, with messages that name key, value, rule and fix."""

import json
import re
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from yaml.composer import ComposerError

from twa_scale.config.block import BLOCK, unfolded
from twa_scale.config.schema import RunConfig
from twa_scale.config.section import Section
from twa_scale.errors import ConfigError

M = TypeVar("M", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.2: `3e-3` is a number, which YAML 1.1 reads as text, and a key is given once."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is given twice, of which SafeLoader takes the last one."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line, where = key.start_mark.line + 1, (key.tag, key.value)
            if where in lines and key.tag != "tag:yaml.org,2002:merge":
                raise ComposerError(
                    None, None, f"key {key.value!r} is given twice, in lines {lines[where]} and {line}; keep one"
                )
            lines[where] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML or JSON file, apply dotted overrides (`optimizer.lr=3e-3`), and validate.

    Raises:
        ConfigError: an unreadable file, a malformed override, an unknown key (with the nearest valid one), a bad value.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        # YAML takes JSON as it is, but for tabs.
        data = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, not a mapping of keys to values.")
    settings: dict[str, Any] = unfolded(data) if BLOCK in data else data
    for override in overrides or []:
        _override(settings, override)
    return validated(RunConfig, settings, str(path))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a mapping of JSON, in which no key is given twice."""
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice; keep one")
    return data


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not all((*parents, key)):
        raise ConfigError(f"override {override!r}: write it as key=value or section.key=value.")
    node = data
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds {node!r}, which has no keys.")
    try:
        node[key] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: its value is not valid YAML: {error}") from error


def validated(model: type[M], data: M | dict[str, Any] | None, where: str = "config") -> M:
    """Return `data` as a `model`, or say every wrong key and value in one ConfigError."""
    if isinstance(data, model):
        return data
    try:
        return model.model_validate(data or {})
    except ValidationError as error:
        lines = [_explain(model, dict(e)) for e in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


_BRANCHES = ("str", "int", "float")


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    location: tuple[str | int, ...] = error["loc"]
    # Beside keys and indices pydantic names the branches of a union: `str`, `list[float]`.
    parts = [part for part in location if isinstance(part, int) or (part.isidentifier() and part not in _BRANCHES)]
    key = ".".join(map(str, parts))
    if error["type"] == "extra_forbidden":
        key = ".".join(map(str, location))
        known = _keys(model, location[:-1])
        nearest = get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"unknown key {key!r}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    given = "" if error["type"] in ("missing", "value_error") else f" (got {error['input']!r})"
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


def dump(config: BaseModel) -> str:
    """Return the resolved configuration as JSON, every default filled in."""
    return json.dumps(config.model_dump(mode="json"), indent=2) + "\n"
