"""`twa-scale plan`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twa_scale.cli.options import Overrides
from twa_scale.errors import ConfigError


def plan(
    config: Annotated[Path, typer.Argument(help="The file that `run` will get.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks that share the model.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(help="What a rank has: `24GB`, `80GiB`, ...; when not given, what it would have on this machine."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="What a rank on a GPU has beside it, for `store_device: cpu`; when not given, likewise."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what `run` will need of each rank: memory, bytes read, bytes on the wire; and which stores fit.

    Starts nothing.
    """
    from twa_scale.config import load_config
    from twa_scale.output import parse_size
    from twa_scale.tools.planning import choose_store, make_plan, plan_json, plan_tables

    given: list[int | None] = []
    for option, size in (("--memory", memory), ("--host-memory", host_memory)):
        try:
            given.append(None if size is None else parse_size(size))
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None
    planned = make_plan(load_config(config, overrides), ranks)
    choices = choose_store(planned, *given)
    if json:
        typer.echo(plan_json(planned, choices))
    else:
        Console().print(plan_tables(planned, choices))
