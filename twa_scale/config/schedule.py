"""The learning rate schedule of a run."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twa_scale.config.section import Count, Section

_USED_BY = {"final": ("cosine", "linear"), "every": ("step",), "milestones": ("step",), "factor": ("step",)}
"""The schedules that use a key."""


class ScheduleConfig(Section):
    """The learning rate schedule of the coefficients: a warmup, then a shape."""

    name: Literal["cosine", "linear", "step", "constant"] = Field("cosine", description="Shape after the warmup.")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="Fraction of all steps in which the rate rises linearly."
    )
    final: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="`cosine`, `linear`: rate at the end, as a fraction of `lr`."
    )
    every: Count | None = Field(None, description="`step`: steps between two decays of the rate.")
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="`step`: fractions of the run after which the rate decays, instead of `every`: `[0.5, 0.75]`."
    )
    factor: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="`step`: factor of the rate at each decay.")

    @model_validator(mode="after")
    def _keys_fit_the_name(self) -> "ScheduleConfig":
        if self.name == "step" and (self.every is None) == (not self.milestones):
            raise ValueError(
                "schedule 'step' needs `every` (steps between decays) or `milestones` (fractions of the run)"
            )
        for key, names in _USED_BY.items():
            if self.name not in names and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"`{key}` is for schedule {' and '.join(names)}; the schedule is {self.name!r}. Set schedule.name, "
                    f"or leave `{key}` out"
                )
        return self
