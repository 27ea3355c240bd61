"""`twa-scale inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.option_groups import with_options
from twa_scale.cli.options import Ignore, Space, Timeout, WeightsKey
from twa_scale.cli.selection_options import Selection
from twa_scale.cli.shared import joined, rendered


@with_options(selection=Selection)
def inspect(
    candidates: Annotated[list[str], typer.Argument(help="Files, directories or globs, in training order.")],
    plot: Annotated[Path | None, typer.Option(help="Plot the cosine matrix of the deltas to this PNG file.")] = None,
    space: Space = "auto",
    ignore: Ignore = None,
    weights_key: WeightsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Timeout = None,
    *,
    selection: Selection,
) -> None:
    """Show the tensors of candidates, and the norms and cosines of their deltas. Memory is bounded.

    Under a launcher, the ranks share the work, and rank 0 prints.
    """
    from twa_scale.candidates import wanted_from_options
    from twa_scale.tools.inspection import inspect as inspect_candidates
    from twa_scale.tools.inspection import inspection_json, inspection_table

    with joined(Path.cwd() / "inspect", timeout) as (report, echo):
        with report.bytes("reading candidates") as progress:
            wanted = wanted_from_options(ignore or [], weights_key, space)
            inspection = inspect_candidates(candidates, progress, wanted, selection.config)
        echo(inspection_json(inspection) if json else rendered(inspection_table(inspection)))
        if plot and report.active:
            from twa_scale.run.plots import plot_cosines  # imported late, because matplotlib is slow to import

            plot_cosines(plot, inspection.cosines, inspection.labels)
