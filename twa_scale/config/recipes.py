"""Named settings for common uses. docs/how-to/settings.md explains each value.

A recipe gives values to keys that are not given, before the settings are validated.
"""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from pydantic import BaseModel

RecipeName = Literal["tail", "head", "soup"]


def _of_training_run(**length: float) -> dict[str, Any]:
    """Return the settings for candidates of one training run."""
    return {
        "basis": "normalized",
        "units": "delta",
        "groups": "tensor+row",
        "center": "mean",
        "optimizer": {"name": "adamw", "lr": 0.01},
        "schedule": {"name": "cosine", "warmup": 0.2},
        "split": "train",
        **length,
        "start": "best",
        "keep": "best",
    }


RECIPES: dict[str, dict[str, Any]] = {
    "tail": _of_training_run(steps=60, batch_size=32),
    "head": _of_training_run(epochs=1.0, batch_size=128),
    "soup": {
        "basis": "normalized",
        "units": "delta",
        "groups": "global",
        "center": "mean",
        "optimizer": {"name": "adamw", "lr": 0.03},
        "schedule": {"name": "cosine", "warmup": 0.2},
        "split": "validation",
        "epochs": 3.0,
        "batch_size": 32,
        "start": "center",
        "keep": "best",
        "compare": "candidates",
    },
}

_DEPENDS_ON = {
    "groups": ("basis",),
    "optimizer": ("optimizer.name", "units"),
    "schedule": ("schedule.name",),
}
"""Settings that a recipe sets only together with its own values of other settings, to which they belong."""
_EXCLUSIVE = {"steps": "epochs", "epochs": "steps"}


def filled(data: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Return settings, completed with those of their `recipe`. An unknown recipe has no settings.

    Args:
        data: the settings that are given.
        known: the keys that a recipe may give.
    """
    recipe = RECIPES.get(data["recipe"], {}) if isinstance(data.get("recipe"), str) else {}
    result = dict(data)
    for key, value in recipe.items():
        if key not in known or not _fits(key, data, recipe) or data.get(_EXCLUSIVE.get(key, "")) is not None:
            continue
        if not isinstance(value, dict):
            if key not in data or (key in _EXCLUSIVE and data[key] is None):
                result[key] = value
        elif (section := _given_settings(data.get(key, {}))) is not None:
            result[key] = {**value, **section}
    return result


def settings_of_recipe(config: BaseModel) -> dict[str, Any]:
    """Return the settings, by dotted key, that have the value of the recipe of `config`; empty without a recipe."""
    dumped = config.model_dump()
    flat = {}
    recipe = RECIPES.get(str(dumped.get("recipe")), {})
    for key, value in recipe.items():
        if not _fits(key, dumped, recipe):
            continue
        settings = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        flat.update({name: item for name, item in settings.items() if _value(dumped, name) == item})
    return flat


def recipe_line(config: BaseModel) -> str:
    """Return a sentence with the settings from the recipe; empty without a recipe."""
    settings = ", ".join(f"{key} {value}" for key, value in settings_of_recipe(config).items())
    return f"recipe {config.model_dump()['recipe']}: {settings}" if settings else ""


def _fits(key: str, data: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Return whether the settings to which `key` belongs are not given, or have the values of the recipe."""
    others = ((_value(data, other), _value(recipe, other)) for other in _DEPENDS_ON.get(key, ()))
    return all(current is None or str(current).lower() == str(required) for current, required in others)


def _value(data: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None."""
    first, _, rest = key.partition(".")
    value = data.get(first)
    if not rest:
        return value
    section = _given_settings(value)
    return section.get(rest) if section is not None else None


def _given_settings(section: Any) -> dict[str, Any] | None:
    """Return the given keys of a section, or None if it is not a section, which validation refuses."""
    if isinstance(section, BaseModel):
        return {name: getattr(section, name) for name in section.model_fields_set}
    return dict(section) if isinstance(section, Mapping) else None
