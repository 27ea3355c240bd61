"""Averages in Axolotl: a plugin, whose settings are the block `twa` of its configuration."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, model_validator

from twa_scale.errors import ConfigError
from twa_scale.integrations.transformers import TwaCallback


class TwaSettings(BaseModel):
    """The arguments of `TwaCallback`, which is created once to check them.

    Raises:
        ConfigError: names the setting.
    """

    model_config = ConfigDict(extra="forbid")

    ema: list[float] | dict[str, Any] | None = None
    window: dict[str, Any] | None = None
    device: str = "auto"
    evaluate_with: str | int | list[float] = "auto"
    evaluate_also: list[str] = []
    learn: dict[str, Any] | None = None
    learn_steps: int = 0
    save: bool = True

    @model_validator(mode="after")
    def _check(self) -> "TwaSettings":
        self.callback()
        return self

    def callback(self) -> TwaCallback:
        """Return a callback with these settings."""
        return TwaCallback(**self.model_dump())


class TwaArgs(BaseModel):
    """The settings that the plugin adds to Axolotl's configuration."""

    twa: TwaSettings | None = None


class TwaPlugin(BasePlugin):  # type: ignore[misc]
    """Adds a `TwaCallback` to the Trainer that Axolotl creates."""

    def get_input_args(self) -> str:
        """Return the name of the class of the settings."""
        return f"{TwaArgs.__module__}.{TwaArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TwaCallback]:
        """Return the callback.

        Raises:
            ConfigError: there is no block `twa`, or a setting in it is wrong.
        """
        if not cfg.twa:
            raise ConfigError("twa: the plugin TwaPlugin needs this block, for example twa: {ema: [0.999]}.")
        return [TwaSettings.model_validate(cfg.twa.to_dict()).callback()]
