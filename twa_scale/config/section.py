"""What every group of settings is: frozen, strict in keys and types."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, model_validator

from twa_scale.errors import ConfigError
from twa_scale.globs import path_of


def _whole(value: Any) -> Any:
    """Take `1e3`, which YAML reads as a float, for the integer that it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _directory(value: Any) -> Any:
    """Put the home of a user in the place of `~`, and refuse what can be no path."""
    if not isinstance(value, str):
        return value
    try:
        path = path_of(value, ConfigError)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return str(path) if value.startswith("~") else value


Directory = Annotated[str, BeforeValidator(_directory)]
Integer = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[PositiveInt, BeforeValidator(_whole)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know, and values of another type.

    Types are strict: `true` is no number and "3" no integer. Numbers are finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _tuples_are_lists(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
