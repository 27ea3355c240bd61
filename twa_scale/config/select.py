"""Which of the candidates that were found are taken, and in which order."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from twa_scale.config.section import Count, Integer, Section

Order = Literal["given", "reverse", "shuffle"]
_Step = Annotated[Integer, Field(ge=0)]


class SelectConfig(Section):
    """A range of the candidates, by the steps in the names of their files or directories, and their order."""

    start_step: _Step | None = Field(None, description="Leave out candidates of earlier steps.")
    end_step: _Step | None = Field(None, description="Leave out candidates of later steps.")
    every: Count | None = Field(
        None, description="Take only the steps that are a multiple of this number: with 1000, step 1000, 2000, .."
    )
    last: Count | None = Field(
        None, description="Take only the last candidates, this many, of those that the other keys leave."
    )
    order: Order = Field(
        "given",
        description="`given`: a pattern's matches in natural order, a list as it is. As controls: `reverse`, or "
        "`shuffle` with `seed`.",
    )
    seed: _Step = Field(0, description="Seed of the order `shuffle`.")

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "SelectConfig":
        if self.start_step is not None and self.end_step is not None and self.start_step > self.end_step:
            raise ValueError(f"start_step {self.start_step} is after end_step {self.end_step}, so nothing is left")
        return self

    @property
    def by_step(self) -> bool:
        """Whether the choice needs the steps of the candidates."""
        return (self.start_step, self.end_step, self.every) != (None, None, None)
