"""`twa-scale export`."""

from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.option_groups import with_options
from twa_scale.cli.options import Timeout
from twa_scale.cli.output_options import Output
from twa_scale.cli.shared import joined


@with_options(output=Output)
def export(
    run: Annotated[Path, typer.Argument(help="Output directory of `twa-scale run`.")],
    timeout: Timeout = None,
    *,
    output: Output,
) -> None:
    """Write the trained average of RUN from its coefficients and the candidates, without the code of the model.

    The candidates must be unchanged and have the same paths. The result is the exact merge sum_i a_i w_i. `run` itself
    exports the live weights, which differ from it by the rounding of the store.
    """
    from twa_scale.merge import export_run

    with joined(output.out, timeout) as (report, echo), report.bytes("merging") as progress:
        n, step = export_run(run, output.out, progress=progress, **output.options)
    echo(f"wrote the exact merge of {n} candidates with the coefficients of {step} to {output.out}")
