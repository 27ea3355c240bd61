"""`twa-scale average`."""

from typing import Annotated

import typer

from twa_scale.cli.option_groups import with_options
from twa_scale.cli.options import Ignore, Space, Timeout, WeightsKey
from twa_scale.cli.output_options import Output
from twa_scale.cli.selection_options import Selection
from twa_scale.cli.shared import joined


@with_options(selection=Selection, output=Output)
def average(
    candidates: Annotated[
        list[str], typer.Argument(help="Files, directories or globs in training order, or each as PATH:WEIGHT.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="`uniform` (the default); `ema:D`: D^(n-i) for candidate i of n, normalized; "
            "`ema-torch:D`, the EMA of torch over the candidates: D^(n-1) for the first, (1-D) D^(n-i) for the others; "
            "`lawa:K`: the mean of the last K; `linear` or `minus-sqrt` (decay shapes of WSM); `first`, `last` or an "
            "index; or `0.5,0.3,0.2`.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide weights that do not sum to 1 by their sum.")
    ] = False,
    buffers: Annotated[
        str,
        typer.Option(
            help="Floating point buffers. `average`: average running statistics with the weights, and take other "
            "buffers from the last candidate; `mean`: average statistics uniformly; `first`, `last` or an index: take "
            "all buffers from this candidate."
        ),
    ] = "average",
    space: Space = "auto",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With `--space product`: truncate the result to this rank. The rank of the exact result is the sum of "
            "all ranks.",
            show_default=False,
        ),
    ] = None,
    ignore: Ignore = None,
    weights_key: WeightsKey = None,
    timeout: Timeout = None,
    *,
    selection: Selection,
    output: Output,
) -> None:
    """Average candidates with fixed weights, streamed in bounded memory and without the code of the model.

    Under a launcher, the ranks share the work.

    twa-scale average 'runs/a/step-*' --weights ema:0.9 --out merged

    twa-scale average runs/a:0.7 runs/b:0.3 --out merged

    twa-scale average runs/a:3 runs/b:1 --normalize --out merged

    twa-scale average 'out/checkpoint-*' --start-step 16000 --every 1000 --out merged

    twa-scale average 'lora/*' --space product --rank 16 --out merged
    """
    from twa_scale.merge import average_fixed

    with joined(output.out, timeout) as (report, echo), report.bytes("averaging") as progress:
        weight_of = average_fixed(
            candidates,
            output.out,
            weights,
            normalize=normalize,
            buffers=buffers,
            ignore=ignore or [],
            weights_key=weights_key,
            space=space,
            rank=rank,
            select=selection.config,
            progress=progress,
            **output.options,
        )
    for label, weight in weight_of:
        echo(f"{weight:10.6f}  {label}")
    count = len(weight_of)
    of = f"the average of {count} candidates" if count > 1 else "the weights of 1 candidate, which are not averaged,"
    echo(f"wrote {of} to {output.out}")
