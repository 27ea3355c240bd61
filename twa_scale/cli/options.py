"""Arguments and options that several commands take."""

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings that replace those of the file: `optimizer.lr=3e-3 groups=block`.", show_default=False
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Regular expression of tensors to leave out; may be given several times.", show_default=False),
]
WeightsKey = Annotated[
    str | None,
    typer.Option(help="Where the weights are in files that hold several sets: `model_ema`, `ema.state_dict`, ..."),
]
Space = Annotated[
    str,
    typer.Option(
        help="Of LoRA adapters: average the `factors` A and B one by one, or each `product` B A. `auto`: the factors, "
        "with a line that says so."
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(min=1, help="Under a launcher: seconds that ranks wait for each other; 600 when not given."),
]
