"""The settings that choose and order the candidates."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twa_scale.config.section import Count, Integer, Section

Order = Literal["given", "reverse", "shuffle"]
_Step = Annotated[Integer, Field(ge=0)]


class SelectConfig(Section):
    """The range of candidates, by the steps in the names of their files or directories, and their order."""

    start_step: _Step | None = Field(None, description="Skip candidates of earlier steps.")
    end_step: _Step | None = Field(None, description="Skip candidates of later steps.")
    every: Count | None = Field(
        None, description="Use only steps that are a multiple of this number: with 1000, step 1000, 2000, .."
    )
    last: Count | None = Field(
        None, description="Use only this number of the last candidates, among those that the other keys select."
    )
    order: Order = Field(
        "given",
        description="`given` is the natural order of the matches of a pattern, or the order of a list. `reverse`, and "
        "`shuffle` with `seed`, are for control experiments.",
    )
    seed: _Step = Field(0, description="Seed of the order `shuffle`.")

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "SelectConfig":
        if self.start_step is not None and self.end_step is not None and self.start_step > self.end_step:
            raise ValueError(f"start_step {self.start_step} is after end_step {self.end_step}, so nothing is left")
        return self

    @property
    def by_step(self) -> bool:
        """Whether the selection needs the steps of the candidates."""
        return (self.start_step, self.end_step, self.every) != (None, None, None)
