"""The base class of groups of settings: frozen, and strict in keys and types."""

from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError, model_validator

from twa_scale.base.paths import path_of
from twa_scale.config.explain import explained
from twa_scale.config.kinds import LoggerName
from twa_scale.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # it has no public name


def _whole(value: Any) -> Any:
    """Convert a whole float to an integer: YAML reads `1e3` as a float."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    """Return a single name as a list."""
    return [value] if isinstance(value, str) else value


def _directory(value: Any) -> Any:
    """Expand `~`, and refuse text that cannot be a path."""
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
Loggers = Annotated[list[LoggerName], BeforeValidator(_listed)]


class _Constructed(ModelMetaclass):
    """A metaclass that raises validation errors of a constructor call as ConfigError.

    Validation of mappings, copies and pickles does not call the class; pydantic reports their errors together.
    """

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        if args:
            raise ConfigError(f"{cls.__name__}: give settings by name, as {cls.__name__}(**settings).")
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            messages = dict.fromkeys(text for _, text in explained(cast("type[BaseModel]", cls), error.errors()))
            raise ConfigError(f"{cls.__name__}: {'; '.join(messages)}") from None


class Section(BaseModel, metaclass=_Constructed):
    """A frozen group of settings, which refuses unknown keys and values of other types.

    Types are strict: `true` is not a number and "3" is not an integer. Numbers are finite.

    Raises:
        ConfigError: a key or value is invalid, or a setting is assigned.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, revalidate_instances="always"
    )

    @model_validator(mode="before")
    @classmethod
    def _tuples_are_lists(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise ConfigError(
            f"{name}: settings are frozen. Create others: "
            f"{type(self).__name__}(**{{**settings.model_dump(), {name!r}: ..}})."
        )
