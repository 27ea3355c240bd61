"""`twa-scale plan`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from twa_scale.cli.options import Overrides
from twa_scale.errors import ConfigError


def plan(
    config: Annotated[Path, typer.Argument(help="The configuration of `run`.")],
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks that share the model.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(help="Memory of a rank: `24GB`, `80GiB`, ... Default: its share of this machine."),
    ] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(
            help="Host memory of a rank with a GPU, for `store_device: cpu`. Default: its share of this machine."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Estimate the memory, bytes read and communication of each rank in `run`, and list the stores that fit.

    The command does not start a run.
    """
    from twa_scale.config import load_config
    from twa_scale.output import parse_size
    from twa_scale.tools.planning import choose_store, make_plan, plan_json, plan_tables

    limits: list[int | None] = []
    for option, size in (("--memory", memory), ("--host-memory", host_memory)):
        try:
            limits.append(None if size is None else parse_size(size))
        except ConfigError as error:
            raise ConfigError(f"{option}: {error}") from None
    planned = make_plan(load_config(config, overrides), ranks)
    choices = choose_store(planned, *limits)
    if json:
        typer.echo(plan_json(planned, choices))
    else:
        Console().print(plan_tables(planned, choices))
