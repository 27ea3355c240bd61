"""The options that choose candidates by their steps and order them."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from twa_scale.config import SelectConfig


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The options that choose and order candidates, as in the section `select` of a configuration."""

    start_step: Annotated[
        int | None,
        typer.Option(
            help="Leave out candidates of earlier steps. Steps are taken from names: `step-100`, `checkpoint-500`, ...",
            show_default=False,
        ),
    ] = None
    end_step: Annotated[int | None, typer.Option(help="Leave out candidates of later steps.", show_default=False)] = (
        None
    )
    every: Annotated[
        int | None,
        typer.Option(help="Take only the steps that are a multiple of this number.", show_default=False),
    ] = None
    last: Annotated[
        int | None, typer.Option(help="Take only the last N candidates of the remaining ones.", show_default=False)
    ] = None
    order: Annotated[str, typer.Option(help="`given`, or as a control `reverse` or `shuffle` (with `--seed`).")] = (
        "given"
    )
    seed: Annotated[int, typer.Option(help="Seed of `--order shuffle`.")] = 0

    @property
    def config(self) -> "SelectConfig":
        """Return the options as a section of a configuration.

        Raises:
            ConfigError: a value is invalid.
        """
        from twa_scale.config import SelectConfig, validated

        return validated(SelectConfig, asdict(self), "--start-step, --end-step, --every, --last, --order")
