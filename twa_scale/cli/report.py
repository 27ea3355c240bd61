"""`twa-scale report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Output directory of `run`, or of `export` or `average`.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write. Default: `report.html` in the directory of a run."),
    ] = None,
) -> None:
    """Write a page about RUN: methods, curves, coefficients by depth and kind of tensor, cost, settings, provenance.

    The page is one HTML file without scripts, which needs no network. For a run that has not finished, it shows the
    results so far. An older page is replaced, but no other file.

    RUN can also be an exported average, or the output directory of a Trainer with `TwaCallback`; the page then shows
    the content of their files.

    twa-scale report runs/twa

    twa-scale report merged -o merged.html
    """
    from twa_scale.tools.report import write_report

    typer.echo(f"wrote {write_report(run, out)}")
