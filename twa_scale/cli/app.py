"""The Typer application with all commands, in the order of `--help`."""

from typing import Annotated

import typer

from twa_scale.cli.average import average
from twa_scale.cli.bench import bench
from twa_scale.cli.evaluate import evaluate
from twa_scale.cli.export import export
from twa_scale.cli.init import init
from twa_scale.cli.inspect import inspect
from twa_scale.cli.launch import launch
from twa_scale.cli.plan import plan
from twa_scale.cli.report import report
from twa_scale.cli.run import run
from twa_scale.cli.search import search
from twa_scale.version import __version__

app = typer.Typer(
    help="Learn how to average the checkpoints of models too large for one device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"twa-scale {__version__}")
        raise typer.Exit


@app.callback()
def callback(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Learn how to average the checkpoints of models too large for one device."""
    del version, local_rank  # --version has a callback; DeepSpeed's launcher passes --local_rank to every script


for command in (
    init,
    run,
    evaluate,
    search,
    launch,
    plan,
    report,
    inspect,
    bench,
    average,
    export,
):
    app.command()(command)
