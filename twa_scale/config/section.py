"""What every group of settings is: frozen, strict in keys and types."""

from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt, ValidationError, model_validator

from twa_scale.base.paths import path_of
from twa_scale.config.explain import explain
from twa_scale.errors import ConfigError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # which has no public name


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


class _Constructed(ModelMetaclass):
    """Makes what is wrong in a call of the class a ConfigError.

    Validation of mappings, copies and pickles do not call the class: pydantic reports their errors together.
    """

    def __call__(cls, *args: Any, **settings: Any) -> Any:
        if args:
            raise ConfigError(f"{cls.__name__}: give settings by name, as {cls.__name__}(**settings).")
        try:
            return super().__call__(**settings)
        except ValidationError as error:
            said = dict.fromkeys(explain(cast("type[BaseModel]", cls), dict(found)) for found in error.errors())
            raise ConfigError(f"{cls.__name__}: {'; '.join(said)}") from None


class Section(BaseModel, metaclass=_Constructed):
    """A frozen group of settings that refuses keys it does not know, and values of another type.

    Types are strict: `true` is no number and "3" no integer. Numbers are finite.

    Raises:
        ConfigError: at construction, or when a setting is changed.
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
            f"{name}: settings are frozen. Make others: "
            f"{type(self).__name__}(**{{**settings.model_dump(), {name!r}: ..}})."
        )
