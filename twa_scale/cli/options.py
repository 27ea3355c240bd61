"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that override those of the file: `optimizer.lr=3e-3 groups=block`.", show_default=False
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression of tensors to leave out. Can be repeated.", show_default=False),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(help="Key of the weights in files that hold several sets: `model_ema`, `ema.state_dict`, ..."),
]
Space = Annotated[
    str,
    typer.Option(
        help="Average for LoRA adapters: the `factors` A and B separately, or each `product` B A. `auto`: the "
        "factors, with a notice."
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=1, help="Under a launcher: how long ranks wait for each other, in seconds. Default: 600."),
]
