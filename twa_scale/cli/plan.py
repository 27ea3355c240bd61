"""`twa-scale plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from twa_scale.cli.options import Overrides
from twa_scale.errors import ConfigError

if TYPE_CHECKING:
    from twa_scale.config import RunConfig


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
    averages: Annotated[
        str | None,
        typer.Option(
            help="Instead of a run, plan RunningAverages in a training of the task's model with `engine`: "
            "`{ema: 0.999, window: {every: 100, keep: 40}}`. No candidate is read."
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

    if averages is not None:
        _plan_averages(load_config(config, overrides), ranks, averages, json)
        return
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
        Console(emoji=False).print(plan_tables(planned, choices))


def _plan_averages(config: "RunConfig", ranks: int, text: str, json: bool) -> None:
    from json import dumps

    from twa_scale.config.yaml_text import parse_yaml
    from twa_scale.tools.planning import averages_bytes, averages_table

    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--averages: is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"--averages: {settings!r}; give settings, as '{{ema: 0.999, window: {{every: 100, keep: 40}}}}'."
        )
    nbytes = averages_bytes(config, ranks, settings)
    if json:
        typer.echo(dumps({"ranks": ranks, "averages": nbytes, "sum": sum(nbytes.values())}, indent=2))
    else:
        Console(emoji=False).print(averages_table(nbytes, ranks))
