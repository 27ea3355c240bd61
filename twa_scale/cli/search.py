"""`twa-scale search`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from twa_scale.cli.options import Overrides

ConstraintName = Literal["sum", "simplex"]


def search(
    config: Annotated[Path, typer.Argument(help="The configuration of `run`.")],
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="`sweep` over windows and shapes, `greedy` soup, or `cma` on the coefficients. Can be repeated: each "
            "starts from the best average so far. Default: `sweep`.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Largest number of averages that a method evaluates.")] = 200,
    metric: Annotated[
        str | None, typer.Option(help="Metric of the task on `evaluate_split`. Default: its main metric.")
    ] = None,
    higher: Annotated[
        bool | None,
        typer.Option(
            "--higher-is-better/--lower-is-better",
            help="Which values are better. Default: known for the main metric and `loss`.",
            show_default=False,
        ),
    ] = None,
    constraint: Annotated[
        ConstraintName, typer.Option(help="`cma`: `sum` keeps the sum of coefficients, `simplex` also their sign.")
    ] = "sum",
) -> None:
    """Choose an average of the candidates by a metric, without training, and export it.

    Run it in one process, or on every rank of a launcher:

        twa-scale search configs/my-run.yaml --method sweep --method cma --metric accuracy

        torchrun --nproc-per-node 8 -m twa_scale search configs/my-run.yaml

    Each average costs one evaluation. When started again after a crash, it continues from the scores in `output`.
    """
    from twa_scale.cli.shared import rendered
    from twa_scale.config import load_config
    from twa_scale.ranks import World
    from twa_scale.run.progress import Report
    from twa_scale.run.search import DIRECTORY, SearchOptions, run_search
    from twa_scale.run.stopping import STOPPED, Stopped

    settings = load_config(config, overrides)
    options = SearchOptions(method or ["sweep"], budget, metric, higher, constraint)
    rank = World.from_environment().rank  # read while the variables of the launcher are set
    try:
        summary = run_search(settings, options, Report())
    except Stopped:
        raise typer.Exit(STOPPED) from None
    if rank == 0:
        typer.echo(rendered(_table(summary)))
        typer.echo(f"the best average is in {Path(settings.output) / DIRECTORY / 'average'}")


def _table(summary: dict[str, Any]) -> Any:
    from rich.table import Table

    from twa_scale.run.search import rows

    measured = f"{summary['measured']} evaluated now in {summary['seconds']:.1f} s"
    table = Table(title=f"{len(summary['tried'])} averages, {measured}")
    table.add_column("average")
    table.add_column(summary["metric"], justify="right")
    for label, score in rows(summary):
        table.add_row(label, f"{score:.6g}")
    return table
