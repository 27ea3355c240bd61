"""`twa-scale export`."""

from pathlib import Path
from typing import Annotated

import typer

from twa_scale.cli.options import CarryCode, Dtype, Out, Overwrite, ShardSize, Timeout
from twa_scale.cli.shared import joined


def export(
    run: Annotated[Path, typer.Argument(help="Output directory of `twa-scale run`.")],
    out: Out,
    max_shard_size: ShardSize = "5GB",
    dtype: Dtype = None,
    carry_code: CarryCode = False,
    overwrite: Overwrite = False,
    timeout: Timeout = None,
) -> None:
    """Write the trained average of RUN from its coefficients and the candidates alone; no model code needed.

    The candidates must be where they were, unchanged. The result is the exact merge sum_i a_i w_i; `run` itself exports
    the live weights, which differ from it by the rounding of the store.
    """
    from twa_scale.merge import export_run

    with joined(out, timeout) as (report, say), report.bytes("merging") as progress:
        n, step = export_run(
            run,
            out,
            max_shard_size=max_shard_size,
            dtype=dtype,
            carry_code=carry_code,
            overwrite=overwrite,
            progress=progress,
        )
    say(f"wrote the exact merge of {n} candidates with the coefficients of {step} to {out}")
