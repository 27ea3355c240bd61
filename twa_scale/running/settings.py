"""The settings of running averages."""

from collections.abc import Iterator, Mapping, Sequence
from math import log, log1p
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, model_validator

from twa_scale.config import validated
from twa_scale.config.section import Count, Integer, Section
from twa_scale.errors import ConfigError

Decay = Annotated[float, Field(gt=0, lt=1)]
HalfLife = Annotated[float, Field(gt=0, lt=1)]


BEMA = "bema"
"""The name of the bias-corrected average."""
BEMA_NAMES = (f"{BEMA}-ema", f"{BEMA}-first")
"""The names of its exponential average and of the weights of its first update, which it needs."""


class BemaSettings(Section):
    """The bias-corrected average BEMA (arXiv 2508.00180, Algorithm 1), t steps after the first update.

    EMA = (1 - beta) EMA + beta w and BEMA = EMA + alpha (w - w_0), with w_0 the weights of the first update.
    """

    ema_power: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5, description="beta = (lag + multiplier t)^-ema_power; the paper's kappa."
    )
    bias_power: PositiveFloat = Field(0.2, description="alpha = (lag + multiplier t)^-bias_power; the paper's eta.")
    lag: Annotated[float, Field(ge=1)] = Field(10.0, description="The paper's rho.")
    multiplier: PositiveFloat = Field(1.0, description="The paper's gamma.")

    def alpha(self, steps: int) -> float:
        """Return the factor of the correction `steps` steps after the first update."""
        return float((self.lag + self.multiplier * steps) ** -self.bias_power)

    def beta(self, steps: int) -> float:
        """Return the weight of the current weights in the exponential average."""
        return float((self.lag + self.multiplier * steps) ** -self.ema_power)


class EmaSettings(Section):
    """Exponential moving averages of the weights."""

    decays: list[Decay] = Field([], description="Decay of each update.")
    half_life: list[HalfLife] = Field(
        [],
        description="Fractions of the updates so far. The last updates of this fraction have half of the total weight.",
    )
    bema: BemaSettings | None = Field(
        None, description="Also keep the bias-corrected average; `True` for its defaults."
    )
    update_every: Count = Field(1, description="Steps between two updates.")
    start_step: Annotated[Integer, Field(ge=0)] = Field(0, description="First step at which an update may occur.")
    bias_correction: bool = Field(
        False,
        description="Leave out the weight that the first weights keep in an average of constant decay, as Adam does "
        "for its moments. torch.optim.swa_utils does not.",
    )
    use_buffers: bool = Field(False, description="Average floating point buffers, too, and copy the others.")

    @model_validator(mode="before")
    @classmethod
    def _numbers_to_lists(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        renamed = {("decays" if key == "decay" else key): value for key, value in data.items()}
        if len(renamed) < len(data):
            raise ValueError("decay and decays are the same setting; give one of them")
        if isinstance(renamed.get("bema"), bool):
            renamed["bema"] = {} if renamed["bema"] else None
        lists = ("decays", "half_life")
        return {k: [v] if k in lists and isinstance(v, int | float) else v for k, v in renamed.items()}

    @model_validator(mode="after")
    def _require_average(self) -> "EmaSettings":
        if not self.decays and not self.half_life and not self.bema:
            raise ValueError("give decays, as [0.999], half_life, as 0.05, or bema, as True")
        if len(set(self.names())) < len(list(self.names())):
            raise ValueError("each decay and each half_life may be given once")
        return self

    def names(self) -> Iterator[str]:
        """Yield the name of each average."""
        yield from (f"ema:{decay!r}" for decay in self.decays)
        yield from (f"ema:half-life:{half_life!r}" for half_life in self.half_life)
        if self.bema:
            yield BEMA

    def stored_names(self) -> tuple[str, ...]:
        """Return the names of all stored values: those of `names`, and those that BEMA needs."""
        return (*self.names(), *(BEMA_NAMES if self.bema else ()))

    def settings_of(self, index: int) -> dict[str, Any]:
        """Return the settings of the average `index`, in the order of `names`: its own setting and the common ones."""
        numbers = len(self.decays) + len(self.half_life)
        shared = self.model_dump(mode="json", exclude={"decays", "half_life", "bema"})
        if index == numbers:
            assert self.bema
            return {BEMA: self.bema.model_dump(mode="json"), **shared}
        kind = "decay" if index < len(self.decays) else "half_life"
        return {kind: [*self.decays, *self.half_life][index], **shared}

    def alpha(self, updates: int) -> float:
        """Return the factor of BEMA's correction at update number `updates`."""
        assert self.bema
        return self.bema.alpha((updates - 1) * self.update_every)

    def decay(self, index: int, updates: int) -> float:
        """Return the decay of the average `index`, in the order of `names`, at its update number `updates`.

        For BEMA, it is the decay of its exponential average.
        """
        if updates == 1:
            return 0.0
        if index == len(self.decays) + len(self.half_life):
            assert self.bema
            return 1 - self.bema.beta((updates - 1) * self.update_every)
        if index >= len(self.decays):
            return float((1 - 1 / updates) ** (log(0.5) / log1p(-self.half_life[index - len(self.decays)])))
        decay = self.decays[index]
        if not self.bias_correction:
            return decay
        return float(decay * (1 - decay ** (updates - 1)) / (1 - decay**updates))


class WindowSettings(Section):
    """The window of the last snapshots."""

    every: Count = Field(description="Steps between two snapshots.")
    keep: Annotated[Integer, Field(ge=2, le=4096)] = Field(description="The number of last snapshots that are kept.")
    store: Literal["dense32", "dense16", "packed8", "packed4", "packed2", "packed1"] = Field(
        "packed1", description="The store format of the difference of each snapshot to the previous one."
    )
    start_step: Annotated[Integer, Field(ge=0)] = Field(0, description="First step at which a snapshot may be taken.")

    def taken_by(self, step: int) -> int:
        """Return the number of snapshots that have been taken up to `step`, including those that were dropped."""
        first = self.start_step or self.every
        return 0 if step < first else (step - first) // self.every + 1


EmaOption = EmaSettings | Mapping[str, Any] | Sequence[float] | float
WindowOption = WindowSettings | Mapping[str, Any]


def ema_settings(ema: EmaOption | None) -> EmaSettings | None:
    """Return validated settings. A number or a list of numbers are decays.

    Raises:
        ConfigError: names the key.
    """
    if ema is None:
        return None
    if isinstance(ema, bool | str):
        raise ConfigError(f"ema: {ema!r}; give decays, as [0.999], or settings, as {{'half_life': 0.05}}.")
    if isinstance(ema, int | float):
        ema = {"decays": [float(ema)]}
    elif isinstance(ema, Sequence):
        ema = {"decays": list(ema)}
    return validated(EmaSettings, dict(ema) if isinstance(ema, Mapping) else ema, "ema")


def window_settings(window: WindowOption | None) -> WindowSettings | None:
    """Return validated settings.

    Raises:
        ConfigError: names the key.
    """
    if window is None:
        return None
    if not isinstance(window, WindowSettings | Mapping):
        raise ConfigError(f"window: {window!r}; give settings, as {{'every': 100, 'keep': 40}}.")
    return validated(WindowSettings, dict(window) if isinstance(window, Mapping) else window, "window")


def is_due(step: int, every: int, start: int) -> bool:
    """Return whether something that happens every `every` steps, from step `start` on, happens at `step`.

    Steps count from 1, as for `Snapshots`.
    """
    return step >= max(start, 1) and (step - start) % every == 0
